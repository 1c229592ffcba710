"""Methods that rank the tokens of one layer: the base of their scores, and the policy that keeps the highest."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from omnimem.budget import Budget
from omnimem.policies.base import Policy, slots_of_layer
from omnimem.selection import LayerSlots, Softness, select
from omnimem.tokens import Modality, Tokens
from omnimem.view import LayerView

Pooling = Literal["mean", "max"]


@dataclass(frozen=True, kw_only=True)
class AbstractRanking(ABC):
    """A query-agnostic score that may depend on the slots; a row is a stream, or one key-value head of it."""

    @property
    def needs_importance(self) -> bool:
        """Whether attention mass must be measured and carried for this score."""
        return False

    @abstractmethod
    def __call__(self, view: LayerView, room: LayerSlots, depth: float) -> Float[Tensor, "batch tokens"]:
        """Scores in float32; the highest are kept, ties go to the most recent token. `depth` is layer / layers."""


@dataclass(frozen=True, kw_only=True)
class AbstractShape(ABC):
    """A method's own rule for the slots of the layers."""

    @abstractmethod
    def __call__(self, budget: Budget, arrived: int) -> Budget:
        """A budget of the same total, after `arrived` audio and visual tokens."""


@final
@dataclass(frozen=True, kw_only=True)
class RankedPolicy(Policy):
    """Keeps the highest ranks within the layer's slots; each layer decides alone, in the pass."""

    ranking: AbstractRanking
    shape: AbstractShape | None = None  # None: the slots of the budget
    per_head: bool = False  # every key-value head keeps tokens of its own
    reindex: bool = False  # after every chunk the kept tokens move up to contiguous times

    def keep(self, layer: int, view: LayerView, softness: Softness | None = None) -> Tokens:
        """The layer's memory after the chunk in `view`; with a softness, selection is softened (training)."""
        if self.budget is None:
            return view.pool
        budget = self.budget if self.shape is None else self.shape(self.budget, arrived(view))
        room = slots_of_layer(budget, layer)
        pool = replace(view.pool, importance=view.importance) if self.ranking.needs_importance else view.pool
        scores = self.ranking(view, room, layer / budget.layers)
        selected = select(scores, view.modality, room, softness, view.pool.gate)
        kept = pool.gather(selected.index)
        return kept if selected.gate is None else replace(kept, gate=selected.gate)


def arrived(view: LayerView) -> int:
    """Number of audio and visual tokens so far; text is never evicted, so its number is known."""
    return int(view.order[0].max()) + 1 - int((view.modality[0] == Modality.TEXT).sum())


def learning(view: LayerView, of: Literal["content", "attention"]) -> AbstractContextManager[object]:
    """Gradient through a score: of content unless `view.gradient` is none, of attention if it is both."""
    wanted = view.gradient == "both" if of == "attention" else view.gradient != "none"
    return torch.set_grad_enabled(torch.is_grad_enabled() and wanted)


def newest(member: Bool[Tensor, "batch tokens"], count: int | Tensor) -> Bool[Tensor, "batch tokens"]:
    """The last `count` members of each row."""
    return member & (from_end(member) <= count)


def oldest(member: Bool[Tensor, "batch tokens"], count: int | Tensor) -> Bool[Tensor, "batch tokens"]:
    """The first `count` members of each row."""
    return member & (member.cumsum(dim=1) <= count)


def from_end(member: Bool[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
    """Index of each member counted from the end, the last one 1; other tokens have that of the next member."""
    return member.flip(1).cumsum(dim=1).flip(1)


def best(
    scores: Float[Tensor, "batch tokens"], member: Bool[Tensor, "batch tokens"], count: Int[Tensor, " batch"]
) -> Bool[Tensor, "batch tokens"]:
    """The `count[row]` highest members of each row; ties go to the most recent."""
    fixed = scores.detach().nan_to_num(nan=-torch.finfo(scores.dtype).max).masked_fill(~member, float("-inf"))
    ranked = fixed.flip(1).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(ranked.shape[1], device=ranked.device).expand_as(ranked)
    place = torch.zeros_like(ranked).scatter(1, ranked, places).flip(1)
    return member & (place < count[:, None])


def left_of(pool: Tokens, stays: Bool[Tensor, "batch tokens"]) -> Tokens:
    """The kept tokens of each row, in order; shorter rows are padded."""
    counts = stays.sum(dim=1, keepdim=True)
    most = int(counts.max())
    found = pool.gather((~stays).to(torch.int8).argsort(dim=1, stable=True)[:, :most])
    return found.masked(torch.arange(most, device=stays.device) < counts)


def above_all(
    scores: Float[Tensor, "batch tokens"], chosen: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens"]:
    """The scores, with all chosen tokens 1 above the highest; ties among these go to the most recent."""
    top = scores.detach().amax(dim=1, keepdim=True) + 1
    return torch.where(chosen, top, scores)


def pooled(
    scores: Float[Tensor, "batch tokens"], member: Bool[Tensor, "batch tokens"], kernel: int, pooling: Pooling
) -> Float[Tensor, "batch tokens"]:
    """Scores pooled along the members of each row, in order, as if they were adjacent; others get 0.

    Both ends are padded with zeros, which count in a mean (torch's avg_pool1d, as in SnapKV). Scores are >= 0.
    Summed in float64, so that windows over the same tokens tie, whatever the order of summation.
    """
    front = (~member).to(torch.int8).argsort(dim=1, stable=True)
    row = F.pad((scores.double() * member).gather(1, front), (kernel // 2, kernel // 2))
    windows = row.unfold(1, kernel, 1)
    smooth = windows.mean(dim=-1) if pooling == "mean" else windows.amax(dim=-1)
    return torch.zeros_like(scores).scatter(1, front, smooth.to(scores.dtype)) * member


def last_queries(view: LayerView, count: int) -> Int[Tensor, "batch queries"]:
    """Indices in the chunk of its last `count` audio and visual tokens (text, if it has only text), for their queries.

    Every stream of a batch has the same number.
    """
    fresh = view.modality[:, -view.new :] > 0
    if not bool(fresh.any()):
        fresh = torch.ones_like(fresh)
    size = min(count, int(fresh[0].sum()))
    return newest(fresh, size).to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :size]
