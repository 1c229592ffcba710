"""Distinct (ours): distance from the mean key, discounted by the similarity of values to a better token."""

import math
from dataclasses import dataclass
from typing import Literal, final

from omnimem.budget import Budget
from omnimem.policies.base import Markers, ScoredPolicy
from omnimem.scoring import Covered, KeyDifference


@final
@dataclass(frozen=True, kw_only=True)
class DistinctOptions:
    """score_k = (1 - cos(k, mean key)) (1 - c_k)^coverage, c_k the largest cosine to a better token of its modality.

    Both factors come from the cache: no attention is measured, no layer input is carried. The keys of a long event
    differ from the rest for its whole duration, but its copies have similar values, so one copy of it is kept.
    """

    name: Literal["distinct"] = "distinct"
    coverage: float = 0.5  # the power of 1 - c; 0: no discount
    compared: Literal["inputs", "values"] = (
        "values"  # vectors of the cosine c: the values of all heads, or the layer's input
    )
    centred: bool = True  # subtract the mean of the modality in the pool
    markers: Markers = "with_group"  # timestamps and other text of a stream: all stays, or that of kept groups
    per_head: bool = False  # every key-value head keeps tokens of its own; not with gradient: states or paper

    def __post_init__(self) -> None:
        if not 0 <= self.coverage < math.inf:
            raise ValueError(f"policy.coverage = {self.coverage:g} must be a number of at least 0")

    def build(self, budget: Budget | None) -> ScoredPolicy:
        """The policy at a budget; None: full memory."""
        plain = KeyDifference()
        covered = Covered(inner=plain, power=self.coverage, centred=self.centred, compared=self.compared)
        return ScoredPolicy(
            name=self.name,
            scorer=covered if self.coverage else plain,
            budget=budget,
            per_head=self.per_head,
            markers=self.markers,
        )
