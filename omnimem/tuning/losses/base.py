"""What every loss is: a function from the answers' logits to one number an answer token."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

from jaxtyping import Float, Int
from torch import Tensor


@final
@dataclass(frozen=True, kw_only=True)
class Rows:
    """The answer tokens that are asked for at one moment, a row each, of all streams of a pass."""

    logits: Float[Tensor, "rows vocabulary"]  # of the model that learns, with its budget
    labels: Int[Tensor, " rows"]  # the tokens that follow
    teacher: Float[Tensor, "rows vocabulary"] | None = None  # of the untouched model with full memory


@dataclass(frozen=True, kw_only=True)
class AbstractLoss:
    """A loss and its settings; one whose weight is 0 is measured, not learned from."""

    name: ClassVar[str]  # in the config and in the metrics
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight = {self.weight:g} of tuning.loss.{self.name} must be a number of 0 or more")

    @property
    def needs_teacher(self) -> bool:
        """Whether the stream must pass once more, through the untouched model with full memory."""
        return False

    def takes(self, tokens: int) -> bool:
        """Whether a stream of so many audio and visual tokens takes part; one that does not adds 0, and is counted."""
        return True

    @abstractmethod
    def __call__(self, rows: Rows) -> Float[Tensor, " rows"]:
        """The loss of each row in float32, without the weight."""
