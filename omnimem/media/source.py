"""Sources: a file or a live stream in segments that hold whole frame grids and whole blocks of the audio encoder."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import count, islice
from pathlib import Path
from typing import Literal, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from omnimem.errors import counted
from omnimem.media.container import MediaError, state_of
from omnimem.media.decode import TICK, read_audio_blocks, read_frames, sample_by_time
from omnimem.media.frames import FrameList, Video, files_of
from omnimem.media.mel import LogMel, RunningMel
from omnimem.media.pixels import MAX_ASPECT_RATIO, patchify, resize, smart_resize

TracksOption = Literal["both", "require_both", "video", "audio"]  # both: those that a file has
MAX_FPS, MAX_PIXELS = 120, 1 << 26  # no camera gives more frames; 8192 x 8192 pixels of one frame
LONGEST_SEGMENT = 60  # audio blocks; frame rates that need longer segments are refused


@final
@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Patch, mel and segment sizes of a checkpoint, read from its files by the backbone."""

    patch: int
    merge: int
    temporal_patch: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    mel: LogMel
    segment_seconds: float  # block of the audio encoder, and of the interleaving in the prompt
    # the block is a window that is padded with silence and normalised by itself (Whisper); not in the repr, which
    # identifies cached encoder outputs beside the encoders' weights
    windowed: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        if (Fraction(self.segment_seconds).limit_denominator(1000) * self.mel.rate / self.mel.hop).denominator != 1:
            raise ValueError(
                f"segments of {self.segment_seconds} s hold no whole number of mel frames (hop {self.mel.hop} at "
                f"{self.mel.rate} Hz); fix seconds_per_chunk or hop_length in the checkpoint"
            )

    @property
    def cell(self) -> int:
        """Side in pixels of the square that becomes one visual token."""
        return self.patch * self.merge

    def patches(
        self, frames: UInt8[Tensor, "frames 3 height width"]
    ) -> tuple[Float[Tensor, "patches row"], tuple[int, int, int]]:
        """Normalised patches of frames for the vision encoder, and their grid (`patchify`)."""
        sizes = {"patch": self.patch, "merge": self.merge, "temporal_patch": self.temporal_patch}
        return patchify(frames, **sizes, mean=self.mean, std=self.std)

    def segment(self, fps: float) -> tuple[float, int, int]:
        """(seconds, frames, mel frames) of a segment: the fewest audio blocks with whole frame grids at `fps`.

        Raises ValueError when more than LONGEST_SEGMENT blocks would be needed.
        """
        rate, block = Fraction(fps).limit_denominator(1000), Fraction(self.segment_seconds).limit_denominator(1000)
        for blocks in range(1, LONGEST_SEGMENT + 1):
            frames = rate * block * blocks
            if frames.denominator == 1 and frames.numerator % self.temporal_patch == 0:
                seconds = block * blocks
                return float(seconds), frames.numerator, int(seconds * self.mel.rate / self.mel.hop)
        raise ValueError(
            f"fps = {fps:g} has no segment of whole grids of {counted(self.temporal_patch, 'frame')} and whole audio "
            f"blocks of {self.segment_seconds:g} s; use a rate such as 0.5, 1 or 2"
        )


@final
@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Frame rate, frame size and tracks of a stream."""

    fps: float = 1.0  # frames per second of stream time
    max_pixels: int = 176400  # per frame, after resizing
    min_pixels: int = 3136  # per frame; smaller frames are enlarged
    tracks: Literal["both", "video", "audio"] = "both"  # all of them must be there

    def __post_init__(self) -> None:
        if not 0 < self.fps <= MAX_FPS:
            raise ValueError(f"fps = {self.fps:g} must be above 0 and at most {MAX_FPS}")
        if not 0 < self.max_pixels <= MAX_PIXELS:
            raise ValueError(f"max_pixels = {self.max_pixels} must be in 1..{MAX_PIXELS:,}")
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(f"min_pixels = {self.min_pixels} must be in 1..max_pixels = {self.max_pixels}")


@final
@dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of the stream that is encoded independently; a track is None if not selected or already ended."""

    start: float  # seconds since the beginning of the stream or clip
    seconds: float  # equal for all but the last segment
    frames: UInt8[Tensor, "frames 3 height width"] | None  # resized to whole cells
    mel: Float[Tensor, "mels mel_frames"] | None
    at: float | None = None  # a rest: the begun segment up to this time, for a question; None: part of the stream
    padded: bool = False  # the mel ends with silence up to the end of its window
    audio_seconds: float = 0.0  # of the audio in it, without padding

    def filled(self, seconds: float) -> float:
        """The length of the segment if a track of so many seconds were all that is in it."""
        return (self.start + seconds) - self.start if self.at is None else min(self.at - self.start, seconds)


@runtime_checkable
class Decoded(Protocol):
    """The segments of a file, decoded here or elsewhere."""

    @property
    def options(self) -> SourceOptions: ...

    @property
    def unchanged(self) -> bool:
        """Whether the file is the one that was there before it was read."""
        ...

    def __iter__(self) -> Iterator[Segment]: ...


class Source(ABC):
    """A stream in segments; `seconds`, `frames_seen` and `audio_seconds_heard` count those of the last iteration.

    For each of `asks`, seconds since the beginning of the stream or clip, a rest precedes the segment that holds this
    time: the part of the segment before it, equal to the last segment of a stream that is cut there. A rest is not
    part of the stream. Empty rests are left out, so is that of a time at which a segment ends.
    """

    def __init__(self, options: SourceOptions, geometry: Geometry, asks: Sequence[float] = ()) -> None:
        self.options, self.geometry, self.asks = options, geometry, tuple(sorted(set(asks)))
        self.seconds, self.frames_seen, self.audio_seconds_heard = 0.0, 0, 0.0
        self._samples = 0  # audio samples read so far

    @property
    def unchanged(self) -> bool:
        """Whether the files are those that were there at `FileSource.watched`."""
        return True

    @abstractmethod
    def _read_frames(self) -> Iterator[UInt8[Tensor, "3 _ _"]]:
        """Frames at `options.fps`, before resizing."""

    @abstractmethod
    def _read_mel(self, mel_frames: int) -> "Iterator[_Piece]":
        """The mel spectrogram in pieces of `mel_frames`; the last may be shorter."""

    @final
    def __iter__(self) -> Iterator[Segment]:
        self.seconds, self.frames_seen, self.audio_seconds_heard, self._samples = 0.0, 0, 0.0, 0
        length, frames_each, mel_each = self.geometry.segment(self.options.fps)
        all_frames = self._read_frames() if self.options.tracks != "audio" else iter(())
        all_mel = self._read_mel(mel_each) if self.options.tracks != "video" else iter(())
        size: tuple[int, int] | None = None
        for index in count():
            # 1. read one segment of both tracks; one frame at a time is held in its own size
            taken: list[Tensor] = []
            for frame in islice(all_frames, frames_each):
                size = size or self._size(frame)  # the first frame sets the size of the whole stream
                taken.append(resize(frame[None], *size))
            piece = next(all_mel, _Piece(mel=None))
            mel, frames = piece.mel, torch.cat(taken) if taken else None
            if frames is None and mel is None:
                return
            # 2. count
            audio_seconds = 0.0 if mel is None else self._audio_seconds(index * mel_each, mel.shape[1])
            yield from self._rests(index, frames, piece)
            self.seconds = index * length + max(len(taken) / self.options.fps, audio_seconds)
            self.frames_seen += len(taken)
            self.audio_seconds_heard += audio_seconds
            yield Segment(
                start=index * length,
                seconds=self.seconds - index * length,
                frames=frames,
                mel=mel,
                padded=self.geometry.windowed,
                audio_seconds=audio_seconds,
            )

    def _rests(self, index: int, frames: Tensor | None, piece: "_Piece") -> Iterator[Segment]:
        """The rests of the times within a segment, whose frames and mel are given."""
        fps = self.options.fps
        length, _, mel_each = self.geometry.segment(fps)
        start = index * length
        for at in self.asks:
            if segment_of(at, length) != index:
                continue
            # 1. the frames and the mel before this time
            count = 0 if frames is None else sum(start + n / fps < at - TICK for n in range(frames.shape[0]))
            mel = piece.rests.get(at)
            if not count and mel is None:
                continue
            # 2. as a segment of its own
            audio_seconds = 0.0 if mel is None else self._audio_seconds(index * mel_each, mel.shape[1], at)
            yield Segment(
                start=start,
                seconds=min(at - start, max(count / fps, audio_seconds)),
                frames=frames[:count] if frames is not None and count else None,
                mel=mel,
                at=at,
                padded=self.geometry.windowed,
                audio_seconds=audio_seconds,
            )

    def _audio_seconds(self, first: int, mel_frames: int, at: float | None = None) -> float:
        """Length, up to `at`, of the audio of mel frames from the `first` one on: the last may hold less than a hop."""
        hop, rate = self.geometry.mel.hop, self.geometry.mel.rate
        end = self._samples if at is None else min(self._samples, round(at * rate))
        return (min((first + mel_frames) * hop, end) - first * hop) / rate

    def _counted(self, blocks: Iterable[Float[Tensor, " _"]]) -> Iterator[Float[Tensor, " _"]]:
        """The blocks, whose samples are counted."""
        for samples in blocks:
            self._samples += len(samples)
            yield samples

    def _size(self, frame: UInt8[Tensor, "3 height width"]) -> tuple[int, int]:
        height, width = frame.shape[1:]
        low, high = self.options.min_pixels, self.options.max_pixels
        return smart_resize(height, width, cell=self.geometry.cell, min_pixels=low, max_pixels=high)


def segment_of(at: float, length: float) -> int:
    """Number of the segment that holds the moment before a time; at the end of a segment, of the next one."""
    return int(at / length + 1e-9)


@final
class FileSource(Source):
    """The segments of a file, decoded lazily; the audio is heard first, for the maximum of its mel (`LogMel.pieces`).

    `audio_path` replaces the file's own audio track. With `causal` the mel is normalised by the running maximum, as in
    a live stream, so no segment depends on later audio; `asks` imply it. Iterating raises MediaError: `no_video` or
    `no_audio` when a track selected by `options.tracks` is missing, and all others of `read_frames` and `read_audio`.
    """

    def __init__(
        self,
        path: Video | str,
        audio_path: Path | str | None = None,
        *,
        options: SourceOptions,
        geometry: Geometry,
        start: float = 0.0,
        end: float | None = None,
        causal: bool = False,
        asks: Sequence[float] = (),
    ) -> None:
        super().__init__(options, geometry, asks)
        self.path: Video = path if isinstance(path, FrameList) else Path(path)
        self.audio_path: Video = Path(audio_path) if audio_path else self.path
        self.start, self.end, self.causal = start, end, causal or bool(asks)
        self._state: tuple[tuple[int, ...], ...] | None = None

    def watched(self) -> "FileSource":
        """Itself; `unchanged` compares its files with what they are now, also in a process that only decodes it."""
        self._state = self._state_now()
        return self

    @property
    def unchanged(self) -> bool:
        return self._state in (None, self._state_now())

    def _state_now(self) -> tuple[tuple[int, ...], ...]:
        files = dict.fromkeys(files_of((self.path, self.audio_path)))
        return tuple(state_of(path) if path.is_file() else () for path in files)

    def _read_frames(self) -> Iterator[UInt8[Tensor, "3 _ _"]]:
        for _, frame in read_frames(self.path, fps=self.options.fps, start=self.start, end=self.end):
            height, width = frame.shape[1:]
            if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
                message = f"frames of {width}x{height} are narrower than 1:{MAX_ASPECT_RATIO}; crop the video first"
                raise MediaError(self.path, "unreadable", message)
            yield frame

    def _read_mel(self, mel_frames: int) -> "Iterator[_Piece]":
        if self.geometry.windowed or self.causal:
            pieces = _window_pieces if self.geometry.windowed else _running_pieces
            return pieces(self.geometry, self._counted(self._audio_blocks()), mel_frames, self.asks)
        return (_Piece(mel=piece) for piece in self.geometry.mel.pieces(self._all_samples, mel_frames))

    def _all_samples(self) -> Iterator[Float[Tensor, " samples"]]:
        """The samples of the clip, counted from 0 by each reading."""
        self._samples = 0
        return self._counted(self._audio_blocks())

    def _audio_blocks(self) -> Iterator[Float[Tensor, " samples"]]:
        """The samples of the clip from its beginning, in blocks."""
        rate = self.geometry.mel.rate
        return read_audio_blocks(self.audio_path, rate=rate, start=self.start, end=self.end)


@final
class LiveSource(Source):
    """The segments of a live stream, each as soon as both tracks cover it; can be iterated once.

    `frames` yields (seconds since the beginning, frame) in order of time, `audio` mono samples at the checkpoint's
    rate without gaps; both may block until there is more, and end when the stream ends. A segment is yielded when its
    last frame time is reached and the audio is half a mel window past its end. Frames equal those of a FileSource with
    the same input (the last frame is assumed to last as long as the one before). Mel is normalised by the running
    maximum: equal to that of FileSource from the segment with the clip's maximum on, and before it wherever the value
    of FileSource is not its floor (`RunningMel`). Raises ValueError when a track selected by `options.tracks` is None.
    """

    def __init__(
        self,
        frames: Iterator[tuple[float, UInt8[Tensor, "3 _ _"]]] | None,
        audio: Iterator[Float[Tensor, " _"]] | None,
        *,
        options: SourceOptions,
        geometry: Geometry,
        asks: Sequence[float] = (),
    ) -> None:
        super().__init__(options, geometry, asks)
        for name, track, unused in (("frames", frames, "audio"), ("audio", audio, "video")):
            if track is None and options.tracks != unused:
                raise ValueError(f"tracks: {options.tracks} needs {name}, got None; pass them or set tracks: {unused}")
        self._frames, self._audio = frames or iter(()), audio or iter(())

    def _read_frames(self) -> Iterator[UInt8[Tensor, "3 _ _"]]:
        for _, frame in sample_by_time(self._timed_frames(), self.options.fps):
            yield frame

    def _timed_frames(self) -> Iterator[tuple[float, float, Tensor]]:
        """(time, duration, frame), with the duration of the frame before."""
        before: float | None = None
        for time, frame in self._frames:
            yield time, 1 / self.options.fps if before is None else time - before, frame
            before = time

    def _read_mel(self, mel_frames: int) -> "Iterator[_Piece]":
        pieces = _window_pieces if self.geometry.windowed else _running_pieces
        return pieces(self.geometry, self._counted(self._audio), mel_frames, self.asks)


@final
@dataclass(frozen=True, kw_only=True)
class _Piece:
    """The mel of a segment, and of its part before each time of a question within it."""

    mel: Float[Tensor, "mels _"] | None
    rests: Mapping[float, Float[Tensor, "mels _"]] = field(default_factory=dict)


def _window_pieces(
    geometry: Geometry, blocks: Iterable[Float[Tensor, " _"]], mel_frames: int, asks: Sequence[float] = ()
) -> Iterator[_Piece]:
    """Pieces of `mel_frames`, whole windows, each padded and normalised by itself; none needs later audio."""
    mel = geometry.mel
    window = int(geometry.segment_seconds * mel.rate / mel.hop)
    length, seconds = mel_frames * mel.hop, mel_frames * mel.hop / mel.rate
    held, number = torch.empty(0), 0

    def windows(samples: Tensor) -> Tensor:
        return torch.cat([mel.window(part, window) for part in samples.split(window * mel.hop)], dim=1)

    def piece(samples: Tensor) -> _Piece:
        here = [at for at in asks if segment_of(at, seconds) == number]
        begun = {at: samples[: round(at * mel.rate) - number * length] for at in here}
        return _Piece(mel=windows(samples), rests={at: windows(part) for at, part in begun.items() if len(part)})

    for block in blocks:
        held = torch.cat([held, block])
        while len(held) >= length:
            yield piece(held[:length])
            held, number = held[length:], number + 1
    if len(held):
        yield piece(held)


def _running_pieces(
    geometry: Geometry, blocks: Iterable[Float[Tensor, " _"]], mel_frames: int, asks: Sequence[float] = ()
) -> Iterator[_Piece]:
    """Pieces of `mel_frames`, each as soon as its samples are there, normalised by the maximum up to its end."""
    mel = geometry.mel
    running, waiting, fed = RunningMel(mel), deque(asks), 0
    length = mel_frames * mel.hop / mel.rate
    rests: dict[float, Tensor] = {}

    def first_of(at: float) -> int:
        return segment_of(at, length) * mel_frames

    def note(at: float) -> None:
        rest = _rest(running, first_of(at), mel_frames)
        if rest is not None:
            rests[at] = rest

    def piece() -> _Piece:
        begun = {at: rests.pop(at) for at in list(rests) if first_of(at) <= running.taken}
        return _Piece(mel=running.take(min(mel_frames, running.ready)), rests=begun)

    # 1. feed up to each question, then what follows
    for block in blocks:
        samples = block
        while len(samples):
            until = len(samples) if not waiting else min(len(samples), max(0, round(waiting[0] * mel.rate) - fed))
            running.feed(samples[:until])
            fed, samples = fed + until, samples[until:]
            while waiting and fed >= round(waiting[0] * mel.rate):
                note(waiting.popleft())
            while running.ready >= mel_frames and not (waiting and first_of(waiting[0]) <= running.taken):
                yield piece()  # once all rests of its segment are there
    # 2. the end of the audio
    for at in waiting:
        note(at)
    running.end()
    while running.ready:
        yield piece()


def _rest(running: RunningMel, first: int, mel_frames: int) -> Float[Tensor, "mels _"] | None:
    """The mel from frame `first` on, at most `mel_frames`, if the audio ended with the samples fed so far."""
    ended = copy(running)  # its tensors are replaced, never changed in place
    ended.end()
    ended.skip(first)
    return ended.take(min(mel_frames, ended.ready)) if ended.ready else None
