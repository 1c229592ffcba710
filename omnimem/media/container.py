"""What a media file declares about itself, and the named errors of files that cannot be used."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, final

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.stream import VideoStream

from omnimem.errors import UserError

Reason = Literal["missing", "unreadable", "no_video", "no_audio", "empty", "truncated"]

CODEC_FILLING = 0.1  # seconds; what audio codecs add at the beginning and the end to fill their blocks
SHORTFALL = (1.0, 0.02)  # seconds and share of its declared length that a track may lack
AGAIN = "copy or convert the file again"
ISO_BOXES = {b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"}  # what mp4 and mov files begin with
# containers whose durations were written by their muxer; of the others ffmpeg guesses them from the bit rate
DECLARING = {"mov", "matroska", "avi", "flv", "wav", "flac", "asf"}


@final
class MediaError(UserError):
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
    """Reads the header of a file without decoding it.

    Raises MediaError: `missing`, `empty` (zero bytes), `unreadable`, `truncated` (shorter than its header says).
    """
    with opened(path) as container:
        video, audio = video_stream(container), audio_stream(container)
        video_seconds = (declared_end(container, video) or 0.0) if video else 0.0
        audio_seconds = (declared_end(container, audio) or 0.0) if audio else 0.0
        return MediaInfo(
            path=Path(path),
            seconds=max(video_seconds, audio_seconds) or (container.duration or 0) / av.time_base,
            video_seconds=video_seconds,
            audio_seconds=audio_seconds,
            has_video=video is not None,
            has_audio=audio is not None,
            width=video.width if video else 0,
            height=video.height if video else 0,
            frame_rate=float(video.average_rate or 0.0) if video else 0.0,
        )


@contextmanager
def opened(path: Path | str) -> Iterator[InputContainer]:
    """The container, open for reading. Only local files are followed. Raises MediaError as `probe`."""
    if not Path(path).is_file():
        raise MediaError(path, "missing", "is not a file; check the path")
    if Path(path).stat().st_size == 0:
        raise MediaError(path, "empty", "has zero bytes; copy or download it again")
    if missing := _missing_bytes(Path(path)):
        raise MediaError(path, "truncated", f"lacks its last {missing} bytes; {AGAIN}")
    try:
        container = av.open(str(path), options={"protocol_whitelist": "file"})
    except FFmpegError as error:
        message = f"cannot be read ({error.strerror}); it is no media file or was cut off: {AGAIN}"
        raise MediaError(path, "unreadable", message) from error
    with container:
        yield container


def video_stream(container: InputContainer) -> VideoStream | None:
    """The first moving picture: cover art is no video track."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            return stream
    return None


def audio_stream(container: InputContainer) -> AudioStream | None:
    """The first audio track."""
    return container.streams.audio[0] if container.streams.audio else None


def origin(container: InputContainer) -> float:
    """What the container's clock shows at our zero, in seconds, the same for both tracks: broadcast begins anywhere.

    The first picture, unless sound begins clearly earlier: what an audio codec begins with is no sound.
    """
    begin = max(0.0, (container.start_time or 0) / av.time_base)
    video = video_stream(container)
    if video is None or video.start_time is None or video.time_base is None:
        return begin
    first = float(video.start_time * video.time_base)
    return first if 0.0 < first - begin <= CODEC_FILLING else begin


def declared_end(container: InputContainer, stream: VideoStream | AudioStream) -> float | None:
    """Seconds from the origin to the end of a track as its container declares it, None when it does not."""
    if stream.duration is not None and stream.time_base is not None:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base) - origin(container)
    if tag := stream.metadata.get("DURATION"):  # Matroska
        hours, minutes, seconds = tag.split(":")
        return 3600.0 * int(hours) + 60.0 * int(minutes) + float(seconds)
    return None


def check_whole(
    path: Path | str,
    container: InputContainer,
    stream: VideoStream | AudioStream,
    end: float | None,
    reached: float,
) -> None:
    """Raises MediaError when a track that was decoded to `reached` seconds ends clearly before it should.

    Where only the whole file declares its length, the longest of its tracks counts. Broadcast (mpegts) and bare
    streams declare none: their truncation cannot be noticed.
    """
    if container.format.name.split(",")[0] not in DECLARING:
        return
    due = declared_end(container, stream)
    if due is None:
        due = (container.duration or 0) / av.time_base
        reached = max(reached, _last_packet(path) if _short(due, end, reached) else reached)
    if _short(due, end, reached):
        message = f"{stream.type} ends at {reached:.1f} s of {due:.1f} s declared; {AGAIN}"
        raise MediaError(path, "truncated", message)


def _short(due: float, end: float | None, reached: float) -> bool:
    due = due if end is None else min(due, end)
    return due - reached > max(SHORTFALL[0], SHORTFALL[1] * due)


def _last_packet(path: Path | str) -> float:
    """Seconds from the origin to the end of what a file holds, whatever the track."""
    ends = [0.0]
    with opened(path) as container:
        for packet in container.demux():
            if packet.pts is not None:
                ends.append(float((packet.pts + (packet.duration or 0)) * packet.time_base) - origin(container))
    return max(ends)


def _missing_bytes(path: Path) -> int:
    """How many bytes the outer boxes of an mp4, mov, wav or avi file announce beyond its end."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if head[:4] == b"RIFF" and len(head) == 8:
            announced = struct.unpack("<I", head[4:])[0] + 8
            return max(0, announced - size) if announced < 1 << 32 else 0  # 2^32 - 1 is written by live recorders
        return _missing_boxes(file, size) if head[4:] in ISO_BOXES else 0


def _missing_boxes(file: BinaryIO, size: int) -> int:
    place = 0
    while place + 8 <= size:
        file.seek(place)
        head = file.read(16)
        length = struct.unpack(">I", head[:4])[0]
        if length == 1 and len(head) == 16:
            length = struct.unpack(">Q", head[8:])[0]
        if length < 8:  # 0: up to the end of the file; anything else is no box
            return 0
        place += length
    return max(0, place - size)
