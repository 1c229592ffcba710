"""A control: every token of the stream is kept with the same probability."""

from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

from omnimem.scoring.base import AbstractScorer
from omnimem.scoring.hashing import uniform_of
from omnimem.view import LayerView


@final
@dataclass(frozen=True, kw_only=True)
class Random(AbstractScorer):
    """Score = a fixed random number of (seed, arrival number), that a token keeps for good: reservoir sampling.

    A new draw at every eviction would forget old tokens exponentially; a fixed draw does not depend on age.
    """

    seed: int = 0

    def __call__(self, view: LayerView) -> Float[Tensor, "batch tokens"]:
        return uniform_of(view.order, self.seed)
