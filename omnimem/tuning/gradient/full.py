"""What the memory carries through the graph, and how far gradient flows back through it."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, final, runtime_checkable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from omnimem.memory import Memory
from omnimem.streaming.chunk_pass import MemoryStep


@runtime_checkable
class BackpropMode(MemoryStep, Protocol):
    """A way to carry the memory that also says how a loss is read from it."""

    def read(self, loss: Callable[[Memory], Tensor], memory: Memory) -> Tensor:
        """`loss(memory)`."""
        ...


@final
@dataclass(frozen=True, kw_only=True)
class FullGradient:
    """`gradient: full`: keys and values stay in the graph, so the gradient through every eviction is exact.

    With `recompute` each chunk and each question is computed again in backward: activations of one chunk live at a
    time, and between chunks only the memories; without it a step is a quarter faster and all activations live. With
    `offload` what waits lies on the host (`save_on_cpu`). Steps take and return flat tensors, because inputs inside
    containers escape autograd's hooks on saved tensors (design 6; ours).
    """

    offload: bool = False
    recompute: bool = True

    def __call__(self, step: Callable[[Memory, Tensor], Memory], memory: Memory, embeddings: Tensor) -> Memory:
        """The memory after the chunk."""

        def flat(embeddings: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            return step(Memory.of(tensors), embeddings).tensors()

        return Memory.of(self.hold(flat, embeddings, *memory.tensors()))

    def read(self, loss: Callable[[Memory], Tensor], memory: Memory) -> Tensor:
        """Questions asked on the way would each keep a copy of the memory's keys and values until backward."""

        def flat(*tensors: Tensor) -> Tensor:
            return loss(Memory.of(tensors))

        return self.hold(flat, *memory.tensors())

    def hold(self, step: Callable[..., Any], *tensors: Tensor) -> Any:
        """`step(*tensors)`, held for backward as these settings say."""
        saving = torch.autograd.graph.save_on_cpu(pin_memory=tensors[0].is_cuda) if self.offload else nullcontext()
        with saving:
            return checkpoint(step, *tensors, use_reentrant=False) if self.recompute else step(*tensors)
