"""Input-uniform: the stream is thinned before the model reads it, so that what is read fits the memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from jaxtyping import Int
from torch import Tensor

from omnimem.budget import Budget
from omnimem.policies.base import Policy, PolicyError
from omnimem.policies.baselines.presets import Preset, allotted
from omnimem.policies.capabilities import Prefiltered, StreamOutline
from omnimem.selection import Softness
from omnimem.tokens import Chunk, Modality, Tokens
from omnimem.view import LayerView


@final
@dataclass(frozen=True, kw_only=True)
class InputUniformPolicy(Policy):
    """Of F frames n = slots / (tokens of a frame) are read, those at places floor((i + 1/2) F / n), and all is kept."""

    chosen: tuple[int, ...] | None = None  # arrival numbers that are read; None: not told of a stream yet

    def with_oracle(self, streams: Sequence[StreamOutline]) -> "InputUniformPolicy":
        """Streams of a batch have one layout, so the first one speaks for all."""
        if self.budget is None:
            return self
        return replace(self, chosen=tuple(sorted(chosen_of(streams[0], self.budget).tolist())))

    def prefilter(self, chunk: Chunk, order: Int[Tensor, "batch tokens"]) -> Prefiltered:
        """Text, and what was chosen of the stream.

        Raises PolicyError where the stream's length was not known beforehand.
        """
        if self.budget is None:
            return Prefiltered(chunk=chunk, order=order)
        if self.chosen is None:
            raise PolicyError(
                "policy input_uniform thins a stream before it is read and must know its length, which a live stream "
                "has not; choose policy uniform instead"
            )
        wanted = torch.isin(order[0], torch.tensor(self.chosen, device=order.device))
        index = ((chunk.modality[0] == Modality.TEXT) | wanted).nonzero()[:, 0].expand(len(order), -1)
        return Prefiltered(chunk=chunk.gather(index), order=order.gather(1, index))

    def keep(self, layer: int, view: LayerView, softness: Softness | None = None) -> Tokens:
        """Everything that was read."""
        return view.pool


def chosen_of(outline: StreamOutline, budget: Budget) -> Int[Tensor, " tokens"]:
    """Arrival numbers of the sampled tokens: whole frames with their sound, or, split, frames and sound apart."""
    slots = budget.total // budget.layers
    frames = frames_of(outline)
    number = torch.arange(len(outline.modality))
    audio, visual = outline.modality == Modality.AUDIO, outline.modality == Modality.VISUAL
    if not budget.split:
        return _sampled(number[audio | visual], frames[audio | visual], slots)
    of_sound = round(slots * sum(slot for slot, _ in budget.slots) / budget.total)
    pictures = _sampled(number[visual], frames[visual], slots - of_sound)
    return torch.cat([pictures, _evenly(number[audio], of_sound)])


def frames_of(outline: StreamOutline) -> Int[Tensor, " tokens"]:
    """The frame that each token belongs to, from 0: sound to the latest frame at or before it."""
    visual = outline.modality == Modality.VISUAL
    times = outline.positions[0][visual].unique()
    place = torch.searchsorted(times, outline.positions[0].contiguous(), right=True) - 1
    return place.clamp_min(0) if len(times) else outline.positions[0] - outline.positions[0].min()


def _sampled(number: Tensor, frames: Tensor, slots: int) -> Int[Tensor, " tokens"]:
    """The tokens of as many frames as fit, spread evenly; single tokens where not even one frame fits."""
    kinds, sizes = frames.unique(return_counts=True)
    if not len(kinds) or int(sizes.max()) > slots:
        return _evenly(number, slots)
    return number[torch.isin(frames, _evenly(kinds, slots // int(sizes.max())))]


def _evenly(values: Tensor, count: int) -> Int[Tensor, " chosen"]:
    """`count` of the values at the middles of as many equal stretches."""
    if count >= len(values):
        return values
    return values[((torch.arange(count) * 2 + 1) * len(values)).div(2 * max(1, count), rounding_mode="floor")]


@final
@dataclass(frozen=True, kw_only=True)
class InputUniformOptions:
    """No streaming method: it knows how long the stream is, and never reads what it does not keep.

    as_published  whole frames, each with the sound that follows it, in every layer alike; slots that no whole frame
                  fits into stay empty, so entries may be fewer than those of the other methods
    shared_split  frames and single tokens of sound in the proportion of the budget's audio-visual split
    """

    name: Literal["input_uniform"] = "input_uniform"
    preset: Preset = "as_published"

    def build(self, budget: Budget | None) -> InputUniformPolicy:
        """The policy at a budget; None: full memory."""
        return InputUniformPolicy(name=self.name, budget=allotted(budget, self.preset))
