"""Similarity alone: keeps the tokens least similar to their neighbours (`similarity only` of OmniMem's table 4)."""

from dataclasses import dataclass, replace
from typing import Literal, final

from omnimem.budget import Budget
from omnimem.policies.base import ScoredPolicy
from omnimem.policies.baselines.presets import PresetWithRelease, allotted
from omnimem.scoring import Perturbation
from omnimem.view import Measures


@final
@dataclass(frozen=True, kw_only=True)
class SimilarityOptions:
    """psi at lambda = 0, which measures no attention: 1 - s, s the mean cosine to both neighbours in the pool.

    as_published  one pool of audio and visual tokens per layer
    as_released   a missing neighbour counts as cosine 1, no lending between modalities (docs/paper.md,
                  "Neighbours and edges" and "Budget allocation")
    shared_split  the audio-visual split of the budget, as in the paper's own row
    """

    name: Literal["similarity"] = "similarity"
    preset: PresetWithRelease = "as_published"
    neighbours: Literal["pool", "arrival"] = "pool"  # in the pool, or at arrival

    def build(self, budget: Budget | None) -> ScoredPolicy:
        """The policy at a budget; None: full memory."""
        released = self.preset == "as_released"
        budget = budget if released else allotted(budget, self.preset)
        return ScoredPolicy(
            name=self.name,
            scorer=Perturbation(sharpness=0.0),
            budget=replace(budget, lend=False) if budget is not None and released else budget,
            measures=Measures(neighbours=self.neighbours, ends="one" if released else "present"),
        )
