"""KeyDiff: keeps the tokens whose keys differ most from the mean key (arXiv 2504.15364, as in kvpress)."""

from dataclasses import dataclass
from typing import Any, Literal, final

from omnimem.budget import Budget
from omnimem.policies.base import ScoredPolicy
from omnimem.policies.baselines.presets import Preset, allotted, settings
from omnimem.scoring import KeyDifference

PRESETS: dict[str, dict[str, Any]] = {"as_published": {"per_head": True}}


@final
@dataclass(frozen=True, kw_only=True)
class KeyDiffOptions:
    """A method for text, applied after every chunk instead of once.

    as_published  every key-value head keeps tokens of its own, of one pool of audio and visual tokens
    shared_split  the same with the audio-visual split of the budget
    """

    name: Literal["keydiff"] = "keydiff"
    preset: Preset = "as_published"
    per_head: bool | None = None  # every key-value head keeps tokens of its own

    def build(self, budget: Budget | None) -> ScoredPolicy:
        """The policy at a budget; None: full memory."""
        chosen = settings(self, PRESETS)
        return ScoredPolicy(
            name=self.name, scorer=KeyDifference(), budget=allotted(budget, self.preset), per_head=chosen["per_head"]
        )
