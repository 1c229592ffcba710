"""What the memory carries through the graph, and how far gradient flows back through it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from omnimem.memory import Memory


@final
@dataclass(frozen=True, kw_only=True)
class FullGradient:
    """`gradient: full`: keys and values stay in the graph, so the gradient through every eviction is exact.

    Each chunk is computed again in backward: activations of one chunk live at a time, and between chunks only the
    memories. With `offload` these wait on the host (`save_on_cpu`). The step takes and returns flat tensors, because
    inputs inside containers escape autograd's hooks on saved tensors (design 6; ours).
    """

    offload: bool = False

    def __call__(self, step: Callable[[Memory, Tensor], Memory], memory: Memory, embeddings: Tensor) -> Memory:
        """The memory after the chunk."""

        def flat(embeddings: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            return step(Memory.of(tensors), embeddings).tensors()

        with self._saving(embeddings):
            tensors = checkpoint(flat, embeddings, *memory.tensors(), use_reentrant=False)
        return Memory.of(tensors)

    def _saving(self, like: Tensor) -> AbstractContextManager[object]:
        return torch.autograd.graph.save_on_cpu(pin_memory=like.is_cuda) if self.offload else nullcontext()
