"""Reads files by timestamp through PyAV: frames at a chosen rate, the whole audio track as mono, named errors."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, final

import av
import numpy as np
import torch
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.error import EOFError as EndOfFileError
from av.error import FFmpegError, InvalidDataError
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from jaxtyping import Float, UInt8
from torch import Tensor

Reason = Literal["missing", "unreadable", "no_video", "no_audio", "empty", "truncated"]
Picture = TypeVar("Picture")
Frame = TypeVar("Frame", AudioFrame, VideoFrame)

TICK = 1e-3  # seconds; the coarsest clock in use (Matroska) rounds timestamps to it
GAP = 0.05  # seconds; longer holes in the audio timestamps become silence, shorter ones are clock jitter
CODEC_FILLING = 0.1  # seconds; what audio codecs add at the beginning and the end to fill their blocks
PREROLL = 0.2  # seconds decoded before a clip, so that codecs that overlap their blocks have settled at its start
THREADED_PIXELS = 640 * 360  # starting threads costs more than decoding smaller pictures


@final
class MediaError(ValueError):
    """A media file that cannot be used: `path`, `reason`, and one line that says what is wrong and how to repair it."""

    def __init__(self, path: Path | str, reason: Reason, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = Path(path)
        self.reason: Reason = reason


@final
@dataclass(frozen=True, kw_only=True)
class MediaInfo:
    """What a container declares about itself, in seconds, pixels and frames per second; 0 where it does not say."""

    path: Path
    seconds: float
    video_seconds: float
    audio_seconds: float
    has_video: bool
    has_audio: bool
    width: int
    height: int
    frame_rate: float


def probe(path: Path | str) -> MediaInfo:
    """Reads the header of a file without decoding it; raises MediaError when it is missing, empty or unreadable."""
    with _opened(path) as container:
        video, audio = _video_stream(container), _audio_stream(container)
        video_seconds = _declared(container, video) if video else 0.0
        audio_seconds = _declared(container, audio) if audio else 0.0
        return MediaInfo(
            path=Path(path),
            seconds=max(video_seconds, audio_seconds),
            video_seconds=video_seconds,
            audio_seconds=audio_seconds,
            has_video=video is not None,
            has_audio=audio is not None,
            width=video.width if video else 0,
            height=video.height if video else 0,
            frame_rate=float(video.average_rate or 0.0) if video else 0.0,
        )


def read_frames(
    path: Path | str, *, fps: float, start: float = 0.0, end: float | None = None
) -> Iterator[tuple[float, UInt8[Tensor, "3 height width"]]]:
    """Lazily the frame shown at each time start + i / fps before `end` (default: the end of the video), with that time.

    Shown at t is the last frame whose timestamp is at most t, so variable frame rates need no special case.
    Raises MediaError: as `probe`, and `no_video`, `empty` (no frame in the clip), `truncated` (after the last frame).
    """
    with _opened(path) as container:
        stream = _video_stream(container)
        if stream is None:
            raise MediaError(path, "no_video", "has no video track; use tracks: audio or give another file")
        empty = True
        for time, frame in sample_by_time(_timed_frames(container, stream, path, start, end), fps, start, end):
            empty = False
            yield time, _pixels(frame)
        if empty:
            raise MediaError(path, "empty", f"has no video frame {_span(start, end)}; check start and end, or the file")


def read_audio(
    path: Path | str, *, rate: int = 16000, start: float = 0.0, end: float | None = None
) -> Float[Tensor, " samples"]:
    """The whole audio track between `start` and `end` seconds at `rate` Hz, the mean of its channels, in [-1, 1].

    Samples stand where their timestamps say: holes and a late start are silence. Raises MediaError: as `probe`,
    and `no_audio`, `empty`, `truncated`.
    """
    with _opened(path) as container:
        stream = _audio_stream(container)
        if stream is None:
            raise MediaError(path, "no_audio", "has no audio track; use tracks: video or give an audio file")
        runs = list(_audio_runs(container, stream, path, rate, start, end))
    placed = [(round((time - start) * rate), torch.from_numpy(run)) for time, run in runs if len(run)]
    length = max((first + len(run) for first, run in placed), default=0)
    if end is not None:
        length = min(length, round((end - start) * rate))
    if length <= 0:
        raise MediaError(path, "empty", f"has no audio {_span(start, end)}; check start and end, or the file")
    samples = torch.zeros(length)
    for first, run in placed:
        cut = max(0, -first)
        heard = run[cut : max(cut, length - first)]
        samples[first + cut : first + cut + len(heard)] = heard
    return samples


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


@contextmanager
def _opened(path: Path | str) -> Iterator[InputContainer]:
    """The container, open for reading; every failure is a MediaError. Only local files are followed."""
    if not Path(path).is_file():
        raise MediaError(path, "missing", "is not a file; check the path")
    if Path(path).stat().st_size == 0:
        raise MediaError(path, "empty", "has zero bytes; copy or download it again")
    try:
        container = av.open(str(path), options={"protocol_whitelist": "file"})
    except FFmpegError as error:
        message = f"cannot be read ({error.strerror}); it is no media file or was cut off: copy or convert it again"
        raise MediaError(path, "unreadable", message) from error
    with container:
        yield container


def _video_stream(container: InputContainer) -> VideoStream | None:
    """The first moving picture: cover art is no video track."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            return stream
    return None


def _audio_stream(container: InputContainer) -> AudioStream | None:
    return container.streams.audio[0] if container.streams.audio else None


def _declared(container: InputContainer, stream: VideoStream | AudioStream) -> float:
    """Seconds from the origin to the end of a stream as its container declares it, 0 when it does not."""
    if stream.duration is not None and stream.time_base is not None:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base) - _origin(container)
    if tag := stream.metadata.get("DURATION"):  # Matroska
        hours, minutes, seconds = tag.split(":")
        return 3600.0 * int(hours) + 60.0 * int(minutes) + float(seconds)
    alone = len(container.streams.video) + len(container.streams.audio) == 1
    return container.duration / av.time_base if alone and container.duration else 0.0


def _origin(container: InputContainer) -> float:
    """What the container's clock shows at our zero, in seconds, the same for both tracks: broadcast begins anywhere.

    The first picture, unless sound begins clearly earlier: what an audio codec begins with is no sound.
    """
    begin = max(0.0, (container.start_time or 0) / av.time_base)
    video = _video_stream(container)
    if video is None or video.start_time is None or video.time_base is None:
        return begin
    first = float(video.start_time * video.time_base)
    return first if 0.0 < first - begin <= CODEC_FILLING else begin


def _decoded(
    container: InputContainer, decode: Callable[[], Iterator[Frame]], path: Path | str, start: float
) -> Iterator[Frame]:
    """Frames from a little before `start` on; failures of the decoder are MediaErrors."""
    origin = _origin(container)
    try:
        frames = decode()
        if start > PREROLL:
            container.seek(int((start - PREROLL + origin) * av.time_base))
            first = next(frames, None)
            if first is None or first.time is None or first.time - origin > start:
                container.seek(0)  # a format without an index may land too late
                frames = decode()
            else:
                yield first
        yield from frames
    except FFmpegError as error:
        cut = isinstance(error, (InvalidDataError, EndOfFileError))
        message = f"breaks off while decoding ({error.strerror}); copy or convert it again"
        raise MediaError(path, "truncated" if cut else "unreadable", message) from error


def _check_whole(path: Path | str, track: str, declared: float, end: float | None, reached: float) -> None:
    """Raises MediaError when a track ends more than 1 s and more than 2 % before it should."""
    due = min(declared, _or_infinite(end))
    if due - reached > max(1.0, 0.02 * due):
        message = f"{track} ends at {reached:.1f} s of {due:.1f} s declared; copy or convert the file again"
        raise MediaError(path, "truncated", message)


def _timed_frames(
    container: InputContainer, stream: VideoStream, path: Path | str, start: float, end: float | None
) -> Iterator[tuple[float, float, VideoFrame]]:
    """(time, duration, frame) of a video stream; checks at its end that it is whole."""
    if stream.width * stream.height > THREADED_PIXELS:
        stream.thread_type = "AUTO"
    origin, step = _origin(container), 1.0 / float(stream.average_rate or 25.0)
    reached = 0.0
    for frame in _decoded(container, lambda: container.decode(stream), path, start):
        time = reached if frame.time is None else frame.time - origin
        lasting = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else step
        reached = time + lasting
        yield time, lasting, frame
    _check_whole(path, "video", _declared(container, stream), end, reached)


def _pixels(frame: VideoFrame) -> UInt8[Tensor, "3 height width"]:
    """RGB, turned upright as the container says."""
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    return torch.rot90(pixels, round(frame.rotation / 90.0) % 4, dims=(1, 2)).contiguous()


def _audio_runs(
    container: InputContainer, stream: AudioStream, path: Path | str, rate: int, start: float, end: float | None
) -> Iterator[tuple[float, Float[np.ndarray, " samples"]]]:
    """(time, mono samples at `rate`) of each stretch without a hole or a change of format."""
    origin, reached = _origin(container), 0.0
    resampler, form, begun, blocks = AudioResampler("fltp", rate=rate), None, start, []
    for frame in _decoded(container, lambda: container.decode(stream), path, start):
        time = reached if frame.time is None else frame.time - origin
        if time >= _or_infinite(end):
            break
        if time < reached - GAP:
            continue  # the clock went back: this was heard already
        if time > reached + GAP or form != (frame.format.name, frame.layout.name, frame.sample_rate):
            yield begun, _mono(blocks, resampler)
            resampler, blocks, begun, reached = AudioResampler("fltp", rate=rate), [], time, time
            form = (frame.format.name, frame.layout.name, frame.sample_rate)
        blocks += resampler.resample(frame)
        reached += frame.samples / frame.sample_rate
    yield begun, _mono(blocks, resampler)
    _check_whole(path, "audio", _declared(container, stream), end, reached)


def _mono(blocks: list[AudioFrame], resampler: AudioResampler) -> Float[np.ndarray, " samples"]:
    """The mean of the channels (ffmpeg's own down-mix of floats is 3 dB louder), the resampler's rest included."""
    blocks = blocks + (resampler.resample(None) if blocks else [])
    return np.concatenate([np.zeros(0, np.float32), *(block.to_ndarray().mean(axis=0) for block in blocks)])
