"""Controls: baselines that every memory method must beat with the same number of entries."""

from dataclasses import dataclass
from typing import Literal, final

from omnimem.budget import Budget
from omnimem.policies.base import Policy, ScoredPolicy
from omnimem.policies.baselines.presets import Preset, allotted
from omnimem.scoring import AbstractScorer, Random, Recency, Uniform
from omnimem.selection import Softness
from omnimem.selection.layer_slots import text_of
from omnimem.tokens import Tokens
from omnimem.view import LayerView


@final
@dataclass(frozen=True, kw_only=True)
class ControlOptions:
    """Selection independent of the content.

    recency   keeps the latest tokens
    random    keeps random tokens
    uniform   keeps tokens that are spread evenly


    as_published  one pool of audio and visual tokens per layer
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


@final
@dataclass(frozen=True, kw_only=True)
class TextOnly(Policy):
    """Keeps the text of a stream alone: what timestamps tell, and what tuning stores in them (ours)."""

    def keep(self, layer: int, view: LayerView, softness: Softness | None = None) -> Tokens:
        """The text of the pool."""
        return view.pool.gather(text_of(view.modality))
