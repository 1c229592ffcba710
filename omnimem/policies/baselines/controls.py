"""Controls: what any memory method must beat at the same entries."""

from dataclasses import dataclass
from typing import Literal, final

from omnimem.budget import Budget
from omnimem.policies.base import ScoredPolicy
from omnimem.policies.baselines.presets import Preset, allotted
from omnimem.scoring import AbstractScorer, Random, Recency, Uniform


@final
@dataclass(frozen=True, kw_only=True)
class ControlOptions:
    """Selection that does not look at the content: the recent tokens, tokens at random, or tokens spread evenly.

    as_published  one pool of audio and visual tokens a layer
    shared_split  the audio-visual split of the budget
    """

    name: Literal["random", "recency", "uniform"]
    preset: Preset = "shared_split"
    seed: int = 0  # of the random control

    def build(self, budget: Budget | None) -> ScoredPolicy:
        """The policy at a budget; None: full memory."""
        scorers: dict[str, AbstractScorer] = {
            "random": Random(seed=self.seed),
            "recency": Recency(),
            "uniform": Uniform(),
        }
        return ScoredPolicy(name=self.name, scorer=scorers[self.name], budget=allotted(budget, self.preset))
