"""Qwen3-VL, dense and with experts: frames alone, each frame grid after its time as text.

Stream: for each grid `<12.5 seconds><|vision_start|>[visual tokens]<|vision_end|>`, the time being the mean of those of
its first and last frame. With `stream.timestamps`, several grids share the time of the first one, as in the release of
video-SALMONN 2+ (`total_timestamps`). The last `<|vision_end|>` stands before the question, where the stream ends.

Positions: text counts tokens. A group of n grids that starts at p has t = p + grid, h = p + row, w = p + column; the
next token is at p + max(n, rows, columns).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel, Qwen3VLVisionModel
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextModel, Qwen3VLMoeVisionModel

from omnimem.backbones.base import Encoded, Layout, Part, Tracks, raster
from omnimem.backbones.qwen import END, START, Qwen, QwenFamily, text_part
from omnimem.tokens import Modality


class Qwen3VL(Qwen):
    """A loaded model of this family; `model` is the unmodified transformers class."""

    name = "Qwen3-VL"
    classes = {  # noqa: RUF012
        "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
        "qwen3_vl_moe": (Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration),
    }
    decoder = (Qwen3VLTextModel, Qwen3VLMoeTextModel)
    towers = ((Qwen3VLVisionModel, Qwen3VLMoeVisionModel),)
    stacked = "deepstack_merger_list"
    senses = ("video",)
    compacts = False  # rows and columns move with the time, so kept tokens cannot move up in time alone
    stamped = True
    end = {"both": END, "video": END}  # noqa: RUF012

    def laid_out(self, opening: str, tracks: Tracks | None, batch: int, group: int) -> Layout:
        return StampedLayout(
            lambda words: self.embedded(words, batch),
            opening,
            group=group,
            audio_per_second=self.audio_tokens_per_second,
            temporal_patch=self.geometry.temporal_patch,
        )

    @property
    def audio_tokens_per_second(self) -> float:
        """Audio tokens that follow each second of frames."""
        return 0.0


@final
@dataclass(frozen=True, kw_only=True)
class Grid:
    """A frame grid, and the audio tokens that follow it."""

    number: int
    time: float  # seconds, as its timestamp says
    size: tuple[int, int]  # rows and columns
    visual: Float[Tensor, "batch visual_tokens width"]
    deepstack: tuple[Float[Tensor, "batch visual_tokens width"], ...]
    audio: Float[Tensor, "batch audio_tokens width"] | None


@final
class StampedLayout(Layout):
    """Groups of frame grids, each after its time as text, with the audio of their time at the group's end.

    Grid i of the stream takes the audio tokens floor(r s i) to floor(r s (i + 1)), at r tokens per second and s seconds
    per grid; the last grid of the video takes all that follow (release). Without audio left a grid has none.
    """

    def __init__(
        self,
        embed: Callable[[str], Float[Tensor, "batch tokens width"]],
        opening: str,
        *,
        group: int,
        audio_per_second: float,
        temporal_patch: int,
    ) -> None:
        self.embed, self._opening = embed, embed(opening)
        self.group, self.rate, self.temporal_patch = group, audio_per_second, temporal_patch
        self._position = self._opening.shape[1]
        self._grids = self._groups = 0  # begun so far
        self._held: tuple[Grid, ...] = ()  # of a group that is not complete

    def opening(self) -> Part:
        return text_part(self._opening)

    def push(self, segment: Encoded) -> list[Part]:
        # 1. audio without frames: it follows the latest group
        if segment.visual is None:
            return self._append(segment.audio)
        # 2. complete groups; the last grid of a video that ends within the segment takes the rest of the audio
        parts = []
        for grid in self._cut(segment):
            self._held = (*self._held, grid)
            if len(self._held) == self.group:
                parts.append(self._emitted())
        return parts

    @property
    def holds(self) -> bool:
        return bool(self._held)

    def finish(self) -> list[Part]:
        return [self._emitted()] if self._held else []

    def _append(self, audio: Tensor | None) -> list[Part]:
        """Audio after the frames have ended, or of a stream without frames."""
        if audio is None:
            return []
        if self._held:
            last = self._held[-1]
            joined = audio if last.audio is None else torch.cat([last.audio, audio], dim=1)
            self._held = (*self._held[:-1], replace(last, audio=joined))
            return []
        return [self._sound(audio, self._grids - 1)]

    def _cut(self, segment: Encoded) -> Iterator[Grid]:
        """The grids of a segment, each with its audio."""
        assert segment.visual is not None, "a segment with frames"
        count, rows, columns = segment.grid
        first, spacing = self._grids, segment.seconds_per_grid
        ends = [self._heard(first + n + 1, spacing) - self._heard(first, spacing) for n in range(count)]
        if segment.audio is not None:
            ends[-1] = segment.audio.shape[1]
        cells, frame = rows * columns, spacing / self.temporal_patch
        for n, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            repeated = segment.repeated if n + 1 == count else 0
            span, audio = slice(n * cells, (n + 1) * cells), segment.audio
            heard = None if audio is None or start >= min(end, audio.shape[1]) else audio[:, start:end]
            yield Grid(
                number=first + n,
                time=segment.start + n * spacing + (self.temporal_patch - 1 - repeated) * frame / 2,
                size=(rows, columns),
                visual=segment.visual[:, span],
                deepstack=tuple(level[:, span] for level in segment.deepstack),
                audio=heard,
            )
        self._grids = first + count

    def _heard(self, grids: int, spacing: float) -> int:
        """Audio tokens that belong to the first grids of the stream."""
        return int(self.rate * spacing * grids + 1e-6)

    def _emitted(self) -> Part:
        """The held grids as a group: [vision_end of the group before] time, vision_start, frames, audio."""
        held, self._held = self._held, ()
        # 1. the text before it
        parts = [] if not self._groups else [self._words(END, self._groups - 1)]
        parts.append(self._words(f"<{held[0].time:.1f} seconds>{START}", self._groups))
        # 2. the frames
        number, (rows, columns) = self._groups, held[0].size
        place = raster((len(held), rows, columns))
        visual = Part(
            embeddings=torch.cat([grid.visual for grid in held], dim=1),
            positions=place + self._position,
            modality=torch.full((place.shape[1],), int(Modality.VISUAL), dtype=torch.int8),
            place=torch.stack([place[0] + held[0].number, place[1], place[2], torch.full_like(place[0], number)]).int(),
            deepstack=tuple(torch.cat(level, dim=1) for level in zip(*(grid.deepstack for grid in held), strict=True)),
        )
        parts.append(visual)
        self._position += max(len(held), rows, columns)
        self._groups += 1
        # 3. the audio of all its grids
        parts += [self._sound(grid.audio, grid.number) for grid in held if grid.audio is not None]
        return _joined(parts)

    def _words(self, text: str, group: int) -> Part:
        part = text_part(self.embed(text), self._position, group)
        self._position += part.count
        return part

    def _sound(self, audio: Float[Tensor, "batch tokens width"], frame: int) -> Part:
        part = text_part(audio, self._position, self._groups - 1)
        self._position += part.count
        place = part.place.clone()
        place[0] = frame
        return replace(part, modality=torch.full_like(part.modality, int(Modality.AUDIO)), place=place)


def _joined(parts: Sequence[Part]) -> Part:
    """One part of several, at most one of them with deepstack features."""
    return Part(
        embeddings=torch.cat([part.embeddings for part in parts], dim=1),
        positions=torch.cat([part.positions for part in parts], dim=1),
        modality=torch.cat([part.modality for part in parts]),
        place=torch.cat([part.place for part in parts], dim=1),
        deepstack=next((part.deepstack for part in parts if part.deepstack), ()),
    )


@final
class Qwen3VLFamily(QwenFamily):
    """Qwen3-VL 2B to 32B, and its variants with experts."""

    name = Qwen3VL.name
    sizes = "2B to 32B and with experts, frames alone (qwen3_vl_8b.yaml)"
    trees = ("model.language_model",)
    backbone = Qwen3VL
    with_audio = False
