"""Gradient to the weights that produce keys and values of kept tokens, without a graph of earlier chunks."""

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
    """`gradient: states`: kept tokens carry their layer inputs as constants, and a question recomputes their keys and
    values from them with the current weights.

    So k_proj and v_proj learn from the kept tokens, all other weights from the question's own pass, and the chunks run
    without a graph: memory and loss equal those of `full` to the bit. Scores get no gradient, so softened selection
    learns as hard selection does. The release does this below its stop layer (docs/paper.md, "Gradient in the
    release").
    """

    question: FullGradient = field(default_factory=FullGradient)  # how questions are kept for backward

    def __call__(self, step: ChunkStep, memory: Memory, embeddings: Tensor) -> tuple[Memory, "StatesGradient"]:
        """The memory after the chunk, with layer inputs."""
        with torch.no_grad():
            return step(memory, embeddings, states=True), self

    def read(self, loss: Callable[[Memory], Tensor], memory: Memory) -> Tensor:
        """`loss(memory)`."""
        return self.question.read(loss, memory)
