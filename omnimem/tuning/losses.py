"""What is minimised."""

from dataclasses import dataclass
from typing import final

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


@final
@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Weights of the losses."""

    answer: float = 1.0

    def __post_init__(self) -> None:
        if self.answer <= 0:
            raise ValueError(f"loss.answer = {self.answer:g} must be above 0; it is what teaches the model to answer")


def answer_losses(logits: Float[Tensor, "rows vocabulary"], labels: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Cross-entropy of each answer token, in float32 (release, method 2)."""
    return F.cross_entropy(logits.float(), labels, reduction="none")
