"""Cross-entropy of the answers."""

from dataclasses import dataclass
from typing import ClassVar, final

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from omnimem.tuning.losses.base import AbstractLoss, Rows


@final
@dataclass(frozen=True, kw_only=True)
class AnswerLoss(AbstractLoss):
    """-log q(token) of each answer token and of the token that ends the answer (release)."""

    name: ClassVar[str] = "answer"

    def __call__(self, rows: Rows) -> Float[Tensor, " rows"]:
        return answer_losses(rows.logits, rows.labels)


def answer_losses(logits: Float[Tensor, "rows vocabulary"], labels: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Cross-entropy of each answer token, in float32 (release)."""
    return F.cross_entropy(logits.float(), labels, reduction="none")
