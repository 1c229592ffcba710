"""Reads files by timestamp through PyAV: frames at a chosen rate, the whole audio track as mono."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import av
import numpy as np
import torch
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.error import EOFError as EndOfFileError
from av.error import FFmpegError, InvalidDataError
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from jaxtyping import Float, UInt8
from torch import Tensor

from omnimem.media.container import AGAIN, MediaError, audio_stream, check_whole, opened, origin, video_stream

Picture = TypeVar("Picture")
Sound = Float[np.ndarray, " samples"]  # small blocks: numpy costs less for each than torch
Frame = TypeVar("Frame", AudioFrame, VideoFrame)

TICK = 1e-3  # seconds; the coarsest clock in use (Matroska) rounds timestamps to it
GAP = 0.05  # seconds; longer holes in the audio timestamps become silence, shorter ones are clock jitter
PREROLL = 0.2  # seconds decoded before a clip, so that codecs that overlap their blocks have settled at its start
BLOCK_SAMPLES = 1 << 18  # what one block of sound holds
THREADED_PIXELS = 640 * 360  # starting threads costs more than decoding smaller pictures


def read_frames(
    path: Path | str, *, fps: float, start: float = 0.0, end: float | None = None
) -> Iterator[tuple[float, UInt8[Tensor, "3 height width"]]]:
    """Lazily the frame shown at each time start + i / fps before `end` (default: the end of the video), with that time.

    Shown at t is the last frame whose timestamp is at most t, so variable frame rates need no special case.
    Raises MediaError: as `probe`, and `no_video`, `empty` (no frame in the clip), `truncated` (after the last frame).
    """
    with opened(path) as container:
        stream = video_stream(container)
        if stream is None:
            raise MediaError(path, "no_video", "has no video track; use tracks: audio or give another file")
        empty = True
        for time, frame in sample_by_time(_timed_frames(container, stream, path, start, end), fps, start, end):
            empty = False
            yield time, upright(frame)
        if empty:
            raise MediaError(path, "empty", f"has no video frame {_span(start, end)}; check start and end, or the file")


def read_audio(
    path: Path | str, *, rate: int = 16000, start: float = 0.0, end: float | None = None
) -> Float[Tensor, " samples"]:
    """The whole audio track between `start` and `end` seconds at `rate` Hz, the mean of its channels, in [-1, 1].

    Samples stand where their timestamps say: holes and a late start are silence. Raises MediaError: as `probe`,
    and `no_audio`, `empty` (no sound in the clip), `truncated`.
    """
    return torch.cat(list(read_audio_blocks(path, rate=rate, start=start, end=end)))


def read_audio_blocks(
    path: Path | str, *, rate: int = 16000, start: float = 0.0, end: float | None = None
) -> Iterator[Float[Tensor, " samples"]]:
    """What `read_audio` reads, lazily in blocks of some seconds: an hour needs no hour in memory."""
    with opened(path) as container:
        stream = audio_stream(container)
        if stream is None:
            raise MediaError(path, "no_audio", "has no audio track; use tracks: video or give an audio file")
        held: list[Sound] = []
        many, empty = 0, True
        for block in contiguous(_timed_sound(container, stream, path, start, end), rate, start, end):
            held.append(block)
            many, empty = many + len(block), False
            if many >= BLOCK_SAMPLES:
                yield torch.from_numpy(np.concatenate(held))
                held, many = [], 0
        if empty:
            raise MediaError(path, "empty", f"has no audio {_span(start, end)}; check start and end, or the file")
        if held:
            yield torch.from_numpy(np.concatenate(held))


def contiguous(
    timed: Iterable[tuple[float, AudioFrame]], rate: int, start: float = 0.0, end: float | None = None
) -> Iterator[Sound]:
    """Mono samples at `rate` from `start` on without a hole, of audio frames with their times."""
    done, place = (
        0,
        0,
    )  # samples yielded; index of the next block's first sample, which is heard at start + index / rate
    limit = None if end is None else round((end - start) * rate)
    for begun, block in _resampled(timed, rate):
        place = place if begun is None else round((begun - start) * rate)
        after = place + len(block)
        if place > done:
            block = np.concatenate([np.zeros(place - done, np.float32), block])
        block = block[max(0, done - place) :]
        block = block if limit is None else block[: max(0, limit - done)]
        place, done = after, done + len(block)
        if len(block):
            yield block


def sample_by_time(
    timed: Iterable[tuple[float, float, Picture]], fps: float, start: float = 0.0, end: float | None = None
) -> Iterator[tuple[float, Picture]]:
    """Of frames (time, duration, picture) in order of time, the one shown at each start + i / fps, as soon as known.

    The last frame is shown for its duration; the first one also before its time.
    """
    index, shown, until = 0, None, start
    for time, duration, picture in timed:
        while shown is not None and start + index / fps < min(time, _or_infinite(end)) - TICK:
            yield start + index / fps, shown
            index += 1
        shown, until = picture, time + duration
        if abs(start + index / fps - time) <= TICK and time < _or_infinite(end) - TICK:
            yield start + index / fps, shown
            index += 1
        if start + index / fps >= _or_infinite(end) - TICK:
            return
    while shown is not None and start + index / fps < min(until, _or_infinite(end)) - TICK:
        yield start + index / fps, shown
        index += 1


def _or_infinite(end: float | None) -> float:
    return float("inf") if end is None else end


def _span(start: float, end: float | None) -> str:
    return f"from {start:g} s to {'its end' if end is None else f'{end:g} s'}"


def _decoded(
    container: InputContainer, decode: Callable[[], Iterator[Frame]], path: Path | str, start: float
) -> Iterator[Frame]:
    """Frames from a little before `start` on; failures of the decoder are MediaErrors."""
    zero, frames = origin(container), decode()
    try:
        if start > PREROLL and container.duration is not None:  # a bare stream has no length and cannot be searched
            container.seek(int((start - PREROLL + zero) * av.time_base))
            first = next(frames, None)
            if first is None or first.time is None or first.time - zero > start:
                container.seek(0)  # a format without an index may land too late
                frames = decode()
            else:
                yield first
        yield from frames
    except FFmpegError as error:
        cut = isinstance(error, (InvalidDataError, EndOfFileError))
        message = f"breaks off while decoding ({error.strerror}); {AGAIN}"
        raise MediaError(path, "truncated" if cut else "unreadable", message) from error


def _timed_frames(
    container: InputContainer, stream: VideoStream, path: Path | str, start: float, end: float | None
) -> Iterator[tuple[float, float, VideoFrame]]:
    """(time, duration, frame) of a video track; checks at its end that it is whole."""
    if stream.width * stream.height > THREADED_PIXELS:
        stream.thread_type = "AUTO"
    reached = 0.0
    for frame in _decoded(container, lambda: container.decode(stream), path, start):
        time, lasting = timing(frame, container, stream, reached)
        reached = time + lasting
        yield time, lasting, frame
    check_whole(path, container, stream, end, reached)


def timing(frame: VideoFrame, container: InputContainer, stream: VideoStream, reached: float) -> tuple[float, float]:
    """(time, duration) of a frame in seconds from the origin; one without a timestamp follows at `reached`."""
    time = reached if frame.time is None else frame.time - origin(container)
    if frame.duration and frame.time_base:
        return time, float(frame.duration * frame.time_base)
    return time, 1.0 / float(stream.average_rate or 25.0)


def upright(frame: VideoFrame) -> UInt8[Tensor, "3 height width"]:
    """RGB, turned as the container says."""
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    return torch.rot90(pixels, round(frame.rotation / 90.0) % 4, dims=(1, 2)).contiguous()


def _timed_sound(
    container: InputContainer, stream: AudioStream, path: Path | str, start: float, end: float | None
) -> Iterator[tuple[float, AudioFrame]]:
    """(time, frame) of an audio track up to `end`; checks at its end that it is whole."""
    zero, reached = origin(container), 0.0
    for frame in _decoded(container, lambda: container.decode(stream), path, start):
        time = reached if frame.time is None else frame.time - zero
        if time >= _or_infinite(end):
            return
        reached = time + frame.samples / frame.sample_rate
        yield time, frame
    check_whole(path, container, stream, end, reached)


def _resampled(timed: Iterable[tuple[float, AudioFrame]], rate: int) -> Iterator[tuple[float | None, Sound]]:
    """Mono blocks at `rate`, each with its time where it does not simply continue the one before.

    A hole and a change of format begin anew, since a resampler knows no timestamps.
    """
    reached, form, resampler = 0.0, None, AudioResampler("fltp", rate=rate)
    for time, frame in timed:
        if form is not None and time < reached - GAP:
            continue  # the clock went back: this was heard already
        begun = None
        if time > reached + GAP or form != (frame.format.name, frame.layout.name, frame.sample_rate):
            if form is not None:
                yield None, _mono(resampler.resample(None))
            form = (frame.format.name, frame.layout.name, frame.sample_rate)
            resampler, begun, reached = AudioResampler("fltp", rate=rate), time, time
        yield begun, _mono(resampler.resample(frame))
        reached += frame.samples / frame.sample_rate
    if form is not None:
        yield None, _mono(resampler.resample(None))


def _mono(frames: list[AudioFrame]) -> Sound:
    """The mean of the channels (ffmpeg's own down-mix of floats is 3 dB louder)."""
    blocks = [frame.to_ndarray().mean(axis=0, dtype=np.float32) for frame in frames]
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
