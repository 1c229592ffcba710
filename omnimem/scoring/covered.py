"""Discount of tokens that resemble a token of higher score (ours)."""

from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor
from torch.nn import functional as F

from omnimem.scoring.base import AbstractScorer
from omnimem.scoring.topk import highest
from omnimem.tokens import EVICTABLE
from omnimem.view import FLOOR, LayerView

BLOCK = 1024  # tokens compared with all better ones at a time
ROWS = 256  # the same on a CPU, where less is compared in vain
NOISE = 0.05  # length of the difference from the mean below which its direction has no gradient
ALONE = -1.0  # c of the best token, which has no better one

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
        scores = self.inner(view)
        with torch.set_grad_enabled(torch.is_grad_enabled() and view.gradient != "none"):
            held = view.pool.values.transpose(1, 2).flatten(2) if self.compared == "values" else view.pool.feature
            alone = uncovered(held, view.modality, scores, centred=self.centred)
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
        found.append(alike.argmax(dim=-1))
    return torch.cat(found, dim=1)
