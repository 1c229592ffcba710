"""StreamMem: keeps what the chat template's tokens attend to, and a prototype per frame (arXiv 2508.15717)."""

from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from omnimem.attention.probed import probabilities
from omnimem.budget import Budget
from omnimem.policies.base import Policy, Prefiltered, ProbePrompt, Traits, slots_of_layer
from omnimem.policies.baselines.merging import Merge, merged, with_merged
from omnimem.policies.baselines.presets import Preset, allotted, part, settings
from omnimem.policies.baselines.ranked import best, keep_marked, learning
from omnimem.selection import LayerSlots, Softness
from omnimem.selection.layer_slots import taken
from omnimem.tokens import ABSENT, EVICTABLE, Chunk, Modality, Tokens
from omnimem.view import LayerView

PRESETS: dict[str, dict[str, Any]] = {
    "as_published": {"frame_filter": True, "threshold": 0.95, "prototypes": True, "per_head": False}
}


@final
@dataclass(frozen=True, kw_only=True)
class StreamMemPolicy(Policy):
    """Importance of a token: softmax(q K / sqrt d) over the audio and visual keys of [memory ; chunk], mean over the
    tokens of the probe and over heads. The highest are kept. If some are evicted, every new frame also has a prototype,
    the sums of w K and w V over its tokens, w their importances, at the frame's centre.
    """

    frame_filter: bool
    threshold: float
    prototypes: bool
    per_head: bool = False  # every key-value head keeps tokens of its own

    @property
    def traits(self) -> Traits:
        """The probe is the end of the chat template; prototypes are averages; filtered streams have unequal lengths."""
        probes = () if self.budget is None else (ProbePrompt(text=None),)
        return Traits(
            per_head=self.per_head,
            ragged=self.frame_filter,
            merges=self.prototypes,
            probes=probes,
            needs_place=self.prototypes,
        )

    def prefilter(self, chunk: Chunk, order: Int[Tensor, "batch tokens"]) -> Prefiltered:
        """The chunk with similar consecutive frames averaged."""
        if not self.frame_filter or not bool((chunk.modality == Modality.VISUAL).any()):
            return Prefiltered(chunk=chunk, order=order)
        return filtered(chunk, order, self.threshold)

    def keep(self, layer: int, view: LayerView, softness: Softness | None = None) -> Tokens:
        """The layer's memory after the chunk in `view`; selection is hard in training too."""
        if self.budget is None:
            return view.pool
        slots, kinds = slots_of_layer(self.budget, layer), view.modality
        with learning(view, "attention"):
            importance = self._importance(view)
        frames = _new_frames(view) if self.prototypes else kinds.new_zeros(len(kinds), 0, view.pool.count).bool()
        stays, merging = kinds == Modality.TEXT, torch.zeros_like(kinds[:, 0], dtype=torch.long)
        for member, counts in _groups(kinds, slots):
            contested = member.sum(dim=1) > counts
            if slots.split and not bool((member & (kinds == Modality.VISUAL)).any()):
                spared = torch.zeros_like(counts)
            else:
                spared = torch.minimum(frames.any(dim=2).sum(dim=1), counts // 2) * contested
            stays = stays | best(importance, member, counts - spared)
            merging = merging + spared
        kept = keep_marked(view.pool, stays)
        return _with_prototypes(view, kept, importance, frames, merging) if int(merging.max()) else kept

    def _importance(self, view: LayerView) -> Float[Tensor, "batch tokens"]:
        """Attention of the probe to each audio or visual token, normalised over these."""
        queries = view.probes[0].queries
        seen = (view.modality > 0)[:, None]
        weights = probabilities(queries, view.pool.keys, seen, scale=view.scale, gate=view.pool.gate)
        return weights.mean(dim=(1, 2))


def _groups(kinds: Tensor, slots: LayerSlots) -> list[tuple[Bool[Tensor, "batch tokens"], Int[Tensor, " batch"]]]:
    """The groups that compete and how many of each are kept, row by row, as rows may have unequal numbers."""
    if not slots.split:
        member = kinds > 0
        return [(member, member.sum(dim=1).clamp_max(slots.audio + slots.visual))]
    rows = [taken({kind: int((row == kind).sum()) for kind in Modality}, slots) for row in kinds]
    counts = {kind: torch.tensor([row[kind] for row in rows], device=kinds.device) for kind in EVICTABLE}
    return [(kinds == kind, counts[kind]) for kind in EVICTABLE]


def _new_frames(view: LayerView) -> Bool[Tensor, "batch frames tokens"]:
    """The visual tokens of each frame of the chunk, the latest frame first; rows with fewer frames have empty ones."""
    fresh = view.modality == Modality.VISUAL
    fresh = fresh & (torch.arange(view.pool.count, device=fresh.device) >= view.pool.count - view.new)
    times = [row[mine].unique().flip(0) for row, mine in zip(view.pool.place[:, 0], fresh, strict=True)]
    most = max(len(row) for row in times)
    table = torch.stack([F.pad(row, (0, most - len(row)), value=-1) for row in times])
    return fresh[:, None] & (view.pool.place[:, None, 0] == table[:, :, None])


def _with_prototypes(
    view: LayerView, kept: Tokens, importance: Tensor, frames: Bool[Tensor, "batch frames tokens"], count: Tensor
) -> Tokens:
    """The kept tokens and a prototype of each of the latest `count` new frames of a row."""
    frames = frames[:, : int(count.max())]
    weights = importance.detach()[:, None] * frames
    even = frames / frames.sum(dim=2, keepdim=True).clamp_min(1)
    total = weights.sum(dim=2, keepdim=True)
    weights = torch.where(total > 0, weights / total.clamp_min(1e-30), even)
    inside = frames.long().argmax(dim=2)  # a token of the frame, for its time
    time = view.pool.positions[:, 0].gather(1, inside)
    centre = torch.stack([time, *(_middle(view.pool.positions[:, axis], frames) for axis in (1, 2))], dim=1)
    last = torch.where(frames, view.order[:, None], -1).amax(dim=2).clamp_min(0)
    new = merged(view, Merge(weights=weights, positions=centre, order=last), Modality.VISUAL)
    present = torch.arange(frames.shape[1], device=count.device) < count[:, None]
    both = with_merged(kept, new.masked(present))
    return keep_marked(both, both.modality != ABSENT)


def _middle(places: Int[Tensor, "batch tokens"], frames: Tensor) -> Int[Tensor, "batch frames"]:
    """The row or column in the middle of each frame."""
    spread = places[:, None].expand(frames.shape)
    low = torch.where(frames, spread, spread.amax()).amin(dim=2)
    high = torch.where(frames, spread, -1).amax(dim=2)
    return low + (high - low + 1) // 2


def filtered(chunk: Chunk, order: Int[Tensor, "batch tokens"], threshold: float) -> Prefiltered:
    """The chunk with each frame whose mean embedding is similar to the running mean before it averaged into that.

    Similar: a cosine above the threshold. The averaged frame has the position of the first. Audio and text pass.
    Streams of a batch with unequal numbers of remaining frames are padded at the end.
    """
    visual = chunk.modality[0] == Modality.VISUAL
    times = chunk.places[0, 0, visual]
    frames, size = len(times.unique_consecutive()), int((times == times[0]).sum())
    if frames < 2 or frames * size != len(times):
        return Prefiltered(chunk=chunk, order=order)
    parts = [chunk.embeddings[:, visual]] if chunk.deepstack is None else [chunk.embeddings[:, visual], *_levels(chunk)]
    images = [part.unflatten(1, (frames, size)) for part in parts]
    owners = torch.stack([_owners(row, threshold) for row in images[0].float()])
    means = [_averaged(part, owners).flatten(1, 2).to(part.dtype) for part in images]
    there = chunk.modality != ABSENT
    there[:, visual] = (owners == torch.arange(frames, device=owners.device)).repeat_interleave(size, dim=1)
    embeddings = chunk.embeddings.clone()
    embeddings[:, visual] = means[0]
    deepstack = chunk.deepstack
    if deepstack is not None:
        deepstack = replace(deepstack, features=tuple(level.flatten(0, 1) for level in means[1:]))
    whole = replace(chunk, embeddings=embeddings, deepstack=deepstack)
    return _only(whole, order, there)


def _owners(frames: Float[Tensor, "frames cells width"], threshold: float) -> Int[Tensor, " frames"]:
    """For each frame the first of those that it is averaged with."""
    owners, total, count = [0], frames[0].mean(dim=0), 1
    for number, frame in enumerate(frames[1:].mean(dim=1), start=1):
        if float(F.cosine_similarity(total / count, frame, dim=0)) > threshold:
            owners.append(owners[-1])
            total, count = total + frame, count + 1
        else:
            owners.append(number)
            total, count = frame, 1
    return torch.tensor(owners, device=frames.device)


def _averaged(
    frames: Float[Tensor, "batch frames cells width"], owners: Int[Tensor, "batch frames"]
) -> Float[Tensor, "batch frames cells width"]:
    """The mean of the frames that each frame owns."""
    numbers = torch.arange(owners.shape[1], device=owners.device)
    owns = (owners[:, None] == numbers[None, :, None]).float()
    return torch.einsum("bof,bfcw->bocw", owns / owns.sum(dim=2, keepdim=True).clamp_min(1), frames.float())


def _levels(chunk: Chunk) -> list[Float[Tensor, "batch visual width"]]:
    """Deepstack features, stream by stream."""
    levels = () if chunk.deepstack is None else chunk.deepstack.features
    return [level.unflatten(0, (chunk.modality.shape[0], -1)) for level in levels]


def _only(chunk: Chunk, order: Tensor, there: Bool[Tensor, "batch tokens"]) -> Prefiltered:
    """The tokens marked in `there`, in order; shorter rows are padded."""
    counts = there.sum(dim=1, keepdim=True)
    most = int(counts.max())
    index = (~there).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
    held = torch.arange(most, device=index.device) < counts
    left = chunk.gather(index)
    kinds = torch.where(held, left.modality, torch.full_like(left.modality, ABSENT))
    return Prefiltered(chunk=replace(left, modality=kinds), order=order.gather(1, index))


@final
@dataclass(frozen=True, kw_only=True)
class StreamMemOptions:
    """A proxy question without content; there is no official code, so our choices are interpretations.

    as_published  frame filter at 0.95, prototypes, one pool of audio and visual tokens per layer
    shared_split  the same with the audio-visual split of the budget
    Choices where the source says nothing: the filter compares the mean over a frame's cells with the running mean in
    the chunk; probe tokens, query heads and heads are averaged, with one set of tokens per layer (`per_head`: one per
    key-value head); prototypes take slots, are visual tokens at the frame's centre cell that may be evicted later, take
    at most half of the slots (the latest frames first), and exist only if tokens are evicted; keys are rotated to the
    centre before they are averaged; audio tokens are treated like visual ones and have no prototypes. Original
    positions; the scaling by YaRN that the source adds for other models is left out (1 for Qwen2.5).
    """

    name: Literal["streammem"] = "streammem"
    preset: Preset = "as_published"
    frame_filter: bool | None = None  # average frames that are alike
    threshold: float | None = None  # cosine of frames above which they are averaged
    prototypes: bool | None = None  # one averaged token per frame
    per_head: bool | None = None  # every key-value head keeps tokens of its own

    def __post_init__(self) -> None:
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise ValueError(f"policy.threshold = {self.threshold:g} is a cosine; give a number from -1 to 1")

    def build(self, budget: Budget | None) -> StreamMemPolicy:
        """The policy at a budget; None: full memory."""
        return part(StreamMemPolicy, {**settings(self, PRESETS), "budget": allotted(budget, self.preset)})
