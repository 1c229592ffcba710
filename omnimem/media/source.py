"""Sources: a file or a live stream in segments that end on frame grids and on the audio encoder's block."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import count, islice
from pathlib import Path
from typing import Literal, final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from omnimem.media.container import CODEC_FILLING, MediaError
from omnimem.media.decode import read_audio_blocks, read_frames, sample_by_time
from omnimem.media.mel import LogMel
from omnimem.media.pixels import MAX_ASPECT_RATIO, resize, smart_resize

LONGEST_SEGMENT = 60  # audio blocks; a frame rate that needs more to meet the grid is refused


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


class Source(ABC):
    """A stream in segments; `seconds`, `frames_seen`, `audio_seconds_heard` say what the last iteration delivered."""

    def __init__(self, options: SourceOptions, geometry: Geometry) -> None:
        self.options, self.geometry = options, geometry
        self.seconds, self.frames_seen, self.audio_seconds_heard = 0.0, 0, 0.0

    @abstractmethod
    def _pictures(self) -> Iterator[UInt8[Tensor, "3 _ _"]]:
        """Frames at `options.fps`, as large as they come."""

    @abstractmethod
    def _sounds(self, mel_frames: int) -> Iterator[Float[Tensor, "mels _"]]:
        """The mel spectrogram in pieces of `mel_frames`, the last one may be shorter."""

    @final
    def __iter__(self) -> Iterator[Segment]:
        self.seconds, self.frames_seen, self.audio_seconds_heard = 0.0, 0, 0.0
        length, frames_each, mel_each = self.geometry.segment(self.options.fps)
        pictures = self._pictures() if self.options.tracks != "audio" else iter(())
        sounds = self._sounds(mel_each) if self.options.tracks != "video" else iter(())
        size: tuple[int, int] | None = None
        for index in count():
            taken, mel = list(islice(pictures, frames_each)), next(sounds, None)
            heard = 0.0 if mel is None else mel.shape[1] * self.geometry.mel.hop / self.geometry.mel.rate
            if not taken and heard <= (CODEC_FILLING if index else 0.0):
                return
            if taken and size is None:  # the first frame decides for the whole stream
                size = self._size(taken[0])
            self.seconds = index * length + max(len(taken) / self.options.fps, heard)
            self.frames_seen += len(taken)
            self.audio_seconds_heard += heard
            yield Segment(
                start=index * length,
                seconds=self.seconds - index * length,
                frames=_resized(taken, *size) if taken and size else None,
                mel=mel,
            )

    def _size(self, frame: UInt8[Tensor, "3 height width"]) -> tuple[int, int]:
        height, width = frame.shape[1:]
        low, high = self.options.min_pixels, self.options.max_pixels
        return smart_resize(height, width, cell=self.geometry.cell, min_pixels=low, max_pixels=high)


def _resized(frames: list[Tensor], height: int, width: int) -> UInt8[Tensor, "frames 3 {height} {width}"]:
    """All frames at one size; a stream may change its size on the way."""
    if all(frame.shape == frames[0].shape for frame in frames):
        return resize(torch.stack(frames), height, width)
    return torch.cat([resize(frame[None], height, width) for frame in frames])


@final
class FileSource(Source):
    """The segments of a file, decoded as they are asked for; the sound is read twice, first for the maximum of its mel.

    `audio_path` replaces the file's own audio track. With `causal` the mel is normalised by the running maximum, as
    that of a live stream: then no segment depends on what is heard after it. Iterating raises MediaError: `no_video` or
    `no_audio` when a track that `options.tracks` asks for is missing, and all others of `read_frames` and `read_audio`.
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
        causal: bool = False,
    ) -> None:
        super().__init__(options, geometry)
        self.path, self.audio_path = Path(path), Path(audio_path or path)
        self.start, self.end, self.causal = start, end, causal

    def _pictures(self) -> Iterator[UInt8[Tensor, "3 _ _"]]:
        for _, frame in read_frames(self.path, fps=self.options.fps, start=self.start, end=self.end):
            height, width = frame.shape[1:]
            if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
                message = f"frames of {width}x{height} are narrower than 1:{MAX_ASPECT_RATIO}; crop the video first"
                raise MediaError(self.path, "unreadable", message)
            yield frame

    def _sounds(self, mel_frames: int) -> Iterator[Float[Tensor, "mels _"]]:
        mel = self.geometry.mel
        if self.causal:
            pieces = _as_heard(mel, self._heard(), mel_frames)
        else:
            pieces = mel.pieces(self._heard(), mel.loudest(self._heard()), mel_frames)
        empty = True
        for piece in pieces:
            if piece.numel():
                empty = False
                yield piece
        if empty:
            message = f"audio is shorter than one mel frame ({mel.hop / mel.rate:g} s); choose a longer clip"
            raise MediaError(self.audio_path, "empty", message)

    def _heard(self) -> Iterator[Float[Tensor, " samples"]]:
        """The sound from its beginning, in blocks."""
        rate = self.geometry.mel.rate
        return read_audio_blocks(self.audio_path, rate=rate, start=self.start, end=self.end)


@final
class LiveSource(Source):
    """The segments of a stream that is still growing, each as soon as both tracks cover it; iterated once.

    `frames` yields (seconds since the beginning, picture) in order of time, `audio` mono samples at the checkpoint's
    rate without holes; both may block until there is more, and end when the stream ends. A segment comes when its
    last frame time is reached and the audio is half a mel window past its end. Frames equal a FileSource's over the
    same pictures (the last one is held to last as long as the one before). Mel is normalised by the running maximum:
    equal to FileSource's from the segment that holds the clip's maximum on, before that wherever FileSource's value
    is not its floor (`RunningMel`). Raises ValueError when a track that `options.tracks` asks for is None.
    """

    def __init__(
        self,
        frames: Iterator[tuple[float, UInt8[Tensor, "3 _ _"]]] | None,
        audio: Iterator[Float[Tensor, " _"]] | None,
        *,
        options: SourceOptions,
        geometry: Geometry,
    ) -> None:
        super().__init__(options, geometry)
        for name, track, unused in (("frames", frames, "audio"), ("audio", audio, "video")):
            if track is None and options.tracks != unused:
                raise ValueError(f"tracks: {options.tracks} needs {name}, got None; pass them or set tracks: {unused}")
        self._frames, self._audio = frames or iter(()), audio or iter(())

    def _pictures(self) -> Iterator[UInt8[Tensor, "3 _ _"]]:
        for _, frame in sample_by_time(self._lasting(), self.options.fps):
            yield frame

    def _lasting(self) -> Iterator[tuple[float, float, Tensor]]:
        """(time, duration, frame), where a frame is held to last as long as the one before."""
        before: float | None = None
        for time, frame in self._frames:
            yield time, 1 / self.options.fps if before is None else time - before, frame
            before = time

    def _sounds(self, mel_frames: int) -> Iterator[Float[Tensor, "mels _"]]:
        return _as_heard(self.geometry.mel, self._audio, mel_frames)


def _as_heard(mel: LogMel, blocks: Iterable[Float[Tensor, " _"]], mel_frames: int) -> Iterator[Float[Tensor, "mels _"]]:
    """Pieces of `mel_frames`, each as soon as it has been heard, normalised by the maximum up to its end."""
    running = mel.running()
    for samples in blocks:
        running.feed(samples)
        while running.ready >= mel_frames:
            yield running.take(mel_frames)
    running.end()
    while running.ready:
        yield running.take(min(mel_frames, running.ready))
