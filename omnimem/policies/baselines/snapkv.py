"""SnapKV: keeps the tokens that the last queries attend to (arXiv 2404.14469), as a streaming method."""

from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from omnimem.attention.probed import probabilities, until
from omnimem.budget import Budget
from omnimem.policies.baselines.presets import PresetWithRelease, allotted, part, settings
from omnimem.policies.baselines.ranked import (
    AbstractRanking,
    Pooling,
    RankedPolicy,
    above_all,
    last_queries,
    learning,
    newest,
    pooled,
)
from omnimem.selection import LayerSlots
from omnimem.selection.layer_slots import groups
from omnimem.view import LayerView

PRESETS: dict[str, dict[str, Any]] = {
    "as_published": {"window": 32, "kernel": 7, "pooling": "mean", "per_head": True},
    "as_released": {"kernel": 5},
}


@final
@dataclass(frozen=True, kw_only=True)
class Window(AbstractRanking):
    """Attention of the chunk's last queries to a token, pooled over its neighbours; the window itself is kept.

    s = pool(sum over the last w queries of A_qk), mean over the query heads of a row. The tokens that compete are
    pooled in order of arrival, padded with zeros.
    """

    window: int
    kernel: int
    pooling: Pooling

    def __call__(self, view: LayerView, slots: LayerSlots, depth: float) -> Float[Tensor, "batch tokens"]:
        with learning(view, "attention"):
            received = watched(view, self.window).mean(dim=1).sum(dim=1)
        scores, inside = torch.zeros_like(received), torch.zeros_like(received, dtype=torch.bool)
        latest = newest(view.modality > 0, self.window)
        for group in groups(view.modality, slots):
            stays = newest(group.member & latest, group.kept // 2)
            scores = scores + pooled(received, group.member & ~stays, self.kernel, self.pooling)
            inside |= stays
        return above_all(scores, inside)


def watched(view: LayerView, window: int) -> Float[Tensor, "batch heads queries tokens"]:
    """Attention of the last `window` audio and visual tokens of the chunk to every token of the pool."""
    places = last_queries(view, window)
    index = places[:, None, :, None].expand(-1, view.queries.shape[1], -1, view.queries.shape[-1])
    seen = until(places + view.pool.count - view.new, view.pool.count)
    return probabilities(view.queries.gather(2, index), view.pool.keys, seen, scale=view.scale, gate=view.pool.gate)


@final
@dataclass(frozen=True, kw_only=True)
class SnapKVOptions:
    """The end of every chunk counts as the end of the prefill.

    as_published  the streaming port of InfiniPot-V's tables: the last 32 visual tokens as queries (here the last 32
                  audio and visual ones), mean over 7 neighbours
    as_released   FasterDecoding's pooling over 5 neighbours
    shared_split  as published, within each modality of the budget's audio-visual split
    All: every key-value head keeps tokens of its own, by the mean over the query heads that share it (kvpress); the
    original stores keys once per query head, a memory of another size. The window takes slots; if it is longer than
    half of them, only its last tokens up to half the slots are always kept. Original positions.
    """

    name: Literal["snapkv"] = "snapkv"
    preset: PresetWithRelease = "as_published"
    window: int | None = None  # number of queries, whose tokens are always kept
    kernel: int | None = None  # neighbours that are pooled; odd
    pooling: Pooling | None = None  # of the scores of neighbours
    per_head: bool | None = None  # every key-value head keeps tokens of its own

    def __post_init__(self) -> None:
        refuse(self.window, self.kernel)

    def build(self, budget: Budget | None) -> RankedPolicy:
        """The policy at a budget; None: full memory."""
        chosen = settings(self, PRESETS) | {"budget": allotted(budget, self.preset)}
        return part(RankedPolicy, {**chosen, "ranking": part(Window, chosen)})


def refuse(window: int | None, kernel: int | None) -> None:
    """Raise ValueError when a window or a kernel is out of range."""
    if window is not None and window < 1:
        raise ValueError(f"policy.window = {window} must be at least 1")
    if kernel is not None and (kernel < 1 or kernel % 2 == 0):
        raise ValueError(f"policy.kernel = {kernel} must be odd and at least 1")
