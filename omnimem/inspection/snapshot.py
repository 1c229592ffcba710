"""Snapshot of a stream for display: thumbnails, a waveform, and the arrival number of every visual and audio token."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, final

import av
import numpy as np
import torch
from jaxtyping import Float64, Int64, UInt8
from torch import Tensor

from omnimem.data import ManifestError, Sample, is_seconds
from omnimem.errors import counted
from omnimem.media import FileSource, Segment, read_audio_blocks, resize
from omnimem.policies.base import StreamOutline
from omnimem.rows import tracks_of
from omnimem.streaming.encoder_cache import EncodedSegment
from omnimem.streaming.feeder import EncodedSample, Feeder
from omnimem.tokens import Modality

SIDE = 128  # pixels of the longer side of a thumbnail
MAX_BINS = 2400  # of a waveform
BINS_PER_SECOND = 20


@final
@dataclass(frozen=True, kw_only=True)
class Grid:
    """The visual tokens of one frame grid."""

    start: float  # seconds
    end: float
    rows: int
    columns: int
    tokens: Int64[np.ndarray, " cells"]  # arrival numbers, row by row
    thumbnails: tuple[bytes, ...]  # JPEG files, one per frame


@final
@dataclass(frozen=True, kw_only=True)
class Sounds:
    """The audio tokens of the whole stream, and its waveform."""

    starts: Float64[np.ndarray, " sounds"]  # seconds
    ends: Float64[np.ndarray, " sounds"]
    tokens: Int64[np.ndarray, " sounds"]  # arrival numbers
    peaks: UInt8[np.ndarray, " bins"]  # maximum amplitude in bins of equal length, scaled to 255
    bin_seconds: float


@final
@dataclass(frozen=True, kw_only=True)
class Mark:
    """A question, and the time span in which its answer was seen or heard."""

    question: str
    answer: str
    start: float  # seconds of the stream
    end: float


@final
@dataclass(frozen=True, kw_only=True)
class StreamSnapshot:
    """One encoded stream with the data to display it."""

    opened: EncodedSample
    seconds: float
    tokens: int  # text, audio and visual
    grids: tuple[Grid, ...]
    sounds: Sounds
    marks: tuple[Mark, ...]
    needles: tuple[int, ...]  # arrival numbers of tokens that the sample names

    @property
    def media(self) -> list[int]:
        """Arrival numbers of all visual and audio tokens."""
        visual = [number for grid in self.grids for number in grid.tokens.tolist()]
        return [*visual, *self.sounds.tokens.tolist()]


def read(feeder: Feeder, sample: Sample) -> StreamSnapshot:
    """Decode and encode a sample.

    Raises MediaError when it cannot be read, ManifestError when its meta is invalid.
    """
    # 1. check the annotations
    marks = marks_of(sample)
    check_needles(sample)
    # 2. decode and encode
    source, fps = feeder.source(sample), feeder.options.fps
    thumbnails = _Thumbnails(source, feeder.backbone.geometry.temporal_patch)
    parts = [part for part in feeder.read(sample, thumbnails) if part.encoded.at is None]
    opened = EncodedSample(
        sample=sample,
        segments=[part.encoded for part in parts],
        tracks=tracks_of(sample, feeder.options.tracks),
        heard=parts[-1].heard,
    )
    # 3. assign arrival numbers
    outline = feeder.outline(opened)
    return StreamSnapshot(
        opened=opened,
        seconds=source.seconds,
        tokens=len(outline.modality),
        grids=tuple(_grids(outline, parts, thumbnails.grids, feeder.backbone.geometry.temporal_patch / fps)),
        sounds=_sounds(outline, parts, source),
        marks=marks,
        needles=outline.needles,
    )


def marks_of(sample: Sample) -> tuple[Mark, ...]:
    """The times of the answers from `meta.evidence`, [start, end] in seconds of the file for each question.

    Raises ManifestError for any other content.
    """
    spans: Any = sample.meta.get("evidence", [])
    asked = sample.questions
    if not spans:
        return ()
    if len(spans) != len(asked) or not all(map(_is_span, spans)):
        what = f"expected [start, end] in seconds for each of {counted(len(asked), 'question')}; fix or remove it"
        raise ManifestError([f"{sample.origin} meta.evidence: {what}"])
    return tuple(
        Mark(question=one.text, answer=one.answer or "", start=start - sample.start, end=end - sample.start)
        for one, (start, end) in zip(asked, spans, strict=True)
    )


def check_needles(sample: Sample) -> None:
    """Raises ManifestError unless `meta.needles` are [second] or [second, y, x], y and x from 0 to below 1."""
    for needle in sample.meta.get("needles", ()):
        valid = isinstance(needle, list | tuple) and len(needle) in (1, 3) and all(map(is_seconds, needle))
        if not valid or any(part >= 1 for part in needle[1:]):
            what = f"expected [second] or [second, y, x], y and x from 0 to below 1, got {needle!r}; fix or remove it"
            raise ManifestError([f"{sample.origin} meta.needles: {what}"])


def _is_span(span: Any) -> bool:
    return isinstance(span, list | tuple) and len(span) == 2 and all(map(is_seconds, span)) and span[0] < span[1]


@final
class _Thumbnails:
    """Collects thumbnails of the frames of every grid while segments are read."""

    def __init__(self, source: FileSource, frames_per_grid: int) -> None:
        self._source, self._frames_per_grid, self.options = source, frames_per_grid, source.options
        self.grids: list[tuple[bytes, ...]] = []

    @property
    def unchanged(self) -> bool:
        """As `FileSource.unchanged`."""
        return self._source.unchanged

    def __iter__(self) -> Iterator[Segment]:
        for segment in self._source:
            if segment.frames is not None and segment.at is None:
                small = [jpeg(frame) for frame in _shrink(segment.frames)]
                each = self._frames_per_grid
                self.grids += [tuple(small[first : first + each]) for first in range(0, len(small), each)]
            yield segment


def _shrink(frames: UInt8[Tensor, "frames 3 _ _"]) -> UInt8[Tensor, "frames 3 _ _"]:
    height, width = frames.shape[2:]
    scale = min(1.0, SIDE / max(height, width))
    return resize(frames, max(1, round(scale * height)), max(1, round(scale * width)))


def jpeg(image: UInt8[Tensor, "3 height width"]) -> bytes:
    """Encode an image as a JPEG file without chroma subsampling."""
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuvj444p")
    encoder: Any = av.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height, encoder.pix_fmt = frame.width, frame.height, "yuvj444p"
    encoder.time_base, encoder.options = Fraction(1), {"qmin": "2", "qmax": "5"}
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])


def _grids(
    outline: StreamOutline, parts: Sequence[EncodedSegment], thumbnails: Sequence[tuple[bytes, ...]], spacing: float
) -> Iterator[Grid]:
    """The grids in order of time; in every layout the tokens of one modality are in the order of the segments."""
    tokens = torch.nonzero(outline.modality == Modality.VISUAL)[:, 0].numpy()
    images = iter(thumbnails)
    for part in parts:
        times, rows, columns = part.encoded.grid
        last = part.encoded.start + part.encoded.seconds
        for number in range(times):
            start = part.encoded.start + number * spacing
            mine, tokens = np.split(tokens, [rows * columns])
            end = min(start + spacing, last)
            yield Grid(start=start, end=end, rows=rows, columns=columns, tokens=mine, thumbnails=next(images))


def _sounds(outline: StreamOutline, parts: Sequence[EncodedSegment], source: FileSource) -> Sounds:
    # 1. divide the audio of each segment equally among its tokens
    starts: list[float] = []
    ends: list[float] = []
    before = 0.0
    for part in parts:
        seconds, before = part.heard.audio_seconds - before, part.heard.audio_seconds
        count = 0 if part.encoded.audio is None else part.encoded.audio.shape[1]
        starts += [part.encoded.start + seconds * number / count for number in range(count)]
        ends += [part.encoded.start + seconds * (number + 1) / count for number in range(count)]
    # 2. read the waveform
    peaks, bin_seconds = _peaks(source) if starts else (np.zeros(0, np.uint8), 1.0)
    return Sounds(
        starts=np.asarray(starts, np.float64),
        ends=np.asarray(ends, np.float64),
        tokens=torch.nonzero(outline.modality == Modality.AUDIO)[:, 0].numpy(),
        peaks=peaks,
        bin_seconds=bin_seconds,
    )


def _peaks(source: FileSource) -> tuple[UInt8[np.ndarray, " bins"], float]:
    """The maximum amplitude in each bin, and the length of a bin in seconds."""
    rate = source.geometry.mel.rate
    wide = max(1, round(rate * max(1 / BINS_PER_SECOND, source.seconds / MAX_BINS)))
    peaks = np.zeros(math.ceil(source.seconds * rate / wide), np.float32)
    done = 0
    for block in read_audio_blocks(source.audio_path, rate=rate, start=source.start, end=source.end):
        place = (done + np.arange(len(block))) // wide
        inside = place < len(peaks)  # ignore the padding of a codec's last block
        np.maximum.at(peaks, place[inside], np.abs(block.numpy())[inside])
        done += len(block)
    return np.round(255 * peaks / (float(peaks.max()) or 1.0)).astype(np.uint8), wide / rate
