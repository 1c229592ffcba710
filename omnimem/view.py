"""LayerView: everything a scorer may use of a layer after a chunk. There is no field for the question."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor
from torch.nn import functional as F

from omnimem.attention import blocked
from omnimem.lazy import Once, lazy_property
from omnimem.positions import Rotary
from omnimem.sketches import Bits, Codes
from omnimem.tokens import ABSENT, Tokens

ScoreGradient = Literal["redundancy", "both", "none"]

# clamps novelty and importance: exact duplicates give a negative 1 - s, powers below 1 a gradient of infinity
FLOOR = 1e-6
ROWS = 128  # tokens normalised at a time on a CPU: they should fit into its cache


@final
@dataclass(frozen=True, kw_only=True)
class Measures:
    """How importance and redundancy are measured (docs/paper.md, "Scores" and "Neighbours and edges")."""

    heads: blocked.HeadMean = "probabilities"  # mean over heads of the probabilities, or of the logits (release)
    carry: Literal["sum", "halve"] = "sum"  # across chunks: old + new, or (old + new) / 2 (release)
    neighbours: Literal["pool", "arrival"] = "pool"  # measured again in the pool at every eviction, or once at arrival
    of: Literal["sequence", "modality"] = "sequence"  # the neighbour in list order, or the nearest of the same modality
    ends: Literal["present", "one"] = "present"  # a missing neighbour is left out, or counts as cosine 1 (release)
    feature: int | None = None  # width of the random projection that redundancy is measured on; None: the exact input
    # bits per number where redundancy, judged at arrival, reads the exact input; the projection is then orthonormal and
    # only coverage compares it
    sketch: Bits | Literal[False] = False
    # s: attention is measured from every s-th query of a chunk (`blocked.Every`), times s; not in the repr, which
    # identifies results: those of s = 1 are what they were without it
    query_stride: int = field(default=1, repr=False)


class Contest(NamedTuple):
    """Tokens that compete for the same slots, and how many of each stream stay."""

    member: Bool[Tensor, "batch tokens"]
    kept: int


@final
@dataclass(frozen=True, kw_only=True)
class Probed:
    """Queries and keys of a probe in one layer, at positions after the chunk, after RoPE."""

    queries: Float[Tensor, "batch heads probe dim"]
    keys: Float[Tensor, "batch kv_heads probe dim"]


@final
@dataclass(frozen=True, kw_only=True)
class LayerView:
    """The pool [memory ; chunk] of one layer, with attention mass and redundancy computed on demand.

    importance, redundancy and novelty are float32 (float64 of a float64 model) and clamped to >= 1e-6.
    """

    pool: Tokens  # memory followed by the chunk; importance and novelty of the chunk are still 0
    new: int  # tokens of the chunk, the last ones of the pool
    queries: Float[Tensor, "batch heads queries dim"]  # of the chunk, after RoPE
    scale: float
    measures: Measures
    gradient: ScoreGradient = "redundancy"  # which part of the score has gradient, if gradients are enabled
    rotary: Rotary | None = None  # of the model; None without a model
    every: blocked.Every = blocked.ALL  # the queries of `mass`, as `measures.query_stride` wants them
    probes: tuple[Probed, ...] = ()  # in the order of the policy's probe prompts
    measured: Float[Tensor, "batch tokens"] | None = None  # `mass`, where attention itself gave it
    heads: int = 1  # rows per stream: key-value heads that keep tokens of their own are rows
    arrived: Float[Tensor, "batch new width"] | None = None  # layer inputs of the chunk, where `sketch` needs them
    contests: tuple[
        Contest, ...
    ] = ()  # where selection is hard: scores of tokens that are surely evicted may be higher
    padded: bool = False  # some rows may hold padding, which is no neighbour
    once: Once | None = None  # of the layer, where it is computed again in backward
    settles: bool = False  # kept tokens that are ABSENT and last are cut off after the pass, in all layers at once

    @property
    def modality(self) -> Int8[Tensor, "batch tokens"]:
        """Modality of each token of the pool."""
        return self.pool.modality

    @property
    def order(self) -> Int[Tensor, "batch tokens"]:
        """Arrival number of each token of the pool."""
        return self.pool.order

    @property
    def codes(self) -> Codes | None:
        """Bits of the codes that the carried vectors are; None: of 16 bits, or, in a narrow model, its inputs."""
        measures, arrived = self.measures, self.arrived
        if arrived is None or measures.feature is None or arrived.shape[-1] <= measures.feature:
            return None
        return measures.sketch if measures.sketch in (2, 4) else None

    @lazy_property
    def mass(self) -> Float[Tensor, "batch tokens"]:
        """Attention received from the chunk's queries (sum over queries, mean over heads), or the estimate of it."""
        if self.measured is not None:
            return self.measured
        if torch.is_grad_enabled() and self.gradient == "both":
            return self._mass()
        with torch.no_grad():
            return self._mass() if self.once is None else self.once("mass", self._mass)

    def _mass(self) -> Float[Tensor, "batch tokens"]:
        return blocked.mass(
            self.queries,
            self.pool.keys,
            scale=self.scale,
            gate=self.pool.gate,
            heads=self.measures.heads,
            every=self.every,
        )

    @lazy_property
    def importance(self) -> Float[Tensor, "batch tokens"]:
        """a_k over all chunks so far: the carried value of a memory token combined with the new mass."""
        old = self.pool.importance
        if self.measures.carry == "sum":
            total = old + self.mass
        else:
            kept = old.shape[1] - self.new
            total = torch.cat([(old[:, :kept] + self.mass[:, :kept]) / 2, self.mass[:, kept:]], dim=1)
        return total.clamp_min(FLOOR)

    @lazy_property
    def novelty(self) -> Float[Tensor, "batch tokens"]:
        """1 - s_k, with s_k the mean cosine to the two neighbours (paper eq. 9)."""
        kept = 0 if self.measures.neighbours == "pool" else self.pool.count - self.new  # kept tokens keep their value
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.gradient != "none"):
            read = self.pool.feature[:, kept:] if self.arrived is None else self.arrived
            fresh = 1 - similarity(read, self.modality[:, kept:], self.measures, padded=self.padded)
            return torch.cat([self.pool.novelty[:, :kept], fresh.clamp_min(FLOOR)], dim=1)


def similarity(
    feature: Float[Tensor, "batch tokens feature"],
    modality: Int8[Tensor, "batch tokens"],
    measures: Measures,
    *,
    padded: bool = False,
) -> Float[Tensor, "batch tokens"]:
    """s_k = (cos(k-1, k) + cos(k, k+1)) / 2 in float32 or more, in list order or among tokens of one modality.

    Where rows are `padded`, padding is a modality of its own in both cases.
    """
    if measures.of == "sequence":
        if not padded:
            return _neighbour_cosine(feature, None, measures.ends)
        modality = (modality != ABSENT).to(modality.dtype)
    grouped = modality.to(torch.long).argsort(dim=1, stable=True)
    sorted_feature = feature.gather(1, grouped[..., None].expand_as(feature))
    sorted_similarity = _neighbour_cosine(sorted_feature, modality.gather(1, grouped), measures.ends)
    return torch.zeros_like(sorted_similarity).scatter(1, grouped, sorted_similarity)


def _neighbour_cosine(
    feature: Tensor, kind: Tensor | None, ends: Literal["present", "one"]
) -> Float[Tensor, "batch tokens"]:
    """Mean cosine to the neighbour before and after; where `kind` is given, a neighbour of another kind is missing."""
    cosine = _adjacent(feature)
    there = torch.ones_like(cosine) if kind is None else (kind[:, :-1] == kind[:, 1:]).float()
    border = cosine.new_zeros(feature.shape[0], min(1, feature.shape[1]))
    total = torch.cat([border, cosine * there], 1) + torch.cat([cosine * there, border], 1)
    count = torch.cat([border, there], 1) + torch.cat([there, border], 1)
    if ends == "one":
        return (total + (2 - count)) / 2
    alone = count == 0  # no neighbour at all: not redundant
    return torch.where(alone, torch.zeros_like(total), total / count.clamp_min(1))


def _adjacent(feature: Float[Tensor, "batch tokens feature"]) -> Float[Tensor, "batch pairs"]:
    """Cosine of each token and the next one; without gradient on a CPU block by block, with the same bits."""
    exact, pairs = torch.promote_types(feature.dtype, torch.float32), max(0, feature.shape[1] - 1)
    whole = feature.device.type != "cpu" or (torch.is_grad_enabled() and feature.requires_grad)
    step = max(1, pairs if whole else ROWS)
    parts = []
    for first in range(0, max(1, pairs), step):
        unit = F.normalize(feature[:, first : first + step + 1].to(exact), dim=-1, eps=1e-12)
        parts.append((unit[:, :-1] * unit[:, 1:]).sum(-1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
