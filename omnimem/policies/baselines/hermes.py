"""HERMES: recency in shallow layers, attention of probe texts in deep ones (arXiv 2601.14724)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from omnimem.attention.probed import probabilities
from omnimem.budget import Budget
from omnimem.policies.base import JointPolicy, ProbePrompt, Traits, keep_highest
from omnimem.policies.baselines.merging import Merge, merged, with_merged
from omnimem.policies.baselines.presets import allotted, part, settings
from omnimem.policies.baselines.ranked import newest
from omnimem.selection import LayerSlots, Softness, select
from omnimem.selection.layer_slots import groups
from omnimem.tokens import Modality, Tokens
from omnimem.view import LayerView

LOCAL = (
    "Describe the current scene in detail, focusing on specific objects, fine-grained actions, and spatial "
    "relationships."
)
GLOBAL = (
    "Summarize the video narrative, identifying main characters, key events, timeline changes, and the overall theme."
)
PRESETS: dict[str, dict[str, Any]] = {
    "as_published": {
        "local": LOCAL,
        "overall": GLOBAL,
        "shallow": 0.1,
        "deep": 0.3,
        "decay": (20.0, 8.0),
        "recency": (0.75, 0.15),
        "smoothing": (0.1, 0.3, 0.4),
        "recursive": False,
        "summary": True,
        "proxy_forward": "true",
        "reindex": False,
    },
    "as_released": {"recursive": True, "proxy_forward": "raw_embed"},
    "january": {"recursive": True, "proxy_forward": "raw_embed", "decay": (20.0, 0.5), "recency": (1.0, 0.1)},
}
EMPTY = 1e-9  # ranges below it count as 0


@final
@dataclass(frozen=True, kw_only=True)
class Bands:
    """Bands of layers: shallow, middle, deep; at least one layer is shallow and one is deep."""

    layers: int
    shallow: int
    deep: int  # number of layers

    @classmethod
    def of(cls, layers: int, shallow: float, deep: float) -> "Bands":
        """Bands from fractions of the depth, rounded."""
        below = min(max(1, round(shallow * layers)), layers - 1)
        return cls(layers=layers, shallow=below, deep=min(max(1, round(deep * layers)), layers - below))

    def place(self, layer: int) -> tuple[int, float]:
        """Band (0 shallow, 1 middle, 2 deep) and depth within it, from 0 to 1."""
        first_deep = self.layers - self.deep
        if layer < self.shallow:
            return 0, 0.0
        if layer >= first_deep:
            return 2, 1.0
        return 1, (layer - self.shallow) / max(1, first_deep - 1 - self.shallow)


@final
@dataclass(frozen=True, kw_only=True)
class HermesPolicy(JointPolicy):
    """With i the index among the T audio and visual tokens of a layer's pool and d = (T - 1 - i) / (T - 1):

    shallow  exp(-k d), k = decay[0]
    middle   (1 - w) A + w R, A the attention of the probe and R = exp(-k d), both scaled to 0 .. 1; w and k run from
             recency[0] and decay[0] to recency[1] and decay[1] over the band
    deep     the attention of the probe
    then, from the top down, S_l <- (1 - lambda) S_l + lambda S_{l+1}, index by index. Attention is the mean over heads
    and tokens of the probe of its softmax over the pool and its own tokens. Deep layers keep one token
    less, and the mean of the evicted ones: their keys are rotated to the position after the last kept token first.
    """

    local: str
    overall: str
    shallow: float
    deep: float
    decay: tuple[float, float]
    recency: tuple[float, float]
    smoothing: tuple[float, float, float]
    recursive: bool
    summary: bool
    proxy_forward: Literal["true", "raw_embed"]
    reindex: bool = False  # after every chunk the kept tokens move up to contiguous times

    @property
    def traits(self) -> Traits:
        """Probes: both texts for the middle layers, the second for the deep ones. Summaries merge evicted tokens."""
        texts = () if self.budget is None else (f"{self.local}; {self.overall}", self.overall)
        probes = tuple(ProbePrompt(text=text, full_pass=self.proxy_forward == "true") for text in texts)
        return Traits(probes=probes, merges=self.summary, reindex=self.reindex)

    def select_joint(self, views: list[LayerView], softness: Softness | None = None) -> list[Tokens]:
        """The memory of every layer; selection is hard in training too, kept tokens have gradient."""
        assert self.budget is not None, "joint selection needs a budget"
        bands = Bands.of(len(views), self.shallow, self.deep)
        with torch.no_grad():
            scores = self._smoothed([self._score(view, *bands.place(layer)) for layer, view in enumerate(views)], bands)
        kept = []
        for layer, row in enumerate(scores):
            slots, view = self.layer_slots(layer), views.pop(0)
            assert slots is not None
            summed_up = self.summary and bands.place(layer)[0] == 2
            kept.append(_kept(view, _of_tokens(row, view.modality > 0), slots, summed_up))
            del view  # before the next layer copies what it keeps
        return kept

    def _score(self, view: LayerView, band: int, depth: float) -> Float[Tensor, "batch places"]:
        """Scores of the audio and visual tokens alone, in order."""
        member = view.modality > 0
        places = int(member[0].sum())
        age = torch.linspace(1, 0, places, device=member.device)
        age = age if places > 1 else torch.zeros_like(age)
        decay = self.decay[0] + depth * (self.decay[1] - self.decay[0])
        recency = torch.exp(-decay * age).expand(member.shape[0], -1)
        if band == 0:
            return recency
        attention = _members(self._attention(view, band - 1), member)
        if band == 2:
            return attention
        share = self.recency[0] + depth * (self.recency[1] - self.recency[0])
        return (1 - share) * _scaled(attention) + share * _scaled(recency)

    def _attention(self, view: LayerView, probe: int) -> Float[Tensor, "batch tokens"]:
        """Attention of one probe; its own tokens take part in the softmax, causally if it passes the layers."""
        asked, pool = view.probes[probe], view.pool
        count = asked.queries.shape[2]
        own = torch.ones(count, count, dtype=torch.bool, device=pool.keys.device)
        own = own.tril() if self.proxy_forward == "true" else own
        seen = torch.cat([own.new_ones(count, pool.count), own], dim=1)[None]
        weights = probabilities(
            asked.queries,
            torch.cat([pool.keys, asked.keys], dim=2),
            seen,
            scale=view.scale,
            gate=F.pad(pool.gate, (0, count)),
        )
        return weights[..., : pool.count].mean(dim=(1, 2))

    def _smoothed(self, scores: Sequence[Tensor], bands: Bands) -> list[Float[Tensor, "batch places"]]:
        """Each layer's scores mixed with those of the layer above."""
        result = list(scores)
        for layer in reversed(range(len(scores) - 1)):
            above = result[layer + 1] if self.recursive else scores[layer + 1]
            weight = self.smoothing[bands.place(layer)[0]]
            result[layer] = (1 - weight) * scores[layer] + weight * _stretched(above, scores[layer].shape[1])
        return result


def _kept(view: LayerView, scores: Float[Tensor, "batch tokens"], slots: LayerSlots, summed_up: bool) -> Tokens:
    """The highest scores, and with `summed_up` one token for the evicted ones."""
    contested = any(group.contested for group in groups(view.modality, slots))
    if not (summed_up and contested):
        return keep_highest(view.pool, scores, slots)
    fewer = replace(slots, visual=slots.visual - 1) if slots.visual else replace(slots, audio=slots.audio - 1)
    index = select(scores, view.modality, fewer).index
    stays = torch.zeros_like(view.modality, dtype=torch.bool).scatter(1, index, True)
    return with_merged(view.pool.gather(index), _summary(view, stays))


def _summary(view: LayerView, stays: Bool[Tensor, "batch tokens"]) -> Tokens:
    """One visual token for the evicted visual tokens, or for the audio tokens where no visual one is evicted."""
    evicted = ~stays & (view.modality > 0)
    visual = evicted & (view.modality == Modality.VISUAL)
    sources = torch.where(visual.any(dim=1, keepdim=True), visual, evicted)
    last = newest(_preferred(stays, view.modality), 1).to(torch.int8).argmax(dim=1, keepdim=True)
    target = view.pool.positions.gather(2, last[:, None].expand(-1, 3, -1))
    after = target + torch.tensor([1, 0, 0], device=target.device)[None, :, None]
    weights = sources / sources.sum(dim=1, keepdim=True)
    merge = Merge(weights=weights[:, None], positions=after, order=view.order.gather(1, last))
    return merged(view, merge, Modality.VISUAL)


def _preferred(stays: Tensor, kinds: Tensor) -> Bool[Tensor, "batch tokens"]:
    """Kept visual tokens; kept audio if there are none; kept text if there is neither."""
    of_kinds = [stays & (kinds == kind) for kind in (Modality.VISUAL, Modality.AUDIO)]
    rest = torch.where(of_kinds[1].any(dim=1, keepdim=True), of_kinds[1], stays)
    return torch.where(of_kinds[0].any(dim=1, keepdim=True), of_kinds[0], rest)


def _members(values: Float[Tensor, "batch tokens"], member: Tensor) -> Float[Tensor, "batch places"]:
    """The values of the members, in order; every row has the same number."""
    front = (~member).to(torch.int8).argsort(dim=1, stable=True)
    return values.gather(1, front)[:, : int(member[0].sum())]


def _of_tokens(values: Float[Tensor, "batch places"], member: Tensor) -> Float[Tensor, "batch tokens"]:
    """The inverse of `_members`; 0 for others."""
    front = (~member).to(torch.int8).argsort(dim=1, stable=True)
    return torch.zeros(member.shape, device=values.device).scatter(1, front[:, : values.shape[1]], values)


def _scaled(values: Float[Tensor, "batch places"]) -> Float[Tensor, "batch places"]:
    """From 0, the least, to 1, the most of each row."""
    if not values.shape[1]:
        return values
    low, high = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
    return (values - low) / (high - low).clamp_min(EMPTY)


def _stretched(values: Float[Tensor, "batch above"], places: int) -> Float[Tensor, "batch places"]:
    """The values at `places` points, by linear interpolation with aligned ends."""
    if values.shape[1] in (0, places) or places == 0:
        return values if values.shape[1] == places else values.new_zeros(len(values), places)
    return F.interpolate(values[:, None], size=places, mode="linear", align_corners=True)[:, 0]


@final
@dataclass(frozen=True, kw_only=True)
class HermesOptions:
    """Scores depend on fixed texts, not on questions: asking does not change the memory.

    as_published  recency weight 0.75 to 0.15 over the middle layers, smoothing with the raw scores of the layer above,
                  probes read through all layers (`proxy_forward: true`)
    as_released   smoothing with the smoothed scores of the layer above, and probes that every layer projects from
                  their raw embeddings, as the score path of the release does
    january       the earlier file: k to 0.5 and weight 1 to 0.1 over the middle layers
    shared_split  as published, each modality in its own slots; layers of unequal length are smoothed by interpolation
    Choices where the source says nothing: k of the paper (20 to 8 as in the later file; distance normalised as in every
    file); bands of a few layers (at least one shallow and one deep); the scale of deep scores (plain attention); audio
    (like visual tokens; a summary averages visual tokens if some are evicted, and is one step after the last kept
    visual token, in its row and column); positions (original; `reindex` is the eager form, which moves kept tokens up
    after every chunk, `stream.positions: compact` the lazy one; times are ranks over both modalities, and all layers
    end at one position, so that the next chunk is the same for all; rows and columns stay, as cells of a frame).
    """

    name: Literal["hermes"] = "hermes"
    preset: Literal["as_published", "as_released", "january", "shared_split"] = "as_published"
    local: str | None = None  # the text about the present, with `overall` in the middle layers
    overall: str | None = None  # the text about the whole video, alone in the deep layers
    shallow: float | None = None  # fraction of the layers
    deep: float | None = None  # fraction of the layers
    decay: tuple[float, float] | None = None  # k at both ends of the middle layers
    recency: tuple[float, float] | None = None  # its weight there
    smoothing: tuple[float, float, float] | None = None  # lambda of shallow, middle and deep layers
    recursive: bool | None = None  # with the smoothed scores of the layer above
    summary: bool | None = None  # a summary token of what is evicted
    proxy_forward: Literal["true", "raw_embed"] | None = None  # probe texts pass the layers, or are embeddings alone
    reindex: bool | None = None  # contiguous positions after every chunk

    def __post_init__(self) -> None:
        for name in ("shallow", "deep"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"policy.{name} = {value:g} must be between 0 and 1")
        for name in ("recency", "smoothing"):
            if any(not 0 <= value <= 1 for value in getattr(self, name) or ()):
                raise ValueError(f"policy.{name} = {list(getattr(self, name))} must be between 0 and 1")

    def build(self, budget: Budget | None) -> HermesPolicy:
        """The policy at a budget; None: full memory."""
        return part(HermesPolicy, {**settings(self, PRESETS), "budget": allotted(budget, self.preset)})
