"""Which losses a run sums, and how much each counts."""

from dataclasses import dataclass
from typing import final

from omnimem.tuning.losses.answer import AnswerLoss
from omnimem.tuning.losses.base import AbstractLoss
from omnimem.tuning.losses.full_memory_kl import FullMemoryKL


@final
@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The answers' weight, and a section for each further loss; a loss that is not named is off.

    A weight of 0 measures and logs a loss without learning from it.
    """

    answer: float = 1.0
    full_memory_kl: FullMemoryKL | None = None

    def __post_init__(self) -> None:
        if not any(loss.weight > 0 for loss in self.losses):
            raise ValueError("loss: every weight is 0, so nothing is learned; give answer or another loss a weight")

    @property
    def losses(self) -> tuple[AbstractLoss, ...]:
        """The losses to compute; the answers' is always one of them, and takes every stream."""
        further = (self.full_memory_kl,)
        return (AnswerLoss(weight=self.answer), *(loss for loss in further if loss is not None))
