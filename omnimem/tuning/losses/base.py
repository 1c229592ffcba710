"""Base class of losses: a function from the logits of answers to one number per answer token."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

from jaxtyping import Float, Int
from torch import Tensor


@final
@dataclass(frozen=True, kw_only=True)
class Rows:
    """The answer tokens of one prompt, of all streams of a batch, one per row."""

    logits: Float[Tensor, "rows vocabulary"]  # of the trained model, with its budget
    labels: Int[Tensor, " rows"]  # next tokens
    teacher: Float[Tensor, "rows vocabulary"] | None = None  # logits without adapter, with full memory


@dataclass(frozen=True, kw_only=True)
class AbstractLoss:
    """A loss and its settings; with weight 0 it is logged but not trained on."""

    name: ClassVar[str]  # in config and metrics
    weight: float = 1.0  # in the sum of the losses

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight = {self.weight:g} of tuning.loss.{self.name} must be a number of 0 or more")

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss needs a second pass of the stream, without adapter and with full memory."""
        return False

    def applies_to(self, tokens: int) -> bool:
        """Whether the loss applies to a stream with this number of audio and visual tokens; otherwise it adds 0."""
        return True

    @abstractmethod
    def __call__(self, rows: Rows) -> Float[Tensor, " rows"]:
        """The loss of each row in float32, without the weight."""
