"""StreamingLLM: a few tokens of the start and a window of the latest (arXiv 2309.17453)."""

from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from omnimem.budget import Budget
from omnimem.policies.baselines.presets import Preset, allotted, part, settings
from omnimem.policies.baselines.ranked import AbstractRanking, RankedPolicy, above_all, oldest
from omnimem.selection import LayerSlots
from omnimem.selection.layer_slots import groups
from omnimem.view import LayerView

PRESETS: dict[str, dict[str, Any]] = {"as_published": {"sinks": 4, "reindex": True}}


@final
@dataclass(frozen=True, kw_only=True)
class SinksAndWindow(AbstractRanking):
    """Arrival number, with the first `sinks` competing tokens above all; at most half of the slots are sinks."""

    sinks: int

    def __call__(self, view: LayerView, slots: LayerSlots, depth: float) -> Float[Tensor, "batch tokens"]:
        first = torch.zeros_like(view.modality, dtype=torch.bool)
        for group in groups(view.modality, slots):
            first |= oldest(group.member, min(self.sinks, group.kept // 2))
        return above_all(view.order.float(), first)


@final
@dataclass(frozen=True, kw_only=True)
class StreamingLLMOptions:
    """The sinks of the source are the first tokens of the text; here no policy evicts that text.

    as_published  in addition the first 4 audio and visual tokens are kept and take slots; positions are indices in
                  the cache: after every chunk the kept tokens move up (ranks of their times; rows and columns stay)
    shared_split  4 sinks of each modality, within the budget's audio-visual split
    """

    name: Literal["streaming_llm"] = "streaming_llm"
    preset: Preset = "as_published"
    sinks: int | None = None  # number of first tokens that are always kept
    reindex: bool | None = None  # positions are indices in the cache; false: the original ones

    def __post_init__(self) -> None:
        if self.sinks is not None and self.sinks < 0:
            raise ValueError(f"policy.sinks = {self.sinks} must be at least 0")

    def build(self, budget: Budget | None) -> RankedPolicy:
        """The policy at a budget; None: full memory."""
        chosen = settings(self, PRESETS) | {"budget": allotted(budget, self.preset)}
        return part(RankedPolicy, {**chosen, "ranking": part(SinksAndWindow, chosen)})
