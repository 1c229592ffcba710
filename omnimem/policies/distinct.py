"""Distinct (ours): keys unlike the mean key, discounted by what the values of a better token already hold."""

import math
from dataclasses import dataclass
from typing import Literal, final

from omnimem.budget import Budget
from omnimem.policies.base import ScoredPolicy
from omnimem.scoring import Compared, Covered, KeyDifference


@final
@dataclass(frozen=True, kw_only=True)
class DistinctOptions:
    """score_k = (1 - cos(k, mean key)) (1 - c_k)^coverage, c_k the largest cosine to a better token of its modality.

    Both parts are read off the cache: no attention is measured, no layer input is carried. An event that lasts has
    keys unlike the rest for as long as it lasts, and its copies have like values, so one copy of it stays.
    """

    name: Literal["distinct"] = "distinct"
    coverage: float = 0.5  # the power of 1 - c; 0: no discount
    compared: Compared = "values"  # what c is the cosine of: the values of all heads, or the layer's input
    centred: bool = True  # on the mean of the modality in the pool
    per_head: bool = False  # every key-value head keeps its own tokens; not with gradient: states or paper

    def __post_init__(self) -> None:
        if not 0 <= self.coverage < math.inf:
            raise ValueError(f"policy.coverage = {self.coverage:g} must be a number of at least 0")

    def build(self, budget: Budget | None) -> ScoredPolicy:
        """The policy at a budget; None: full memory."""
        plain = KeyDifference()
        covered = Covered(inner=plain, power=self.coverage, centred=self.centred, compared=self.compared)
        return ScoredPolicy(
            name=self.name, scorer=covered if self.coverage else plain, budget=budget, per_head=self.per_head
        )
