"""Which tokens of a pool stay: hard top-k per modality, and the temperature-softened form of it used in training."""

import math
from dataclasses import dataclass, field
from typing import Literal, final

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from omnimem.tokens import EVICTABLE, Modality
from omnimem.view import ScoreGradient

Softening = Literal["hard", "straight_through"]


@final
@dataclass(frozen=True, kw_only=True)
class Softness:
    """How one training step softens selection; where there is none, selection is hard."""

    temperature: float  # in standard deviations of the scores
    gradient: ScoreGradient = "redundancy"  # which part of the score is to learn


@final
@dataclass(frozen=True, kw_only=True)
class Room:
    """How many audio and visual tokens one layer may keep after a chunk."""

    audio: int
    visual: int
    split: bool = True  # False: audio and visual compete for audio + visual slots
    lend: bool = True  # slots that one modality cannot fill go to the other one


@final
@dataclass(frozen=True, kw_only=True)
class Selected:
    """What stays of a pool, and what softened selection needs to pass gradient to the scores."""

    index: Int[Tensor, "batch kept"]  # ascending: the order of arrival is kept
    gate: Float[Tensor, "batch kept"] | None  # additive attention bias; None when selection is hard


@final
@dataclass(frozen=True, kw_only=True)
class TemperatureOptions:
    """T of softened selection over the steps of a run, in standard deviations of the scores."""

    start: float = 1.0
    end: float = 0.05
    schedule: Literal["constant", "linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        if self.start <= 0 or self.end <= 0:
            raise ValueError(f"temperature start = {self.start} and end = {self.end} must both be above 0")

    def at(self, progress: float) -> float:
        """T at a fraction of the run: `start` throughout, or from `start` at 0 to `end` at 1."""
        done = min(1.0, max(0.0, progress))
        if self.schedule == "constant":
            return self.start
        if self.schedule == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done


@final
@dataclass(frozen=True, kw_only=True)
class SelectionOptions:
    """How selection is softened in training; evaluation is always hard (design 7)."""

    softening: Softening = "straight_through"
    temperature: TemperatureOptions = field(default_factory=TemperatureOptions)

    def at(self, progress: float) -> Softness | None:
        """How a step at a fraction of the run selects; None: hard."""
        if self.softening == "hard":
            return None
        return Softness(temperature=self.temperature.at(progress))


def taken(available: dict[Modality, int], room: Room) -> dict[Modality, int]:
    """Tokens of each modality that stay under `room`, lending included; exact integers.

    A modality exceeds its own slots only by what the other one cannot fill.
    """
    slots = {Modality.AUDIO: room.audio, Modality.VISUAL: room.visual}
    kept = {kind: min(available[kind], slots[kind]) for kind in EVICTABLE}
    if room.lend:
        spare = sum(slots.values()) - sum(kept.values())
        for kind in EVICTABLE:
            extra = min(spare, available[kind] - kept[kind])
            kept[kind] += extra
            spare -= extra
    return kept


def select(
    scores: Float[Tensor, "batch tokens"],
    modality: Int8[Tensor, "batch tokens"],
    room: Room,
    softness: Softness | None = None,
) -> Selected:
    """All text and the highest scores per modality (or of both together, unsplit); ties go to the most recent token.

    Every stream of the batch holds the same number of tokens of each modality. With a temperature T the gate of a kept
    token is log(1 + g - stop(g)), g = sigmoid((z - tau) / T): 0 in value, so the forward pass is hard top-k, with the
    gradient of g; z is the score standardised within the layer and modality, tau the midpoint between the last kept
    and the first dropped score (design 7; ours).
    """
    temperature = None if softness is None else softness.temperature
    available = {kind: int((modality[0] == kind).sum()) for kind in Modality}
    pools = _pools(modality, available, room)
    kept = [_all_of(modality == Modality.TEXT, available[Modality.TEXT])]
    bias = [torch.zeros_like(kept[0], dtype=torch.float32)]
    for member, count, size in pools:
        index = _top(scores, member, count)
        kept.append(index)
        soft = temperature is not None and 0 < count < size
        gate = _straight_through(scores, member, index, temperature) if soft and temperature else None
        bias.append(torch.zeros_like(index, dtype=torch.float32) if gate is None else gate)
    index, order = torch.cat(kept, dim=1).sort(dim=1)
    return Selected(index=index, gate=None if temperature is None else torch.cat(bias, dim=1).gather(1, order))


def _pools(modality: Tensor, available: dict[Modality, int], room: Room) -> list[tuple[Tensor, int, int]]:
    """The groups that compete: (membership, how many stay, how many there are)."""
    if room.split:
        staying = taken(available, room)
        return [(modality == kind, staying[kind], available[kind]) for kind in EVICTABLE]
    size = sum(available[kind] for kind in EVICTABLE)
    return [(modality != Modality.TEXT, min(size, room.audio + room.visual), size)]


def _all_of(member: Tensor, count: int) -> Int[Tensor, "batch count"]:
    """Indices of the members, `count` in each row, ascending."""
    return member.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]


def _top(scores: Tensor, member: Tensor, count: int) -> Int[Tensor, "batch count"]:
    """Indices of the `count` highest members; a stable sort from the newest to the oldest breaks ties by recency.

    A NaN can only come from a NaN of the model itself; it ranks last instead of first, where top-k would put it.
    """
    ranked = scores.detach().nan_to_num(nan=-torch.finfo(scores.dtype).max).masked_fill(~member, float("-inf"))
    newest_first = ranked.flip(1).argsort(dim=1, descending=True, stable=True)
    return scores.shape[1] - 1 - newest_first[:, :count]


def _straight_through(
    scores: Tensor, member: Tensor, index: Tensor, temperature: float
) -> Float[Tensor, "batch count"]:
    """log(1 + g - stop(g)) of the kept tokens."""
    weight = member.float()
    size = weight.sum(dim=1, keepdim=True)
    fixed = scores.detach()
    mean = (fixed * weight).sum(dim=1, keepdim=True) / size
    deviation = (((fixed - mean) ** 2 * weight).sum(dim=1, keepdim=True) / size).sqrt().clamp_min(1e-6)
    kept = fixed.gather(1, index)
    dropped = fixed.masked_fill(~member, float("-inf")).scatter(1, index, float("-inf"))
    threshold = (kept.amin(dim=1, keepdim=True) + dropped.amax(dim=1, keepdim=True)) / 2
    gate = torch.sigmoid((scores.gather(1, index) - threshold) / deviation / temperature)
    return torch.log1p(gate - gate.detach())
