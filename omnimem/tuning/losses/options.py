"""The losses of a run and their weights."""

from dataclasses import dataclass
from typing import final

from omnimem.tuning.losses.answer import AnswerLoss
from omnimem.tuning.losses.base import AbstractLoss
from omnimem.tuning.losses.full_memory_kl import FullMemoryKL


@final
@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The weight of the answer loss, and a section for each optional loss; losses that are not given are off.

    A loss with weight 0 is computed and logged but not trained on.
    """

    answer: float = 1.0  # weight of the cross-entropy of the answers
    full_memory_kl: FullMemoryKL | None = None  # distillation from the model with full memory

    def __post_init__(self) -> None:
        if not any(loss.weight > 0 for loss in self.losses):
            raise ValueError("loss: all weights are 0; give answer or another loss a positive weight")

    @property
    def losses(self) -> tuple[AbstractLoss, ...]:
        """The losses to compute; the answer loss is always included and applies to every stream."""
        optional = (self.full_memory_kl,)
        return (AnswerLoss(weight=self.answer), *(loss for loss in optional if loss is not None))
