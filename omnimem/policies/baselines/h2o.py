"""H2O: heavy hitters and recent tokens (arXiv 2306.14048)."""

from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from omnimem.budget import Budget
from omnimem.policies.baselines.presets import Preset, allotted, part, settings
from omnimem.policies.baselines.ranked import AbstractRanking, RankedPolicy, above_all, newest
from omnimem.selection import LayerSlots
from omnimem.selection.layer_slots import groups
from omnimem.view import LayerView, Measures

PRESETS: dict[str, dict[str, Any]] = {
    "as_published": {"recent_share": 0.5, "per_observer": False, "per_head": True, "query_stride": 1}
}


@final
@dataclass(frozen=True, kw_only=True)
class HeavyHitters(AbstractRanking):
    """The attention that a token has received from all queries so far; the most recent tokens are always kept.

    a_k = sum over queries of A_qk, carried from chunk to chunk for the kept tokens, mean over the query heads of a row.
    `per_observer` divides it by the number of later tokens, whose queries could attend to it (kvpress's
    ObservedAttention): otherwise old tokens have the advantage of more queries.
    """

    recent_share: float
    per_observer: bool

    @property
    def needs_importance(self) -> bool:
        """The running sum is carried."""
        return True

    def __call__(self, view: LayerView, slots: LayerSlots, depth: float) -> Float[Tensor, "batch tokens"]:
        scores = view.importance
        if self.per_observer:
            scores = scores / (view.order.amax(dim=1, keepdim=True) + 1 - view.order)
        recent = torch.zeros_like(scores, dtype=torch.bool)
        for group in groups(view.modality, slots):
            recent |= newest(group.member, round(self.recent_share * group.kept))
        return above_all(scores, recent)


@final
@dataclass(frozen=True, kw_only=True)
class H2OOptions:
    """The streaming port: attention is summed over the queries of each chunk, and evicted after it.

    as_published  half of the slots for recent tokens, half for heavy hitters, like its 10 % + 10 %; every
                  key-value head keeps tokens of its own (mean over the query heads that share it), of one pool of audio
                  and visual tokens; original positions
    shared_split  the same within each modality of the budget's audio-visual split
    The class defaults of the release (4 hitters, 512 recent tokens) are not among its evaluated settings: no preset.
    """

    name: Literal["h2o"] = "h2o"
    preset: Preset = "as_published"
    recent_share: float | None = None  # of the slots
    per_observer: bool | None = None  # sums are divided by the number of queries that could see the token
    per_head: bool | None = None  # every key-value head keeps tokens of its own
    # s: attention is estimated from every s-th query of a chunk, without bias; 1: measured from all
    query_stride: int | None = None

    def __post_init__(self) -> None:
        if self.recent_share is not None and not 0 <= self.recent_share <= 1:
            raise ValueError(f"policy.recent_share = {self.recent_share:g} must be between 0 and 1")
        if self.query_stride is not None and self.query_stride < 1:
            raise ValueError(f"policy.query_stride = {self.query_stride} must be at least 1")

    def build(self, budget: Budget | None) -> RankedPolicy:
        """The policy at a budget; None: full memory."""
        chosen = settings(self, PRESETS) | {"budget": allotted(budget, self.preset)}
        parts = {"ranking": part(HeavyHitters, chosen), "measures": part(Measures, chosen)}
        return part(RankedPolicy, {**chosen, **parts})
