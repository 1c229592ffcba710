"""Decoding by timestamp with PyAV: video frames at a chosen rate, audio as mono samples."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np
import torch
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import Float, UInt8
from torch import Tensor

from omnimem.limits import exceeds
from omnimem.media.container import (
    Clock,
    MediaError,
    Plausible,
    audio_stream,
    check_whole,
    decodable,
    is_empty,
    may_restart,
    open_container,
    open_image,
    origin,
    probe,
    refuse_large,
    video_stream,
)
from omnimem.media.frames import FrameList, Video

Image = TypeVar("Image")
Samples = Float[np.ndarray, " samples"]  # numpy has less overhead than torch for small blocks
Frame = TypeVar("Frame", AudioFrame, VideoFrame)

TICK = 1e-3  # seconds; resolution of the coarsest timestamps in use (Matroska)
GAP = 0.05  # seconds; longer gaps in the audio timestamps become silence, shorter ones are jitter
LONGEST_GAP = 6 * 3600.0  # seconds; timestamps that jump further are damaged
PREROLL = 0.2  # seconds decoded before a clip, because codecs with overlapping blocks need some to settle
PLANES = 8  # from this number of channels on, PyAV reads planes that are not there
BLOCK_SAMPLES = 1 << 18  # minimum length of an audio block
THREADED_PIXELS = 640 * 360  # for smaller frames starting threads takes longer than decoding


def read_frames(
    path: Video | str, *, fps: float, start: float = 0.0, end: float | None = None
) -> Iterator[tuple[float, UInt8[Tensor, "3 height width"]]]:
    """Yield (time, frame) for each time start + i / fps before `end` (default: the end of the video), lazily.

    The frame of time t is the last one with a timestamp of at most t, so variable frame rates need no special case.
    Raises MediaError: as `probe`, and `no_video`, `empty` (no frame in the clip), `truncated` (after the last frame).
    """
    empty = True
    listed = isinstance(path, FrameList)
    for time, frame in _listed(path, fps, start, end) if listed else _from_file(path, fps, start, end):
        empty = False
        yield time, frame
    if empty:
        raise MediaError(path, "empty", f"has no video frame {_span(start, end)}; check start and end, or the file")


def _from_file(path: Path | str, fps: float, start: float, end: float | None) -> Iterator[tuple[float, Tensor]]:
    with open_container(path) as container:
        stream = decodable(video_stream(container))
        if stream is None:
            raise MediaError(path, "no_video", "has no video track; use tracks: audio or give another file")
        converter = VideoReformatter()
        for time, frame in sample_by_time(_timed_frames(container, stream, path, start, end), fps, start, end):
            yield time, upright(frame, converter)


def _listed(frames: FrameList, fps: float, start: float, end: float | None) -> Iterator[tuple[float, Tensor]]:
    """The frames of a list; of those that are not shown at any of the times nothing is read."""
    timed = ((number / frames.fps, 1 / frames.fps, number) for number in range(len(frames.files)))
    shown, frame = -1, torch.empty(0)
    for time, number in sample_by_time(timed, fps, start, end):
        if number != shown:
            size, shown, frame = frame.shape, number, read_image(frames.files[number])
            if len(size) == 3 and frame.shape != size:
                found, first = (f"{width} x {height}" for height, width in (frame.shape[1:], size[1:]))
                what = f"has {found} pixels, the frame before it {first}; make all frames of a list the same size"
                raise MediaError(frames.files[number], "unreadable", what)
        yield time, frame


def read_image(path: Path) -> UInt8[Tensor, "3 height width"]:
    """An image file as RGB, upright. Raises MediaError: `missing`, `empty`, `unreadable`, `truncated`."""
    with open_image(path) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None:
            raise MediaError(path, "truncated", "holds no image; copy it again")
        return upright(frame, VideoReformatter())


def read_audio(
    path: Video | str, *, rate: int = 16000, start: float = 0.0, end: float | None = None
) -> Float[Tensor, " samples"]:
    """The audio track between `start` and `end` seconds at `rate` Hz, the mean of its channels, in [-1, 1].

    Samples are placed by timestamp: gaps and a late start become silence. Raises MediaError: as `probe`, and
    `no_audio`, `empty` (no audio in the clip), `truncated`.
    """
    return torch.cat(list(read_audio_blocks(path, rate=rate, start=start, end=end)))


def read_audio_blocks(
    path: Video | str, *, rate: int = 16000, start: float = 0.0, end: float | None = None
) -> Iterator[Float[Tensor, " samples"]]:
    """Yield the samples of `read_audio` lazily, in blocks of some seconds, so memory use does not grow with length."""
    if isinstance(path, FrameList):
        raise MediaError(path, "no_audio", "is a list of frames; name an audio file, or use tracks: video")
    with open_container(path) as container:
        stream = decodable(audio_stream(container))
        if stream is None:
            raise MediaError(path, "no_audio", "has no audio track; use tracks: video or give an audio file")
        held: list[Samples] = []
        count, empty = 0, True
        for block in contiguous(_timed_audio(container, stream, path, start, end), rate, start, end):
            held.append(block)
            count, empty = count + len(block), False
            if count >= BLOCK_SAMPLES:
                yield torch.from_numpy(np.concatenate(held))
                held, count = [], 0
        if empty:
            raise MediaError(path, "empty", f"has no audio {_span(start, end)}; check start and end, or the file")
        if held:
            yield torch.from_numpy(np.concatenate(held))


def contiguous(
    timed: Iterable[tuple[float, AudioFrame]], rate: int, start: float = 0.0, end: float | None = None
) -> Iterator[Samples]:
    """Mono samples at `rate` from `start` to `end` without gaps, given audio frames with their times."""
    done = 0  # samples yielded
    place = 0  # index of the next block's first sample, at time start + index / rate
    limit = None if end is None else round((end - start) * rate)
    for begun, block in _resampled(timed, rate):
        place = place if begun is None else round((begun - start) * rate)
        after = place + len(block)
        while (place if limit is None else min(place, limit)) - done > BLOCK_SAMPLES:
            done += BLOCK_SAMPLES
            yield np.zeros(BLOCK_SAMPLES, np.float32)
        if place > done:
            block = np.concatenate([np.zeros(place - done, np.float32), block])
        block = block[max(0, done - place) :]
        block = block if limit is None else block[: max(0, limit - done)]
        place, done = after, done + len(block)
        if len(block):
            yield block


def sample_by_time(
    timed: Iterable[tuple[float, float, Image]], fps: float, start: float = 0.0, end: float | None = None
) -> Iterator[tuple[float, Image]]:
    """Select from (time, duration, frame) in order of time the frame shown at each start + i / fps, without delay.

    The first frame is also shown before its time, the last one for its duration.
    """
    index, shown, until = 0, None, start
    stop = float("inf") if end is None else end
    for time, duration, frame in timed:
        # 1. times before this frame show the one before
        while shown is not None and start + index / fps < min(time, stop) - TICK:
            yield start + index / fps, shown
            index += 1
        # 2. a time at its timestamp shows this frame at once
        shown, until = frame, time + duration
        if abs(start + index / fps - time) <= TICK and time < stop - TICK:
            yield start + index / fps, shown
            index += 1
        if start + index / fps >= stop - TICK:
            return
    # 3. the last frame
    while shown is not None and start + index / fps < min(until, stop) - TICK:
        yield start + index / fps, shown
        index += 1


def _span(start: float, end: float | None) -> str:
    return f"from {start:g} s to {'the end' if end is None else f'{end:g} s'}"


def _frames(container: InputContainer, stream: VideoStream | AudioStream) -> Iterator[Any]:
    """All frames of a track. An empty packet shows the video frame before it again (Theora)."""
    frame: Any = None
    for packet in container.demux(stream):
        if not is_empty(packet):
            for frame in packet.decode():
                yield frame
        elif isinstance(frame, VideoFrame):
            frame.pts, frame.time_base = packet.pts, packet.time_base
            yield frame


def _decoded(
    container: InputContainer, path: Path | str, decode: Callable[[], Iterator[Frame]], start: float
) -> Iterator[Frame]:
    """Decoded frames, from shortly before `start` on."""
    zero, frames = origin(container), decode()
    joined = start > PREROLL and bool(_restarts(container, path))  # a time then has several places
    if start > PREROLL and not joined and container.duration is not None:  # raw streams have none and cannot seek
        container.seek(int((start - PREROLL + zero) * av.time_base))
        first = next(frames, None)
        if first is None or first.time is None or first.time - zero > start:
            container.seek(0)  # without an index, seeking may end up after `start`
            frames = decode()
        else:
            yield first
    yield from frames


def _timed_frames(
    container: InputContainer, stream: VideoStream, path: Path | str, start: float, end: float | None
) -> Iterator[tuple[float, float, VideoFrame]]:
    """(time, duration, frame) of a video track; raises MediaError at its end if it is truncated."""
    if stream.width * stream.height > THREADED_PIXELS:
        stream.thread_type = "AUTO"
    still, reached, frames = False, 0.0, _decoded(container, path, lambda: _frames(container, stream), start)
    plausible, restarts = Plausible(path), _restarts(container, path)
    plausible.refuse_track(container, stream, end)
    for number, (time, duration, frame) in enumerate(timed_frames(frames, container, stream, start, restarts), start=1):
        plausible.refuse_length(time + duration if end is None else min(time + duration, end))
        plausible.refuse_frames(number)
        still, reached = reached == 0.0, time + duration
        yield time, duration, frame
    check_whole(path, container, stream, end, reached, still=still)


def timed_frames(
    frames: Iterable[VideoFrame],
    container: InputContainer,
    stream: VideoStream,
    start: float = 0.0,
    restarts: Sequence[float] = (),
) -> Iterator[tuple[float, float, VideoFrame]]:
    """(time, duration, frame) by `Clock`; a frame without a timestamp follows the one before."""
    reached, clock = 0.0, Clock(container, list(restarts))
    for frame in frames:
        time = reached if frame.time is None else _plausible(clock.seconds(frame.time, reached), reached, start)
        duration = 1.0 / float(stream.average_rate or 25.0)
        if frame.duration and frame.time_base:
            duration = float(frame.duration * frame.time_base)
        reached = time + duration
        yield time, duration, frame


def _restarts(container: InputContainer, path: Path | str) -> tuple[float, ...]:
    """The restarts of the clock of a file; empty, without reading it, in formats that have none."""
    return probe(path, measure=True).restarts if may_restart(container) else ()


def _plausible(time: float, reached: float, start: float) -> float:
    """The time of a frame; raises ValueError if it is far after the frame before, or the beginning of the clip."""
    if time > max(reached, start) + LONGEST_GAP:
        raise ValueError(f"its timestamps jump from {max(reached, start):.0f} s to {time:.0f} s")
    return time


def upright(frame: VideoFrame, converter: VideoReformatter) -> UInt8[Tensor, "3 height width"]:
    """The frame as RGB, with the container's rotation applied; raises ValueError for frames that are too large.

    `converter` is that of the whole stream: it keeps its tables and threads from frame to frame.
    """
    refuse_large(frame.width, frame.height)
    threads = 0 if frame.width * frame.height > THREADED_PIXELS else 1
    coloured = converter.reformat(frame, format="rgb24", threads=threads)
    pixels = torch.from_numpy(coloured.to_ndarray()).permute(2, 0, 1)
    return torch.rot90(pixels, round(frame.rotation / 90.0) % 4, dims=(1, 2)).contiguous()


def _timed_audio(
    container: InputContainer, stream: AudioStream, path: Path | str, start: float, end: float | None
) -> Iterator[tuple[float, AudioFrame]]:
    """(time, frame) of an audio track up to `end`; raises MediaError at its end if it is truncated."""
    reached, frames = 0.0, _decoded(container, path, lambda: _frames(container, stream), start)
    plausible, restarts = Plausible(path), _restarts(container, path)
    plausible.refuse_track(container, stream, end)
    for time, frame in timed_audio(frames, container, start, restarts):
        if end is not None and time >= end:
            return
        plausible.refuse_length(time)
        reached = time + frame.samples / frame.sample_rate
        yield time, frame
    check_whole(path, container, stream, end, reached)


def timed_audio(
    frames: Iterable[AudioFrame], container: InputContainer, start: float = 0.0, restarts: Sequence[float] = ()
) -> Iterator[tuple[float, AudioFrame]]:
    """(time, frame) by `Clock`; a frame without a timestamp follows the one before."""
    reached, clock = 0.0, Clock(container, list(restarts))
    for frame in frames:
        time = reached if frame.time is None else _plausible(clock.seconds(frame.time, reached), reached, start)
        reached = time + frame.samples / frame.sample_rate
        yield time, frame


def _resampled(timed: Iterable[tuple[float, AudioFrame]], rate: int) -> Iterator[tuple[float | None, Samples]]:
    """Mono blocks at `rate`, each with its time, or None when it continues the previous block.

    The resampler is recreated after a gap and a change of format, because it ignores timestamps.
    """
    reached, audio_format, resampler = 0.0, None, AudioResampler("fltp", rate=rate)
    for time, frame in timed:
        # 1. skip repeated audio
        if audio_format is not None and time < reached - GAP:
            continue  # timestamps went back
        # 2. restart after a gap or a change of format
        begun = None
        if time > reached + GAP or audio_format != (frame.format.name, frame.layout.name, frame.sample_rate):
            if audio_format is not None:
                yield None, _mono(resampler.resample(None))
            if what := exceeds("resampling", -(-rate // max(1, frame.sample_rate))):
                raise ValueError(f"audio of {frame.sample_rate} Hz at {rate} Hz: a factor of {what}")
            audio_format = (frame.format.name, frame.layout.name, frame.sample_rate)
            kind = "fltp" if frame.layout.nb_channels < PLANES else "flt"
            resampler, begun, reached = AudioResampler(kind, rate=rate), time, time
        # 3. resample
        yield begun, _mono(resampler.resample(frame))
        reached += frame.samples / frame.sample_rate
    if audio_format is not None:
        yield None, _mono(resampler.resample(None))


def _mono(frames: list[AudioFrame]) -> Samples:
    """Mean of the channels (ffmpeg's down-mix of float samples is 3 dB louder)."""
    blocks = [_mixed(frame) for frame in frames]
    if len(blocks) == 1:
        return blocks[0]
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32)


def _mixed(frame: AudioFrame) -> Samples:
    """Mean of the channels of one frame; a view of the only one of a mono frame."""
    if frame.layout.nb_channels == 1 and frame.format.name == "fltp":
        plane: Any = frame.planes[0]
        return np.frombuffer(plane, np.float32, frame.samples)
    return _channels(frame).mean(axis=0, dtype=np.float32)


def _channels(frame: AudioFrame) -> Float[np.ndarray, "channels samples"]:
    values = frame.to_ndarray()
    if frame.format.is_planar:
        return values
    return np.ascontiguousarray(values.reshape(frame.samples, frame.layout.nb_channels).T)
