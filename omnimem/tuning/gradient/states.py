"""Gradient to the weights that make keys and values of retained tokens, without a graph of the past."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from omnimem.memory import Memory
from omnimem.streaming.chunk_pass import ChunkStep
from omnimem.tuning.gradient.full import FullGradient


@final
@dataclass(frozen=True, kw_only=True)
class StatesGradient:
    """`gradient: states`: kept tokens carry their layer inputs as constants; whoever reads the memory makes their keys
    and values of them with the current weights.

    So k_proj and v_proj learn from what is retained, all other weights from the question's own pass, and the chunks run
    without a graph: memory and loss are those of `full`, to the bit. Scores get no gradient, so softened selection
    learns as hard selection does (design 6; the release does so below its stop layer, method 2).
    """

    question: FullGradient = field(default_factory=FullGradient)  # how questions are kept for backward

    def __call__(self, step: ChunkStep, memory: Memory, embeddings: Tensor) -> Memory:
        """The memory after the chunk, with layer inputs."""
        with torch.no_grad():
            return step(memory, embeddings, states=True)

    def read(self, loss: Callable[[Memory], Tensor], memory: Memory) -> Tensor:
        """`loss(memory)`."""
        return self.question.read(loss, memory)
