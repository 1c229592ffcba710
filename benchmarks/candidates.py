"""Scores that were tried for the choice by the worst bed (docs/why_scores_differ.md); none is in the library."""

from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from omnimem.budget import Budget
from omnimem.policies import PerturbationOptions
from omnimem.policies.base import Policy, ScoredPolicy
from omnimem.scoring import AbstractScorer
from omnimem.view import LayerView


@final
@dataclass(frozen=True, kw_only=True)
class MeanRank(AbstractScorer):
    """(1 - w) rank of `inner` + w rank of the attention received, ranks in the pool from 0 to 1."""

    inner: AbstractScorer
    weight: float = 0.5

    @property
    def needs_importance(self) -> bool:
        """Attention is measured."""
        return True

    @property
    def needs_novelty(self) -> bool:
        """Same as the inner score."""
        return self.inner.needs_novelty

    def __call__(self, view: LayerView) -> Float[Tensor, "batch tokens"]:
        return (1 - self.weight) * _ranks(self.inner(view)) + self.weight * _ranks(view.importance)


def _ranks(scores: Float[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens"]:
    places = scores.argsort(dim=1, stable=True).argsort(dim=1)
    return places.to(torch.float32) / max(1, scores.shape[1] - 1)


@final
@dataclass(frozen=True, kw_only=True)
class MeanRankOptions:
    """The ranks of `omnimem` and of attention, averaged."""

    weight: float = 0.5
    name: str = "mean_rank"

    def build(self, budget: Budget | None) -> Policy:
        """The policy at a budget; None: full memory."""
        ours: Any = PerturbationOptions().build(budget)
        scorer = MeanRank(inner=ours.scorer, weight=self.weight)
        return ScoredPolicy(name=self.name, scorer=scorer, budget=budget, measures=ours.measures)
