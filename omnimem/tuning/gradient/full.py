"""The exact gradient through the memory, with recomputation and offloading."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from omnimem.memory import Memory


@final
@dataclass(frozen=True, kw_only=True)
class FullGradient:
    """`gradient: full`: keys and values stay in the graph, so the gradient through every eviction is exact.

    With `recompute`, each chunk and each question is recomputed in backward: the activations of one chunk live at a
    time, and between chunks only the memories; without it a step is a quarter faster and all activations live. With
    `offload`, saved tensors wait in host memory (`save_on_cpu`). Steps take and return flat tensors, because inputs
    inside containers escape autograd's hooks on saved tensors.
    """

    offload: bool = False
    recompute: bool = True

    def __call__(
        self, step: Callable[[Memory, Tensor], Memory], memory: Memory, embeddings: Tensor
    ) -> tuple[Memory, "FullGradient"]:
        """The memory after the chunk."""
        return self.after(step, memory, embeddings), self

    def after(self, step: Callable[[Memory, Tensor], Memory], memory: Memory, embeddings: Tensor) -> Memory:
        """The memory after the chunk, in the graph."""

        def flat(embeddings: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            return step(Memory.of(tensors), embeddings).tensors()

        return Memory.of(self.hold(flat, embeddings, *memory.tensors()))

    def read(self, loss: Callable[[Memory], Tensor], memory: Memory) -> Tensor:
        """`loss(memory)`, recomputed too: otherwise each question keeps a copy of the memory until backward."""

        def flat(*tensors: Tensor) -> Tensor:
            return loss(Memory.of(tensors))

        return self.hold(flat, *memory.tensors())

    def hold(self, step: Callable[..., Any], *tensors: Tensor) -> Any:
        """`step(*tensors)`, recomputed and offloaded by these settings."""
        saving = torch.autograd.graph.save_on_cpu(pin_memory=tensors[0].is_cuda) if self.offload else nullcontext()
        with saving:
            return checkpoint(step, *tensors, use_reentrant=False) if self.recompute else step(*tensors)
