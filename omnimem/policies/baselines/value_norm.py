"""Value norm: keeps the tokens with the longest values (the VaN score of InfiniPot-V alone, arXiv 2506.15745)."""

from dataclasses import dataclass
from typing import Any, Literal, final

from jaxtyping import Float
from torch import Tensor

from omnimem.budget import Budget
from omnimem.policies.baselines.presets import Preset, allotted, part, settings
from omnimem.policies.baselines.ranked import AbstractRanking, RankedPolicy, learning
from omnimem.selection import LayerSlots
from omnimem.view import LayerView

PRESETS: dict[str, dict[str, Any]] = {"as_published": {"per_head": True}}


@final
@dataclass(frozen=True, kw_only=True)
class ValueNorm(AbstractRanking):
    """|V|_2, mean over the key-value heads of a row."""

    def __call__(self, view: LayerView, slots: LayerSlots, depth: float) -> Float[Tensor, "batch tokens"]:
        with learning(view, "content"):
            return view.pool.values.float().norm(dim=-1).mean(dim=1)


@final
@dataclass(frozen=True, kw_only=True)
class ValueNormOptions:
    """Published only as half of InfiniPot-V; alone and without its pooling, the simplest content-based baseline.

    as_published  every key-value head keeps tokens of its own, of one pool of audio and visual tokens
    shared_split  the same with the audio-visual split of the budget
    """

    name: Literal["value_norm"] = "value_norm"
    preset: Preset = "as_published"
    per_head: bool | None = None  # every key-value head keeps tokens of its own

    def build(self, budget: Budget | None) -> RankedPolicy:
        """The policy at a budget; None: full memory."""
        chosen = settings(self, PRESETS) | {"budget": allotted(budget, self.preset)}
        return part(RankedPolicy, {**chosen, "ranking": ValueNorm()})
