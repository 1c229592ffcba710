"""Discount of tokens that resemble a token of higher score (ours)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor
from torch.nn import functional as F

from omnimem.scoring.base import AbstractScorer
from omnimem.scoring.topk import highest
from omnimem.tokens import EVICTABLE, Counts, Modality
from omnimem.view import FLOOR, LayerView

BLOCK = 1024  # tokens compared with all better ones at a time
ROWS = 256  # the same on a CPU, where less is compared in vain and a block should fit into the cache
NOISE = 0.05  # length of the difference from the mean below which its direction has no gradient
ALONE = -1.0  # c of the best token, which has no better one
COUNTED = ("cpu",)  # devices that are asked how many tokens of a modality there are: an answer costs nothing there

Compared = Literal["inputs", "values"]


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
    compared: Compared = "inputs"  # the layer's input, as for redundancy; or the values of a row's heads

    @property
    def needs_importance(self) -> bool:
        """Same as the inner score."""
        return self.inner.needs_importance

    @property
    def needs_novelty(self) -> bool:
        """If layer inputs are compared, or same as the inner score."""
        return self.compared == "inputs" or self.inner.needs_novelty

    def __call__(self, view: LayerView) -> Float[Tensor, "batch tokens"]:
        scores, learns = self.inner(view), view.gradient != "none"
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            held = view.pool.values.transpose(1, 2).flatten(2) if self.compared == "values" else view.pool.feature
            if learns:
                alone = uncovered(held, view.modality, scores, centred=self.centred)
            else:
                alone = uncovered_values(held, view.modality, scores, view.pool.counts, centred=self.centred)
            if self.above > -1:
                alone = (alone / (1 - self.above)).clamp(max=1)
            return scores * alone**self.power


def uncovered(
    feature: Float[Tensor, "batch tokens feature"],
    modality: Int8[Tensor, "batch tokens"],
    scores: Float[Tensor, "batch tokens"],
    *,
    centred: bool = True,
) -> Float[Tensor, "batch tokens"]:
    """1 - c_k, clamped to >= 1e-6; 1 for text, which is never evicted.

    The nearest better token is found without gradient, in the precision of the feature (bfloat16 resolves cosines to
    0.004); the cosine to it is float32 or more and has gradient to both tokens.
    """
    unit = F.normalize(feature.to(torch.promote_types(feature.dtype, torch.float32)), dim=-1, eps=1e-12)
    found = torch.ones_like(scores)
    for kind in EVICTABLE:
        member = modality == kind
        sizes = member.sum(dim=1, keepdim=True)  # in one pool of both modalities streams may hold unequal numbers
        if (size := int(sizes.max())) == 0:
            continue
        order = highest(scores, member, size)  # members first
        there = torch.arange(size, device=order.device) < sizes
        ranked = unit.gather(1, order[..., None].expand(-1, -1, unit.shape[-1]))
        if centred:
            mean = (ranked * there[..., None]).sum(dim=1, keepdim=True) / sizes[..., None].clamp_min(1)
            ranked = _directions(ranked - mean)
        near = nearest_before(ranked.detach().to(feature.dtype))
        cosine = (ranked * ranked.gather(1, near[..., None].expand_as(ranked))).sum(-1)
        cosine = torch.cat([torch.full_like(cosine[:, :1], ALONE), cosine[:, 1:]], dim=1)
        alone = (1 - cosine).clamp_min(FLOOR).to(found.dtype)
        found = found.scatter(1, order, torch.where(there, alone, found.gather(1, order)))
    return found


@torch.no_grad()
def uncovered_values(
    feature: Float[Tensor, "batch tokens feature"],
    modality: Int8[Tensor, "batch tokens"],
    scores: Float[Tensor, "batch tokens"],
    counts: Counts | None = None,
    *,
    centred: bool = True,
) -> Float[Tensor, "batch tokens"]:
    """The values of `uncovered`, up to rounding, in a third of its time: for scores that do not learn.

    Every block of tokens is gathered, normalised and compared while it is in the cache; nothing else is copied. Nothing
    is asked of the device where `counts` are known; those of each modality are not after both have competed for the
    same slots: audio and visual tokens are then compared in one go, each with its own kind.
    """
    found = torch.ones_like(scores)
    for row, kinds in enumerate(modality):
        for order, kind in _rankings(scores[row], kinds, counts):
            cosine = _best_cosines(feature[row], order, kind, centred)
            found[row].index_copy_(0, order, (1 - cosine).clamp_min_(FLOOR).to(found.dtype))
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
        member = modality == kind
        if counts is None or counts.audio is None:
            size = int(member.sum())
        else:
            size = counts.audio if kind == Modality.AUDIO else counts.media - counts.audio
        if size:
            yield highest(scores[None], member[None], size)[0], None


def _best_cosines(
    feature: Float[Tensor, "tokens feature"],
    order: Int[Tensor, " members"],
    kind: Int8[Tensor, " members"] | None,
    centred: bool,
) -> Float[Tensor, " members"]:
    """The largest cosine of each member, in falling order of scores, to one of its kind before it, or `ALONE`."""
    # 1. lengths, and the mean direction of the members
    exact, size = torch.promote_types(feature.dtype, torch.float32), len(order)
    group = None if kind is None else (kind == Modality.VISUAL).to(exact)[:, None]
    lengths = torch.linalg.vector_norm(feature, dim=-1, dtype=exact)[order].clamp_min_(1e-12)[:, None]
    step = min(BLOCK, ROWS) if feature.device.type == "cpu" else BLOCK
    ranked, best = feature.new_empty(size, feature.shape[1], dtype=exact), feature.new_empty(size, dtype=exact)
    mean: Tensor | None = None
    with torch.autocast(feature.device.type, enabled=False):
        if centred:
            share = torch.ones_like(lengths) if group is None else torch.cat([1 - group, group], dim=1)
            weights = share.new_zeros(len(feature), share.shape[1]).index_copy_(0, order, share / lengths)
            mean = (weights.mT @ feature.to(exact)).div_(share.sum(dim=0)[:, None].clamp_min_(1))
        later = torch.ones(step, step, dtype=torch.bool, device=feature.device).triu()
        for first in range(0, size, step):
            last = min(first + step, size)
            # 2. directions of a block
            rows = torch.div(feature.index_select(0, order[first:last]), lengths[first:last], out=ranked[first:last])
            if mean is not None:
                rows.sub_(mean if kind is None else mean[(kind[first:last] == Modality.VISUAL).long()])
                rows.div_(torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min_(1e-12))
            # 3. their cosines to all better members; in low precision the nearest is found, its cosine computed again
            before = ranked[:last]
            alike = rows.to(feature.dtype) @ before.to(feature.dtype).mT
            alike[:, first:].masked_fill_(later[: last - first, : last - first], float("-inf"))
            if kind is not None:
                alike.masked_fill_(kind[first:last, None] != kind[:last], float("-inf"))
            if feature.dtype == exact:
                torch.amax(alike, dim=-1, out=best[first:last])
            else:
                torch.sum(rows * before[alike.max(dim=-1).indices], dim=-1, out=best[first:last])
    # 4. the first of each kind has none before it
    if kind is None:
        best[:1] = ALONE
        return best
    first = torch.ones_like(best, dtype=torch.bool)
    first[1:] = kind[1:] != kind[:-1]
    return best.masked_fill_(first, ALONE)


def _directions(apart: Float[Tensor, "batch members feature"]) -> Float[Tensor, "batch members feature"]:
    """Differences from the mean, normalised; without gradient where they are close to 0 (silence, a still image).

    There the direction is noise, and its gradient grows with 1 / length.
    """
    unit = F.normalize(apart, dim=-1, eps=1e-12)
    return torch.where(apart.detach().norm(dim=-1, keepdim=True) < NOISE, unit.detach(), unit)


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
