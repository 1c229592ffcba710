"""OmniMem's score (docs/paper.md, "Scores")."""

from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

from omnimem.scoring.base import AbstractScorer
from omnimem.view import LayerView


@final
@dataclass(frozen=True, kw_only=True)
class Perturbation(AbstractScorer):
    """psi = a^lambda (1 - s)^gamma: change of the output when a token is evicted (OmniMem eq. 10)."""

    sharpness: float = 0.02  # lambda; 0: similarity only, no attention mass is measured
    novelty_power: float = 1.0  # gamma: 1 as printed, 0.5 as released

    @property
    def needs_importance(self) -> bool:
        """Attention is not measured at lambda = 0, as in the release."""
        return self.sharpness != 0

    @property
    def needs_novelty(self) -> bool:
        """Redundancy is always measured."""
        return True

    def __call__(self, view: LayerView) -> Float[Tensor, "batch tokens"]:
        novelty = view.novelty**self.novelty_power
        return view.importance**self.sharpness * novelty if self.needs_importance else novelty
