"""Input-uniform: the stream is subsampled before the model reads it, so that all of it fits the memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from jaxtyping import Int
from torch import Tensor

from omnimem.budget import Budget
from omnimem.policies.base import Policy, PolicyError, Prefiltered, StreamOutline, Traits
from omnimem.policies.baselines.presets import Preset, allotted
from omnimem.selection import Softness
from omnimem.tokens import Chunk, Modality, Tokens
from omnimem.view import LayerView


@final
@dataclass(frozen=True, kw_only=True)
class InputUniformPolicy(Policy):
    """Of F frames n = slots / (tokens of a frame) are read, those at indices floor((i + 1/2) F / n); all are kept."""

    chosen: tuple[int, ...] | None = None  # arrival numbers that are read; None: the stream is not known yet

    @property
    def traits(self) -> Traits:
        """Under a budget it must know the length of the stream."""
        return Traits(needs_oracle=self.budget is not None)

    def with_oracle(self, streams: Sequence[StreamOutline]) -> "InputUniformPolicy":
        """Streams of a batch have one layout, so the first one is used for all."""
        if self.budget is None:
            return self
        return replace(self, chosen=tuple(sorted(chosen_of(streams[0], self.budget).tolist())))

    def prefilter(self, chunk: Chunk, order: Int[Tensor, "batch tokens"]) -> Prefiltered:
        """Text and the chosen tokens.

        Raises PolicyError when the stream's length was not known in advance.
        """
        if self.budget is None:
            return Prefiltered(chunk=chunk, order=order)
        if self.chosen is None:
            raise PolicyError(
                "policy input_uniform subsamples a stream before it is read and must know its length, which a live "
                "stream does not have; choose policy uniform instead"
            )
        wanted = torch.isin(order[0], torch.tensor(self.chosen, device=order.device))
        index = ((chunk.modality[0] == Modality.TEXT) | wanted).nonzero()[:, 0].expand(len(order), -1)
        return Prefiltered(chunk=chunk.gather(index), order=order.gather(1, index))

    def keep(self, layer: int, view: LayerView, softness: Softness | None = None) -> Tokens:
        """All tokens that were read."""
        return view.pool


def chosen_of(outline: StreamOutline, budget: Budget) -> Int[Tensor, " tokens"]:
    """Arrival numbers of the sampled tokens: whole frames with their audio, or, split, frames and audio separately."""
    slots = budget.total // budget.layers
    frames = frames_of(outline)
    number = torch.arange(len(outline.modality))
    audio, visual = outline.modality == Modality.AUDIO, outline.modality == Modality.VISUAL
    if not budget.split:
        return _sampled(number[audio | visual], frames[audio | visual], slots)
    audio_slots = round(slots * sum(slot for slot, _ in budget.slots) / budget.total)
    sampled = _sampled(number[visual], frames[visual], slots - audio_slots)
    return torch.cat([sampled, _evenly(number[audio], audio_slots)])


def frames_of(outline: StreamOutline) -> Int[Tensor, " tokens"]:
    """The frame of each token, from 0; for audio the latest frame at or before it."""
    visual = outline.modality == Modality.VISUAL
    times, frame = outline.place[0][visual].unique(), outline.place[0].contiguous()
    number = torch.searchsorted(times, frame, right=True) - 1
    return number.clamp_min(0) if len(times) else frame - frame.min()


def _sampled(number: Tensor, frames: Tensor, slots: int) -> Int[Tensor, " tokens"]:
    """The tokens of as many frames as fit, spread evenly; single tokens if not even one frame fits."""
    kinds, sizes = frames.unique(return_counts=True)
    if not len(kinds) or int(sizes.max()) > slots:
        return _evenly(number, slots)
    return number[torch.isin(frames, _evenly(kinds, slots // int(sizes.max())))]


def _evenly(values: Tensor, count: int) -> Int[Tensor, " chosen"]:
    """`count` of the values, at the middles of as many equal intervals."""
    if count >= len(values):
        return values
    return values[((torch.arange(count) * 2 + 1) * len(values)).div(2 * max(1, count), rounding_mode="floor")]


@final
@dataclass(frozen=True, kw_only=True)
class InputUniformOptions:
    """Not a streaming method: it knows the length of the stream, and reads only the tokens that it keeps.

    as_published  whole frames, each with the audio that follows it, the same in every layer; slots that no whole frame
                  fits into stay empty, so there may be fewer entries than with other methods
    shared_split  frames and single audio tokens in the proportion of the budget's audio-visual split
    """

    name: Literal["input_uniform"] = "input_uniform"
    preset: Preset = "as_published"

    def build(self, budget: Budget | None) -> InputUniformPolicy:
        """The policy at a budget; None: full memory."""
        return InputUniformPolicy(name=self.name, budget=allotted(budget, self.preset))
