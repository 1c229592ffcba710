"""Discount of tokens that resemble a token of higher score (ours)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, final

import torch
from jaxtyping import Float, Int, Int8, Int16, Int32, Shaped
from torch import Tensor

from omnimem.lazy import Once
from omnimem.scoring.base import AbstractScorer
from omnimem.scoring.topk import highest
from omnimem.sketches import ROUNDING, Codes, enlarged, rough, unrounded, vectors
from omnimem.tokens import EVICTABLE, Counts, Modality
from omnimem.view import FLOOR, Contest, LayerView

BLOCK = 1024  # tokens compared with all better ones at a time
ROWS = 128  # the same on a CPU, where less is compared in vain and a block should fit into the cache
LOW_ROWS = 256  # the same in bfloat16, whose products are fast, so that fewer, larger calls pay
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

    @property
    def needs_place(self) -> bool:
        """Same as the inner score."""
        return self.inner.needs_place

    def __call__(self, view: LayerView) -> Float[Tensor, "batch tokens"]:
        scores, learns = self.inner(view), view.gradient != "none"
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            pool = view.pool
            held = pool.values.transpose(1, 2).flatten(2) if self.compared == "values" else pool.feature
            keys = pool.keys
            product = torch.bfloat16 if rough(view.codes, keys.dtype, keys.device) else keys.dtype
            how = {"centred": self.centred, "product": product, "codes": view.codes}
            if learns:
                alone = uncovered(held, view.modality, scores, once=view.once, **how)
            else:
                find = partial(self._values, view, held, scores, **how)
                alone = find() if view.once is None else view.once("uncovered", find)
            return scores * self._factor(alone)

    def _values(self, view: LayerView, held: Tensor, scores: Tensor, **how: Any) -> Float[Tensor, "batch tokens"]:
        """1 - c_k without gradient, at least of all tokens that may be kept."""
        if view.contests and self.above > -1 and scores.device.type in COUNTED:
            return uncovered_contested(held, view.modality, scores, view.contests, self._factor, **how)
        return uncovered_values(held, view.modality, scores, view.pool.counts, **how)

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
    codes: Codes | None = None,
    once: Once | None = None,
) -> Float[Tensor, "batch tokens"]:
    """1 - c_k, clamped to >= 1e-6; 1 for text, which is never evicted.

    The nearest better token is found without gradient, in the precision of `product` (None: of the feature; bfloat16
    resolves cosines to 0.004); the cosine to it is float32 or more, but of codes of 2 bits, which resolve less, as
    precise as `product`, and has gradient to both tokens. `codes` are the bits of the codes that `feature` holds, if it
    does; with 2, it holds differences of directions from a reference, which have to be centred. With `once`, the
    nearest tokens are found once where this is computed again.
    """
    feature = vectors(feature, codes)
    exact = feature.to(torch.promote_types(feature.dtype, torch.float32))
    unit = exact if codes == 2 else exact * (1 / _length(exact))  # rounded as evaluation does, here and below
    found = torch.ones_like(scores)
    for kind in EVICTABLE:
        member = kind.mask(modality)
        sizes = member.sum(dim=1, keepdim=True)  # in one pool of both modalities streams may hold unequal numbers
        if (size := int(sizes.max())) == 0:
            continue
        order = highest(scores, member, size)  # members first
        there = torch.arange(size, device=order.device) < sizes
        ranked = _taken(unit, order)
        if centred:
            mean = (ranked * there[..., None]).sum(dim=1, keepdim=True) / sizes[..., None].clamp_min(1)
            ranked = _directions(ranked - mean, codes)
        find = partial(_nearest, ranked.detach().to(product or feature.dtype))
        best, near = find() if once is None else once(f"nearest {kind.name}", find)
        cosine = (ranked * _taken(ranked, near)).sum(-1)
        if codes == 2:  # the value as evaluation has it
            cosine = cosine + (best.to(cosine.dtype) - cosine.detach())
        cosine = torch.cat([torch.full_like(cosine[:, :1], ALONE), cosine[:, 1:]], dim=1)
        alone = _apart(cosine, codes).to(found.dtype)
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
    codes: Codes | None = None,
) -> Float[Tensor, "batch tokens"]:
    """The values of `uncovered`, up to rounding, in a third of its time: for scores that do not learn.

    Every block of tokens is gathered, normalised and compared while it is in the cache; nothing else is copied. Nothing
    is asked of the device where `counts` are known; those of each modality are not after both have competed for the
    same slots: audio and visual tokens are then compared in one go, each with its own kind.
    """
    found = torch.ones_like(scores)
    for row, kinds in enumerate(modality):
        order, sizes = _ranked(scores[row], kinds, counts)
        ranking = Ranking(feature[row], order, sizes or kinds[order], centred, product, codes)
        for number, size in enumerate(sizes or (len(order),)):
            ranking.compare(number, size)
        found[row].index_copy_(0, order, _apart(ranking.cosines, codes).to(found.dtype))
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
    codes: Codes | None = None,
) -> Float[Tensor, "batch tokens"]:
    """The values of `uncovered`, up to rounding, of all tokens that hard selection may keep; 1 of all others.

    A discount `factor(1 - c)` depends on better tokens alone and is at most 1. So once as many tokens as are kept score
    more than the next one in order of scores, it and all after it are evicted, and are not compared. For devices that
    answer at no cost (`COUNTED`).
    """
    found = torch.ones_like(scores)
    for row, kinds in enumerate(modality):
        for member, kept in contests:
            # 1. the ranking of all that compete, and the places in it of each modality
            size = int(member[row].sum())
            if kept in (0, size):
                continue
            ranked = highest(scores[row : row + 1], member[row : row + 1], size)[0]
            places = [kind.mask(kinds[ranked]).nonzero()[:, 0] for kind in EVICTABLE]
            order = ranked[torch.cat(places)]
            ranking = Ranking(feature[row], order, tuple(map(len, places)), centred, product, codes)
            plain, first = scores[row, order], kept
            # 2. compare the first ones, then further ones until all that could be kept are among them
            while True:
                for number, each in enumerate(places):
                    ranking.compare(number, int(torch.searchsorted(each, first)))
                alone = _apart(ranking.cosines, codes).to(plain.dtype)  # 1 of what is not compared
                if first == size:
                    break
                ahead = int((plain * factor(alone) > scores[row, ranked[first]]).sum())
                if ahead >= kept:
                    break
                first = min(size, first + max(STEP, kept - ahead))
            found[row, order] = alone
    return found


def _ranked(
    scores: Float[Tensor, " tokens"], modality: Int8[Tensor, " tokens"], counts: Counts | None
) -> tuple[Int[Tensor, " members"], tuple[int, ...] | None]:
    """Audio tokens, then visual tokens, each best first, and how many of each; None: only the device knows."""
    if counts is not None and counts.audio is None and scores.device.type not in COUNTED:
        order = highest(scores[None], modality[None] > 0, counts.media)[0]
        return order[modality[order].argsort(stable=True)], None
    orders = []
    for kind in EVICTABLE:
        member = kind.mask(modality)
        if counts is None or counts.audio is None:
            size = int(member.sum())
        else:
            size = counts.audio if kind == Modality.AUDIO else counts.media - counts.audio
        orders.append(highest(scores[None], member[None], size)[0])
    return torch.cat(orders), tuple(map(len, orders))


@final
class Ranking:
    """Tokens in falling order of scores, one modality after the other, compared with those of their own before them.

    `kinds` is how many there are of each modality; or, where only the device knows, the modality of each: then all are
    compared at once. `product` is the precision in which the nearest is found (None: that of the feature); the cosine
    to it is float32 or more, but of codes of 2 bits, which resolve less, as precise as `product`.
    """

    def __init__(
        self,
        feature: Shaped[Tensor, "tokens stored"],
        order: Int[Tensor, " members"],
        kinds: tuple[int, ...] | Int8[Tensor, " members"],
        centred: bool,
        product: torch.dtype | None,
        codes: Codes | None,
    ) -> None:
        # 1. directions, from the mean of each modality
        ranked = vectors(feature.index_select(0, order), codes)
        product = product or ranked.dtype
        ranked = ranked.to(torch.promote_types(ranked.dtype, torch.float32))
        self.codes, self.kind = codes, None if isinstance(kinds, tuple) else kinds
        sizes = kinds if isinstance(kinds, tuple) else (len(order),)
        if codes != 2:
            _normalized(ranked)
        if centred:
            self._centre(ranked, sizes)
            length = _normalized(ranked)
            if codes == 4:
                ranked.mul_(_grown(length))
        # 2. what is compared, and how far it was: of each modality
        self.ranked, self.low = ranked.split(sizes), ranked.to(product).split(sizes)
        self.cosines = ranked.new_zeros(len(order))  # the largest to one before, or `ALONE`; 0 of what is not compared
        self.parts, self.done = self.cosines.split(sizes), [0] * len(sizes)
        # 3. room for the cosines of a block; minus infinity where a member (column) is not before another one (row)
        rows = BLOCK if feature.device.type != "cpu" else ROWS if product.itemsize > 2 else LOW_ROWS
        self.side = max(1, min(rows, max(sizes)))
        self.room = ranked.new_empty(self.side * max(sizes), dtype=product)
        fast = codes == 2 and product == torch.bfloat16 and feature.device.type == "cpu"
        self.by_bits = fast and self.kind is None
        square = (0 if self.by_bits else self.side,) * 2
        self.later = torch.full(square, float("-inf"), dtype=product, device=feature.device).triu()

    def _centre(self, ranked: Float[Tensor, "members feature"], sizes: tuple[int, ...]) -> None:
        """Take the mean of each modality off its members."""
        with torch.autocast(ranked.device.type, enabled=False):
            if self.kind is None:
                for part in ranked.split(sizes):
                    part.sub_(part.sum(dim=0).div_(max(1, len(part))))
                return
            visual = Modality.VISUAL.mask(self.kind).to(ranked.dtype)[:, None]
            share = torch.cat([1 - visual, visual], dim=1)
            mean = (share.mT @ ranked).div_(share.sum(dim=0)[:, None])  # NaN of a modality that nothing is of
            ranked.sub_(mean[Modality.VISUAL.mask(self.kind).long()])

    def compare(self, number: int, count: int) -> None:
        """Set `cosines` of the first `count` members of a modality; `count` does not fall from call to call."""
        cosines, done = self.parts[number], self.done[number]
        with torch.autocast(cosines.device.type, enabled=False):
            for first in range(done, count, self.side):
                self._compare(number, first, min(first + self.side, count))
        self.done[number] = count
        # the first of each modality has none before it
        if self.kind is None:
            if count and not done:
                cosines[0] = ALONE
            return
        first = torch.ones_like(cosines, dtype=torch.bool)
        first[1:] = self.kind[1:] != self.kind[:-1]
        cosines.masked_fill_(first, ALONE)

    def _compare(self, number: int, first: int, last: int) -> None:
        """Members `first` to `last` (exclusive) with all before; in low precision the cosine is computed again."""
        ranked, low, found = self.ranked[number], self.low[number], self.parts[number][first:last]
        room = self.room[: (last - first) * last].view(last - first, last)
        alike = torch.mm(low[first:last], low[:last].mT, out=room)
        if self.by_bits:
            found.copy_(_largest_before(alike, first))
            return
        alike[:, first:].add_(self.later[: last - first, : last - first])
        if self.kind is not None:
            alike.masked_fill_(self.kind[first:last, None] != self.kind[:last], float("-inf"))
        if low.dtype == ranked.dtype:
            torch.amax(alike, dim=-1, out=found)
        elif self.codes == 2:
            found.copy_(alike.amax(dim=-1))
        else:
            torch.sum(ranked[first:last] * ranked[alike.max(dim=-1).indices], dim=-1, out=found)


def _apart(cosine: Float[Tensor, "*shape"], codes: Codes | None) -> Float[Tensor, "*shape"]:
    """1 - c, clamped; of what the codes stand for."""
    apart = unrounded(1 - cosine) if codes == 2 else 1 - cosine
    return apart.clamp_min(FLOOR)


@cache
def _before_bits(side: int) -> Int16[Tensor, "side side"]:
    """The largest 16-bit number where a column is before a row, else the smallest."""
    limits = torch.iinfo(torch.int16)
    before = torch.ones(side, side, dtype=torch.bool, device="cpu").tril(-1)  # it outlives any default device
    return torch.where(before, limits.max, limits.min).to(torch.int16)


def _largest_before(alike: Float[Tensor, "rows columns"], first: int) -> Float[Tensor, " rows"]:
    """The largest of each row i among the columns before first + i; minus infinity where there is none.

    In bfloat16 on a CPU, an eighth of the time of amax: positive numbers are in the order of their bit patterns.
    Overwrites the rest of the columns.
    """
    rows, columns = alike.shape
    # 1. bit patterns; those of the rest become the smallest number of all, which is that of minus zero
    bits = alike.view(torch.int16)
    own = bits[:, first:]
    torch.minimum(own, _before_bits(max(rows, LOW_ROWS))[:rows, : columns - first], out=own)
    found = bits.amax(dim=-1)
    # 2. rows of negative numbers: those are in the reverse order
    below = found < 0
    found = found.view(alike.dtype)
    if not bool(below.any()):
        return found
    number = below.nonzero()
    later = torch.arange(columns, device=alike.device) >= first + number
    return found.index_put_((below,), alike[number[:, 0]].masked_fill(later, float("-inf")).amax(dim=-1))


def _normalized(vectors: Float[Tensor, "members feature"]) -> Float[Tensor, "members 1"]:
    """Divide them by their lengths, which are returned."""
    length = _length(vectors)
    vectors.mul_(1 / length)
    return length


def _length(vectors: Float[Tensor, "*axes feature"]) -> Float[Tensor, "*axes 1"]:
    """Their lengths, at least 1e-12."""
    return torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min(1e-12)


def _directions(
    apart: Float[Tensor, "batch members feature"], codes: Codes | None
) -> Float[Tensor, "batch members feature"]:
    """Differences from the mean, normalised; without gradient where they are close to 0 (silence, a still image).

    There the direction is noise, and its gradient grows with 1 / length.
    """
    length = _length(apart)
    unit, length = apart * (1 / length), length.detach()
    unit = unit * _grown(length) if codes == 4 else unit
    noise = NOISE * enlarged(apart.shape[-1]) if codes == 2 else NOISE
    return torch.where(length < noise, unit.detach(), unit)


def _grown(length: Float[Tensor, "*axes 1"]) -> Float[Tensor, "*axes 1"]:
    """1 / sqrt(1 - ROUNDING / length^2), at most 2: what a direction of this length loses to rounding to 4 bits."""
    return (1 - ROUNDING / length.square()).clamp_min_(0.25).rsqrt_()


def _taken(
    vectors: Float[Tensor, "batch members feature"], index: Int[Tensor, "batch taken"]
) -> Float[Tensor, "batch taken feature"]:
    """The vectors of these members; of one stream in a third of the time of `gather` and its backward on a CPU."""
    if len(vectors) == 1:
        return vectors[0].index_select(0, index[0])[None]
    return vectors.gather(1, index.long()[..., None].expand(-1, -1, vectors.shape[-1]))


def _nearest(
    ranked: Float[Tensor, "batch members feature"],
) -> tuple[Float[Tensor, "batch members"], Int32[Tensor, "batch members"]]:
    """`nearest_before` as it is held until backward."""
    best, near = nearest_before(ranked)
    return best, near.int()


@torch.no_grad()
def nearest_before(
    ranked: Float[Tensor, "batch members feature"],
) -> tuple[Float[Tensor, "batch members"], Int[Tensor, "batch members"]]:
    """For each member the largest cosine to one before it, and the index of that, the first if several.

    Minus infinity and 0 for the first member. Computed in blocks of rows, so that no members x members matrix exists.
    Autocast has no effect, so that training and evaluation select the same tokens.
    """
    count, best, near = ranked.shape[1], [], []
    step = min(BLOCK, ROWS) if ranked.device.type == "cpu" else BLOCK
    for first in range(0, count, step):
        last = min(first + step, count)
        alike = ranked.new_empty(len(ranked), last - first, last)
        with torch.autocast(ranked.device.type, enabled=False):
            for members, out in zip(ranked, alike, strict=True):  # of bfloat16 on a CPU in half the time of one call
                torch.mm(members[first:last], members[:last].mT, out=out)
        later = torch.ones(last - first, last - first, dtype=torch.bool, device=ranked.device).triu()
        alike[..., first:].masked_fill_(later, float("-inf"))
        found = alike.max(dim=-1)  # the first as argmax, which takes three times as long on a CPU
        best.append(found.values)
        near.append(found.indices)
    return torch.cat(best, dim=1), torch.cat(near, dim=1)
