"""Discount of tokens that resemble a token of higher score (ours)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float, Int, Int8, Shaped
from torch import Tensor
from torch.nn import functional as F

from omnimem.scoring.base import AbstractScorer
from omnimem.scoring.topk import highest
from omnimem.sketches import ROUNDING, vectors
from omnimem.tokens import EVICTABLE, Counts, Modality
from omnimem.view import FLOOR, Contest, LayerView

BLOCK = 1024  # tokens compared with all better ones at a time
ROWS = 128  # the same on a CPU, where less is compared in vain and a block should fit into the cache
NOISE = 0.05  # length of the difference from the mean below which its direction has no gradient
STEP = 64  # further tokens that are compared at a time, at least
ALONE = -1.0  # c of the best token, which has no better one
COUNTED = ("cpu",)  # devices that are asked how many tokens of a modality there are: an answer costs nothing there

Compared = Literal["inputs", "sketch", "values"]


@final
@dataclass(frozen=True, kw_only=True)
class Covered(AbstractScorer):
    """s_k min(1, (1 - c_k) / (1 - t))^beta, c_k = max cos(h_k - m, h_j - m) over j of k's modality with s_j > s_k.

    h is the compared vector, normalised, and m its mean over the modality in the pool, so that a component common to
    all tokens has no effect. A score s alone keeps every copy of an event, or evicts them all; this keeps the best copy
    and discounts the others. Above t a token counts as a copy; at t = -1 every token is discounted (then without the
    constant factor 1 / 2), also for what unlike statements have in common, such as their wording. The best token of a
    modality has c = -1. Ties are resolved as in selection: the more recent token is the better one. One pass without a
    loop over tokens: in order of s each is compared with those before it. The inner score must not be negative. See
    docs/paper.md, "Scores", for s.
    """

    inner: AbstractScorer
    power: float = 0.5  # beta
    above: float = -1.0  # t
    centred: bool = True  # False: m = 0
    compared: Compared = (
        "inputs"  # the layer's input, as for redundancy; a sketch of it; or the values of a row's heads
    )

    @property
    def needs_importance(self) -> bool:
        """Same as the inner score."""
        return self.inner.needs_importance

    @property
    def needs_novelty(self) -> bool:
        """If layer inputs are compared, or same as the inner score."""
        return self.compared != "values" or self.inner.needs_novelty

    def __call__(self, view: LayerView) -> Float[Tensor, "batch tokens"]:
        scores, learns = self.inner(view), view.gradient != "none"
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            pool = view.pool
            held = pool.values.transpose(1, 2).flatten(2) if self.compared == "values" else pool.feature
            how = {"centred": self.centred, "product": pool.keys.dtype, "rounding": ROUNDING if view.coded else 0.0}
            if learns:
                alone = uncovered(held, view.modality, scores, **how)
            elif view.contests and self.above > -1 and scores.device.type in COUNTED:
                alone = uncovered_contested(held, view.modality, scores, view.contests, self._factor, **how)
            else:
                alone = uncovered_values(held, view.modality, scores, pool.counts, **how)
            return scores * self._factor(alone)

    def _factor(self, alone: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The discount of tokens whose 1 - c is `alone`."""
        if self.above > -1:
            alone = (alone / (1 - self.above)).clamp(max=1)
        return alone**self.power


def uncovered(
    feature: Shaped[Tensor, "batch tokens stored"],
    modality: Int8[Tensor, "batch tokens"],
    scores: Float[Tensor, "batch tokens"],
    *,
    centred: bool = True,
    product: torch.dtype | None = None,
    rounding: float = 0.0,
) -> Float[Tensor, "batch tokens"]:
    """1 - c_k, clamped to >= 1e-6; 1 for text, which is never evicted.

    The nearest better token is found without gradient, in the precision of `product` (None: of the feature; bfloat16
    resolves cosines to 0.004); the cosine to it is float32 or more and has gradient to both tokens. `rounding` is the
    part of the squared length of a vector that is taken for noise, where c is centred (`_grown`).
    """
    feature = vectors(feature)
    unit = F.normalize(feature.to(torch.promote_types(feature.dtype, torch.float32)), dim=-1, eps=1e-12)
    found = torch.ones_like(scores)
    for kind in EVICTABLE:
        member = kind.mask(modality)
        sizes = member.sum(dim=1, keepdim=True)  # in one pool of both modalities streams may hold unequal numbers
        if (size := int(sizes.max())) == 0:
            continue
        order = highest(scores, member, size)  # members first
        there = torch.arange(size, device=order.device) < sizes
        ranked = unit.gather(1, order[..., None].expand(-1, -1, unit.shape[-1]))
        if centred:
            mean = (ranked * there[..., None]).sum(dim=1, keepdim=True) / sizes[..., None].clamp_min(1)
            ranked = _directions(ranked - mean, rounding)
        near = nearest_before(ranked.detach().to(product or feature.dtype))
        cosine = (ranked * ranked.gather(1, near[..., None].expand_as(ranked))).sum(-1)
        cosine = torch.cat([torch.full_like(cosine[:, :1], ALONE), cosine[:, 1:]], dim=1)
        alone = (1 - cosine).clamp_min(FLOOR).to(found.dtype)
        found = found.scatter(1, order, torch.where(there, alone, found.gather(1, order)))
    return found


@torch.no_grad()
def uncovered_values(
    feature: Shaped[Tensor, "batch tokens stored"],
    modality: Int8[Tensor, "batch tokens"],
    scores: Float[Tensor, "batch tokens"],
    counts: Counts | None = None,
    *,
    centred: bool = True,
    product: torch.dtype | None = None,
    rounding: float = 0.0,
) -> Float[Tensor, "batch tokens"]:
    """The values of `uncovered`, up to rounding, in a third of its time: for scores that do not learn.

    Every block of tokens is gathered, normalised and compared while it is in the cache; nothing else is copied. Nothing
    is asked of the device where `counts` are known; those of each modality are not after both have competed for the
    same slots: audio and visual tokens are then compared in one go, each with its own kind.
    """
    found = torch.ones_like(scores)
    for row, kinds in enumerate(modality):
        for order, kind in _rankings(scores[row], kinds, counts):
            ranking = Ranking(feature[row], order, kind, centred, product, rounding)
            cosine = ranking.best(len(order))
            found[row].index_copy_(0, order, (1 - cosine).clamp_min_(FLOOR).to(found.dtype))
    return found


@torch.no_grad()
def uncovered_contested(
    feature: Shaped[Tensor, "batch tokens stored"],
    modality: Int8[Tensor, "batch tokens"],
    scores: Float[Tensor, "batch tokens"],
    contests: Sequence[Contest],
    factor: Callable[[Tensor], Tensor],
    *,
    centred: bool = True,
    product: torch.dtype | None = None,
    rounding: float = 0.0,
) -> Float[Tensor, "batch tokens"]:
    """The values of `uncovered`, up to rounding, of all tokens that hard selection may keep; 1 of all others.

    A discount `factor(1 - c)` depends on better tokens alone and is at most 1. So once as many tokens as are kept score
    more than the next one in order of scores, it and all after it are evicted, and are not compared. For devices that
    answer at no cost (`COUNTED`).
    """
    found = torch.ones_like(scores)
    for row, kinds in enumerate(modality):
        for member, kept in contests:
            # 1. the ranking of all that compete, and that of each modality in it
            size = int(member[row].sum())
            if kept in (0, size):
                continue
            order = highest(scores[row : row + 1], member[row : row + 1], size)[0]
            places = [kind.mask(kinds[order]).nonzero()[:, 0] for kind in EVICTABLE]
            rankings = [Ranking(feature[row], order[each], None, centred, product, rounding) for each in places]
            plain, first = scores[row, order], kept
            alone = torch.ones_like(plain)
            # 2. compare the first ones, then further ones until all that could be kept are among them
            while True:
                for each, ranking in zip(places, rankings, strict=True):
                    last = int(torch.searchsorted(each, first))
                    alone[each[:last]] = (1 - ranking.best(last)).clamp_min_(FLOOR).to(alone.dtype)
                if first == size:
                    break
                ahead = int((plain[:first] * factor(alone[:first]) > plain[first]).sum())
                if ahead >= kept:
                    break
                first = min(size, first + max(STEP, kept - ahead))
            found[row, order] = alone
    return found


def _rankings(
    scores: Float[Tensor, " tokens"], modality: Int8[Tensor, " tokens"], counts: Counts | None
) -> Iterator[tuple[Int[Tensor, " members"], Int8[Tensor, " members"] | None]]:
    """Members that are compared, best first: one modality, or both after one another with the modality of each."""
    if counts is not None and counts.audio is None and scores.device.type not in COUNTED:
        member = modality > 0
        order = highest(scores[None], member[None], counts.media)[0]
        order = order[modality[order].argsort(stable=True)]
        yield order, modality[order]
        return
    for kind in EVICTABLE:
        member = kind.mask(modality)
        if counts is None or counts.audio is None:
            size = int(member.sum())
        else:
            size = counts.audio if kind == Modality.AUDIO else counts.media - counts.audio
        if size:
            yield highest(scores[None], member[None], size)[0], None


@final
class Ranking:
    """Tokens of one kind (or of both, after one another) in falling order of scores, compared with those before them.

    `product` is the precision in which the nearest is found (None: that of the feature); cosines are float32 or more.
    """

    def __init__(
        self,
        feature: Shaped[Tensor, "tokens stored"],
        order: Int[Tensor, " members"],
        kind: Int8[Tensor, " members"] | None,
        centred: bool,
        product: torch.dtype | None,
        rounding: float,
    ) -> None:
        ranked = vectors(feature.index_select(0, order))
        self.product, self.rounding, self.kind, self.done = product or ranked.dtype, rounding, kind, 0
        self.step = min(BLOCK, ROWS) if feature.device.type == "cpu" else BLOCK
        self.ranked = ranked.to(torch.promote_types(ranked.dtype, torch.float32))
        self.lengths = torch.linalg.vector_norm(self.ranked, dim=-1, keepdim=True).clamp_min_(1e-12)
        self.mean = self._mean() if centred else None
        size = len(order)
        self.cosines = self.ranked.new_empty(size)
        self.room = ranked.new_empty(min(self.step, size) * size, dtype=self.product)  # cosines of a block
        # minus infinity where a member (column) is not before another one (row) of its block, else 0
        side = min(self.step, size)
        self.later = torch.full((side, side), float("-inf"), dtype=self.product, device=feature.device).triu()

    def _mean(self) -> Float[Tensor, "kinds feature"]:
        """The mean direction of the members of each kind; NaN of a kind without members, which nothing reads."""
        kind, share = self.kind, torch.ones_like(self.lengths)
        if kind is not None:
            visual = Modality.VISUAL.mask(kind).to(share.dtype)[:, None]
            share = torch.cat([1 - visual, visual], dim=1)
        with torch.autocast(share.device.type, enabled=False):
            return ((share / self.lengths).mT @ self.ranked).div_(share.sum(dim=0)[:, None])

    def best(self, count: int) -> Float[Tensor, " count"]:
        """The largest cosine of each of the first `count` members to one of its kind before it, or `ALONE`.

        `count` does not fall from call to call.
        """
        # 1. directions of those that were not compared yet
        kind, new = self.kind, slice(self.done, count)
        rows = self.ranked[new].div_(self.lengths[new])
        if self.mean is not None:
            rows.sub_(self.mean if kind is None else self.mean[Modality.VISUAL.mask(kind[new]).long()])
            length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min_(1e-12)
            rows.div_(length if self.rounding == 0 else length.div_(_grown(length, self.rounding)))
        # 2. their cosines, block by block
        with torch.autocast(self.ranked.device.type, enabled=False):
            for first in range(self.done, count, self.step):
                self._compare(first, min(first + self.step, count))
        self.done = count
        # 3. the first of each kind has none before it
        if kind is None:
            self.cosines[:1] = ALONE
            return self.cosines[:count]
        first = torch.ones_like(self.cosines, dtype=torch.bool)
        first[1:] = kind[1:] != kind[:-1]
        return self.cosines.masked_fill_(first, ALONE)[:count]

    def _compare(self, first: int, last: int) -> None:
        """Members `first` to `last` (exclusive) with all before; in low precision the cosine is computed again."""
        kind, low, rows, before = self.kind, self.product, self.ranked[first:last], self.ranked[:last]
        room = self.room[: (last - first) * last].view(last - first, last)
        alike = torch.mm(rows.to(low), before.to(low).mT, out=room)
        alike[:, first:].add_(self.later[: last - first, : last - first])
        if kind is not None:
            alike.masked_fill_(kind[first:last, None] != kind[:last], float("-inf"))
        if low == rows.dtype:
            torch.amax(alike, dim=-1, out=self.cosines[first:last])
        else:
            torch.sum(rows * before[alike.max(dim=-1).indices], dim=-1, out=self.cosines[first:last])


def _directions(
    apart: Float[Tensor, "batch members feature"], rounding: float
) -> Float[Tensor, "batch members feature"]:
    """Differences from the mean, normalised; without gradient where they are close to 0 (silence, a still image).

    There the direction is noise, and its gradient grows with 1 / length.
    """
    unit, length = F.normalize(apart, dim=-1, eps=1e-12), apart.detach().norm(dim=-1, keepdim=True)
    unit = unit if rounding == 0 else unit * _grown(length, rounding)
    return torch.where(length < NOISE, unit.detach(), unit)


def _grown(length: Float[Tensor, "*axes 1"], rounding: float) -> Float[Tensor, "*axes 1"]:
    """1 / sqrt(1 - rounding / length^2), at most 2: what a direction of this length loses to the noise of its codes."""
    return (1 - rounding / length.square()).clamp_min_(0.25).rsqrt_()


@torch.no_grad()
def nearest_before(ranked: Float[Tensor, "batch members feature"]) -> Int[Tensor, "batch members"]:
    """For each member the index of the most similar one before it, the first if several; 0 for the first member.

    Computed in blocks of rows, so that no members x members matrix exists. Autocast has no effect, so that training
    and evaluation select the same tokens.
    """
    count, found = ranked.shape[1], []
    step = min(BLOCK, ROWS) if ranked.device.type == "cpu" else BLOCK
    for first in range(0, count, step):
        last = min(first + step, count)
        with torch.autocast(ranked.device.type, enabled=False):
            alike = ranked[:, first:last] @ ranked[:, :last].mT
        later = torch.ones(last - first, last - first, dtype=torch.bool, device=ranked.device).triu()
        alike[..., first:].masked_fill_(later, float("-inf"))
        found.append(alike.max(dim=-1).indices)  # the first as argmax, which takes three times as long on a CPU
    return torch.cat(found, dim=1)
