"""A control: the most recent tokens are kept."""

from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

from omnimem.scoring.base import AbstractScorer
from omnimem.view import LayerView


@final
@dataclass(frozen=True, kw_only=True)
class Recency(AbstractScorer):
    """Score = arrival number: a window of the latest tokens."""

    def __call__(self, view: LayerView) -> Float[Tensor, "batch tokens"]:
        return view.order.float()
