"""Sources: a file or a live stream in segments that end on frame grids and on the audio encoder's block."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import count, islice
from pathlib import Path
from typing import Literal, final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from omnimem.media.decode import read_audio, read_frames
from omnimem.media.mel import LogMel
from omnimem.media.pixels import resize, smart_resize

LONGEST_SEGMENT = 60  # audio blocks; a frame rate that needs more to meet the grid is refused
CODEC_TAIL = 0.1  # seconds; audio codecs fill their last block, which is no segment of its own


@final
@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How a checkpoint cuts pixels and sound, read from its own files by the backbone."""

    patch: int
    merge: int
    temporal_patch: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    mel: LogMel
    segment_seconds: float  # the audio encoder's block and the interleave of the prompt

    def __post_init__(self) -> None:
        if (Fraction(self.segment_seconds).limit_denominator(1000) * self.mel.rate / self.mel.hop).denominator != 1:
            raise ValueError(
                f"segments of {self.segment_seconds} s hold no whole number of mel frames (hop {self.mel.hop} at "
                f"{self.mel.rate} Hz); repair seconds_per_chunk or hop_length in the checkpoint"
            )

    @property
    def cell(self) -> int:
        """Side in pixels of what becomes one visual token."""
        return self.patch * self.merge

    def segment(self, fps: float) -> tuple[float, int, int]:
        """(seconds, frames, mel frames) of a segment: the fewest audio blocks that hold whole frame grids at `fps`."""
        rate, block = Fraction(fps).limit_denominator(1000), Fraction(self.segment_seconds).limit_denominator(1000)
        for blocks in range(1, LONGEST_SEGMENT + 1):
            frames = rate * block * blocks
            if frames.denominator == 1 and frames.numerator % self.temporal_patch == 0:
                seconds = block * blocks
                return float(seconds), frames.numerator, int(seconds * self.mel.rate / self.mel.hop)
        raise ValueError(
            f"fps = {fps:g} meets no grid of {self.temporal_patch} frames at the end of an audio block of "
            f"{self.segment_seconds:g} s; use a rate such as 0.5, 1 or 2"
        )


@final
@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """How a stream is looked at and listened to."""

    fps: float = 1.0  # frames per second of stream time
    max_pixels: int = 176400  # per frame, after resizing
    min_pixels: int = 3136  # per frame; smaller ones are enlarged
    tracks: Literal["both", "video", "audio"] = "both"

    def __post_init__(self) -> None:
        if self.fps <= 0:
            raise ValueError(f"fps = {self.fps:g} must be above 0")
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(f"min_pixels = {self.min_pixels} must be in 1..max_pixels = {self.max_pixels}")


@final
@dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of the stream that can be encoded on its own; None where a track is not asked for or has ended."""

    start: float  # seconds since the beginning of the stream or clip
    seconds: float  # shorter than the others only at the end
    frames: UInt8[Tensor, "frames 3 height width"] | None  # resized to whole cells
    mel: Float[Tensor, "mels mel_frames"] | None


@final
class FileSource:
    """The segments of a file: frames decoded as they are asked for, mel of the whole clip normalised at once.

    `audio_path` replaces the file's own audio track. `seconds`, `frames_seen` and `audio_seconds_heard` say what the
    last iteration delivered. Iterating raises MediaError: `no_video` or `no_audio` when a track that
    `options.tracks` asks for is missing, and all others of `read_frames` and `read_audio`.
    """

    def __init__(
        self,
        path: Path | str,
        audio_path: Path | str | None = None,
        *,
        options: SourceOptions,
        geometry: Geometry,
        start: float = 0.0,
        end: float | None = None,
    ) -> None:
        self.path, self.audio_path = Path(path), Path(audio_path or path)
        self.options, self.geometry = options, geometry
        self.start, self.end = start, end
        self.seconds, self.frames_seen, self.audio_seconds_heard = 0.0, 0, 0.0

    def __iter__(self) -> Iterator[Segment]:
        self.seconds, self.frames_seen, self.audio_seconds_heard = 0.0, 0, 0.0
        length, frames_each, mel_each = self.geometry.segment(self.options.fps)
        mel = self._mel() if self.options.tracks != "video" else None
        frames = self._frames() if self.options.tracks != "audio" else iter(())
        for index in count():
            pixels = _stack(frames, frames_each, self.options, self.geometry)
            sound = mel[:, index * mel_each : (index + 1) * mel_each] if mel is not None else None
            segment = _segment(index * length, pixels, sound, self.options, self.geometry)
            if segment is None:
                return
            self.seconds = segment.start + segment.seconds
            self.frames_seen += 0 if segment.frames is None else len(segment.frames)
            if segment.mel is not None:
                self.audio_seconds_heard += segment.mel.shape[1] * self.geometry.mel.hop / self.geometry.mel.rate
            yield segment

    def _mel(self) -> Float[Tensor, "mels mel_frames"]:
        mel = self.geometry.mel
        return mel.clip(read_audio(self.audio_path, rate=mel.rate, start=self.start, end=self.end))

    def _frames(self) -> Iterator[UInt8[Tensor, "3 height width"]]:
        for _, frame in read_frames(self.path, fps=self.options.fps, start=self.start, end=self.end):
            yield frame


def _stack(
    frames: Iterator[UInt8[Tensor, "3 _ _"]], many: int, options: SourceOptions, geometry: Geometry
) -> UInt8[Tensor, "frames 3 height width"] | None:
    """The next `many` frames, or those that are left, resized to the size that the first of them calls for."""
    taken = list(islice(frames, many))
    if not taken:
        return None
    height, width = smart_resize(
        *taken[0].shape[-2:], cell=geometry.cell, min_pixels=options.min_pixels, max_pixels=options.max_pixels
    )
    if all(frame.shape == taken[0].shape for frame in taken):
        return resize(torch.stack(taken), height, width)
    return torch.cat([resize(frame[None], height, width) for frame in taken])


def _segment(
    start: float, frames: Tensor | None, mel: Tensor | None, options: SourceOptions, geometry: Geometry
) -> Segment | None:
    """A segment of what is there, None when nothing is."""
    video = 0.0 if frames is None else len(frames) / options.fps
    audio = 0.0 if mel is None else mel.shape[1] * geometry.mel.hop / geometry.mel.rate
    if frames is None and audio <= (CODEC_TAIL if start else 0.0):
        return None
    return Segment(start=start, seconds=max(video, audio), frames=frames, mel=mel if audio else None)
