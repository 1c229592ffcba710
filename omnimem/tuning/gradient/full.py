"""The exact gradient through the memory, with recomputation and offloading."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from omnimem.lazy import Once
from omnimem.memory import Memory
from omnimem.streaming.chunk_pass import ChunkStep


@final
@dataclass(frozen=True, kw_only=True)
class FullGradient:
    """`gradient: full`: keys and values stay in the graph, so the gradient through every eviction is exact.

    With `recompute`, each chunk and each question is recomputed in backward: the activations of one chunk live at a
    time, and between chunks only the memories and what is measured once (`Once`: at most 12 bytes per token of a pool);
    without it a step is a quarter faster and all activations live. With `offload`, saved tensors wait in host memory
    (`save_on_cpu`), and scores are measured again. Steps take and return flat tensors, because inputs inside containers
    escape autograd's hooks on saved tensors.

    Where nothing is evicted (full memory), the graph holds what each chunk added once, as a block: memories of all
    chunks would grow with the square of their number. The joined memory exists once, outside of the graph.
    """

    offload: bool = False
    recompute: bool = True
    blocks: tuple[Memory, ...] = ()  # of this stream, under full memory: the parts of its memory

    def __call__(self, step: ChunkStep, memory: Memory, embeddings: Tensor) -> tuple[Memory, "FullGradient"]:
        """The memory after the chunk."""
        if not (self.recompute and step.appends):
            return self.after(step, memory, embeddings), self
        blocks = self.blocks or (memory,)

        def flat(embeddings: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            before = _joined(tensors, len(blocks))
            return step(before, embeddings).since(before).tensors()

        added = self.hold(flat, embeddings, *(tensor for block in blocks for tensor in block.tensors()))
        grown = (*blocks, Memory.of(added))
        return Memory.joined(grown), replace(self, blocks=grown)

    def after(self, step: Callable[[Memory, Tensor], Memory], memory: Memory, embeddings: Tensor) -> Memory:
        """The memory after the chunk, in the graph."""
        if self.recompute and not self.offload and isinstance(step, ChunkStep):  # results would stay on the device
            step = replace(step, once=Once())

        def flat(embeddings: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            return step(Memory.of(tensors), embeddings).tensors()

        return Memory.of(self.hold(flat, embeddings, *memory.tensors()))

    def read(self, loss: Callable[[Memory], Tensor], memory: Memory) -> Tensor:
        """`loss(memory)`, recomputed too: otherwise each question keeps a copy of the memory until backward."""

        blocks = self.blocks or (memory,)

        def flat(*tensors: Tensor) -> Tensor:
            return loss(_joined(tensors, len(blocks)))

        return self.hold(flat, *(tensor for block in blocks for tensor in block.tensors()))

    def hold(self, step: Callable[..., Any], *tensors: Tensor) -> Any:
        """`step(*tensors)`, recomputed and offloaded by these settings."""
        saving = torch.autograd.graph.save_on_cpu(pin_memory=tensors[0].is_cuda) if self.offload else nullcontext()
        with saving:
            return checkpoint(step, *tensors, use_reentrant=False) if self.recompute else step(*tensors)


def _joined(tensors: Sequence[Tensor], blocks: int) -> Memory:
    """The memory from the flat tensors of its blocks."""
    size = len(tensors) // blocks
    parts = [Memory.of(tensors[first : first + size]) for first in range(0, len(tensors), size)]
    return parts[0] if blocks == 1 else Memory.joined(parts)
