"""Methods that rank the tokens of one layer: the base of their scores, and the policy that keeps the highest."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from omnimem.budget import Budget
from omnimem.policies.base import Policy, Traits, keep_highest, slots_of_layer
from omnimem.scoring.topk import highest
from omnimem.selection import LayerSlots, Softness
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

    @property
    def needs_place(self) -> bool:
        """Whether frame, row and column of kept tokens must be carried for this score."""
        return False

    @abstractmethod
    def __call__(self, view: LayerView, slots: LayerSlots, depth: float) -> Float[Tensor, "batch tokens"]:
        """Scores in float32; the highest are kept, ties go to the most recent token. `depth` is layer / layers."""


@final
@dataclass(frozen=True, kw_only=True)
class RankedPolicy(Policy):
    """Keeps the highest ranks within the layer's slots; each layer decides alone, in the pass."""

    ranking: AbstractRanking
    # a budget of the same total after that many audio and visual tokens; None: the slots of the budget
    reshape: Callable[[Budget, int], Budget] | None = None
    per_head: bool = False  # every key-value head keeps tokens of its own
    reindex: bool = False  # after every chunk the kept tokens move up to contiguous times

    @property
    def traits(self) -> Traits:
        """As chosen."""
        return Traits(
            per_head=self.per_head,
            reindex=self.reindex,
            needs_mass=self.ranking.needs_importance,
            needs_place=self.ranking.needs_place,
        )

    def keep(self, layer: int, view: LayerView, softness: Softness | None = None) -> Tokens:
        """The layer's memory after the chunk in `view`; with a softness, selection is softened (training)."""
        if self.budget is None:
            return view.pool
        budget = self.budget if self.reshape is None else self.reshape(self.budget, arrived(view))
        slots = slots_of_layer(budget, layer)
        pool = replace(view.pool, importance=view.importance) if self.ranking.needs_importance else view.pool
        scores = self.ranking(view, slots, layer / budget.layers)
        return keep_highest(pool, scores, slots, softness, self.markers, view.settles)


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
    ranked = highest(scores, member, scores.shape[1])
    places = torch.arange(ranked.shape[1], device=ranked.device).expand_as(ranked)
    return member & (torch.zeros_like(ranked).scatter(1, ranked, places) < count[:, None])


def keep_marked(pool: Tokens, stays: Bool[Tensor, "batch tokens"]) -> Tokens:
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
