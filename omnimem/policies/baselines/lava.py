"""LAVa: slots of layers by entropy, slots of heads by the scores of their tokens (arXiv 2509.09754)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor

from omnimem.budget import Budget
from omnimem.budget.apportion import apportion
from omnimem.policies.base import JointPolicy, Traits
from omnimem.policies.baselines.presets import PresetWithRelease, allotted, part, settings
from omnimem.policies.baselines.pyramidkv import resplit
from omnimem.policies.baselines.ranked import best, keep_marked, newest, pooled
from omnimem.policies.baselines.snapkv import refuse, watched
from omnimem.selection import Softness
from omnimem.tokens import ABSENT, EVICTABLE, Modality, Tokens
from omnimem.view import LayerView

PRESETS: dict[str, dict[str, Any]] = {
    "as_published": {"window": 32, "kernel": 7, "head_floor": 0.5, "floor_of": "layer", "entropy": "count"},
    "as_released": {"floor_of": "mean", "entropy": "log"},
}


@final
@dataclass(frozen=True, kw_only=True)
class Share:
    """Slots of one layer of one stream, on average over its heads, beside the window's."""

    size: int  # of the layer
    ranked: int  # by entropy alone: the number of top pairs per head that determines the slots of its heads
    base: float  # if all layers had the same


@final
@dataclass(frozen=True, kw_only=True)
class LavaPolicy(JointPolicy):
    """s = (max_k |V_k|_1 / w) maxpool(sum over the last w queries of A_qk), max over the query heads of a head.

    Layers: B_l = e_l / sum(e) of all slots except the window, with e_l the entropy of the layer's scores, normalised
    over all its heads. Heads: of the H B_l highest pairs of the layer each head has some; half of its slots follow
    that number, the other half B_l. So heads and layers of one stream keep unequal numbers, with an exact sum.

    The source evicts from earlier layers again as later ones are read; here only the last eviction is made, after the
    pass. It rounds head by head; here slots are apportioned, bounded by the number of tokens.
    """

    window: int
    kernel: int
    head_floor: float  # alpha
    floor_of: Literal["layer", "mean"]
    entropy: Literal["count", "log"]

    @property
    def traits(self) -> Traits:
        """Every key-value head keeps tokens of its own, in unequal numbers."""
        return Traits(per_head=True, ragged=True)

    def select_joint(self, views: list[LayerView], softness: Softness | None = None) -> list[Tokens]:
        """The memory of every layer; selection is hard in training too, kept tokens have gradient."""
        assert self.budget is not None, "joint selection needs a budget"
        budget, heads = self.budget, views[0].heads
        window = min(self.window, budget.total // len(views) // 2)
        with torch.no_grad():
            scores = [self._scores(view, window) for view in views]
            stays = [torch.zeros_like(view.modality, dtype=torch.bool) for view in views]
            for first in range(0, len(stays[0]), heads):
                rows = slice(first, first + heads)
                kinds = [view.modality[rows] for view in views]
                mine = [score[rows] for score in scores]
                for layer, share in enumerate(self._shares(budget, kinds, mine, window)):
                    chosen = self._chosen(budget, layer, share, kinds[layer], mine[layer], window)
                    stays[layer][rows] = chosen | (kinds[layer] == Modality.TEXT)
        return [keep_marked(views.pop(0).pool, chosen) for chosen in stays]

    def _scores(self, view: LayerView, window: int) -> Float[Tensor, "rows tokens"]:
        """Scores of pairs, comparable over heads and layers; pairs of the window have none."""
        received = watched(view, self.window).sum(dim=2)
        group = received.shape[1]
        past = older(view.modality, window).repeat_interleave(group, dim=0)
        smooth = pooled(received.flatten(0, 1), past, self.kernel, "max").unflatten(0, (-1, group)).amax(dim=1)
        lengths = view.pool.values[:, 0].float().abs().sum(dim=-1).masked_fill(view.modality == ABSENT, 0.0)
        return smooth * lengths.amax(dim=1, keepdim=True) / self.window

    def _shares(
        self, budget: Budget, kinds: Sequence[Tensor], scores: Sequence[Tensor], window: int
    ) -> Iterator[Share]:
        """The slots of each layer of one stream, by the entropy of its scores."""
        layers, heads = len(kinds), len(kinds[0])
        past = [older(mine, window) for mine in kinds]
        most = [int(mine.sum()) // heads for mine in past]
        total = min(budget.total - layers * window, sum(most))
        spread = [self._entropy(score[mine]) for score, mine in zip(scores, past, strict=True)]
        ranked = apportion(spread if any(spread) else [1.0] * layers, total, [0] * layers, most)
        sizes, base = ranked, total / layers
        if self.floor_of == "mean":
            floors = [(1 - self.head_floor) * size + self.head_floor * base for size in ranked]
            sizes = apportion(floors, total, [0] * layers, most)
        for size, by_entropy in zip(sizes, ranked, strict=True):
            yield Share(size=size, ranked=by_entropy, base=base)

    def _entropy(self, scores: Float[Tensor, " pairs"]) -> float:
        """Entropy of the normalised scores, divided by their number or its logarithm; 0 without scores."""
        total = float(scores.sum())
        if len(scores) < 2 or total <= 0:
            return 0.0
        entropy = float(torch.special.entr(scores.double() / total).sum())
        return entropy / (math.log(len(scores)) if self.entropy == "log" else len(scores))

    def _chosen(
        self, budget: Budget, layer: int, share: Share, kinds: Tensor, scores: Tensor, window: int
    ) -> Bool[Tensor, "heads tokens"]:
        """The kept audio and visual pairs of one layer of one stream."""
        heads, latest = len(kinds), ~older(kinds, window)
        stays = torch.zeros_like(latest)
        for member, slots in _groups(budget, layer, share.size + window, kinds):
            inside = newest(member & latest, slots // heads // (2 if budget.split else 1))
            past = member & ~inside
            free = min(slots - int(inside.sum()), int(past.sum()))
            stays |= inside | best(scores, past, self._of_heads(scores, past, free, share))
        return stays

    def _of_heads(
        self, scores: Tensor, past: Bool[Tensor, "heads tokens"], free: int, share: Share
    ) -> Int[Tensor, " heads"]:
        """How many of `free` pairs each head keeps."""
        heads, part = len(past), free / max(1, len(past) * share.size)
        asking = round(len(past) * share.ranked * part)
        flat = best(scores.flatten()[None], past.flatten()[None], torch.tensor([asking], device=past.device))
        counts = flat.view_as(past).sum(dim=1).tolist()
        floor = asking / heads if self.floor_of == "layer" else share.base * part
        weights = [(1 - self.head_floor) * count + self.head_floor * floor for count in counts]
        sizes = past.sum(dim=1).tolist()
        found = apportion(weights if any(weights) else [1.0] * heads, free, [0] * heads, sizes)
        return torch.tensor(found, device=past.device)


def older(kinds: Int8[Tensor, "batch tokens"], window: int) -> Bool[Tensor, "batch tokens"]:
    """Audio and visual tokens before the last `window` of them."""
    return (kinds > 0) & ~newest(kinds > 0, window)


def _groups(budget: Budget, layer: int, size: int, kinds: Tensor) -> Iterator[tuple[Bool[Tensor, "heads tokens"], int]]:
    """The pairs that compete for the same slots, and how many of them are kept, over all heads."""
    heads = len(kinds)
    if not budget.split:
        yield kinds > 0, heads * size
        return
    slots = dict(zip(EVICTABLE, resplit(budget.slots[layer], size, True), strict=True))
    there = {kind: int((kinds == kind).sum()) for kind in EVICTABLE}
    kept = {kind: min(heads * slots[kind], there[kind]) for kind in EVICTABLE}
    spare = heads * size - sum(kept.values()) if budget.lend else 0
    for kind in EVICTABLE:
        extra = min(spare, there[kind] - kept[kind])
        spare -= extra
        yield kinds == kind, kept[kind] + extra


@final
@dataclass(frozen=True, kw_only=True)
class LavaOptions:
    """The end of every chunk counts as the end of the prefill; slots are allocated over all layers after each.

    as_published  window 32, max over 7 neighbours, alpha 0.5, entropy over the number of pairs (as a note
                  says; a factor common to the layers cancels), floor of a head: its layer's slots
    as_released   entropy over the logarithm of the number, floor of a head: the mean slots of all layers (an attribute
                  is misspelt there)
    shared_split  as published; within each layer audio and visual slots in the budget's audio-visual split
    The window counts as slots: it is at most half of the mean slots of a layer, and with the split at most half of
    each modality's. Original positions.
    """

    name: Literal["lava"] = "lava"
    preset: PresetWithRelease = "as_published"
    window: int | None = None  # number of queries, whose tokens are always kept
    kernel: int | None = None  # neighbours that are pooled; odd
    head_floor: float | None = None  # alpha; 1: all heads of a layer have the same slots
    floor_of: Literal["layer", "mean"] | None = None  # the slots that head_floor is a share of: the layer's or the mean
    entropy: Literal["count", "log"] | None = None  # normalised by the number of scores, or by its logarithm

    def __post_init__(self) -> None:
        refuse(self.window, self.kernel)
        if self.head_floor is not None and not 0 <= self.head_floor <= 1:
            raise ValueError(f"policy.head_floor = {self.head_floor:g} must be between 0 and 1")

    def build(self, budget: Budget | None) -> LavaPolicy:
        """The policy at a budget; None: full memory."""
        return part(LavaPolicy, {**settings(self, PRESETS), "budget": allotted(budget, self.preset)})
