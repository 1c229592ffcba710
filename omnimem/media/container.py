"""Metadata of media files, and MediaError for files that cannot be used."""

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

CODEC_PADDING = 0.1  # seconds of padding that audio codecs add at the beginning and the end to fill their blocks
SHORTFALL = (1.0, 0.02)  # seconds, and fraction of the declared length, that a track may lack
COPY_AGAIN = "copy or convert the file again"
ISO_BOXES = {b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"}  # box types at the beginning of mp4 and mov files
# containers with durations written by the muxer; for all others ffmpeg estimates them from the bit rate
WITH_DURATION = {"mov", "matroska", "avi", "flv", "wav", "flac", "asf"}


@final
class MediaError(UserError):
    """A media file that cannot be used: `path`, `reason`, and a message of one line with the problem and the fix."""

    def __init__(self, path: Path | str, reason: Reason, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = Path(path)
        self.reason: Reason = reason


@final
@dataclass(frozen=True, kw_only=True)
class MediaInfo:
    """The tracks of a container and their lengths; 0 where the container declares none."""

    has_video: bool
    has_audio: bool
    video_seconds: float
    audio_seconds: float


def probe(path: Path | str) -> MediaInfo:
    """Read the header of a file without decoding it.

    Raises MediaError: `missing`, `empty` (zero bytes), `unreadable`, `truncated` (shorter than its header says).
    """
    with open_container(path) as container:
        video, audio = video_stream(container), audio_stream(container)
        return MediaInfo(
            has_video=video is not None,
            has_audio=audio is not None,
            video_seconds=(declared_end(container, video) or 0.0) if video else 0.0,
            audio_seconds=(declared_end(container, audio) or 0.0) if audio else 0.0,
        )


@contextmanager
def open_container(path: Path | str) -> Iterator[InputContainer]:
    """Open a container for reading; it may refer to local files only. Raises MediaError as `probe` does."""
    if not Path(path).is_file():
        raise MediaError(path, "missing", "is not a file; check the path")
    if Path(path).stat().st_size == 0:
        raise MediaError(path, "empty", "has zero bytes; copy or download it again")
    if missing := _missing_bytes(Path(path)):
        raise MediaError(path, "truncated", f"lacks its last {missing} bytes; {COPY_AGAIN}")
    try:
        container = av.open(str(path), options={"protocol_whitelist": "file"})
    except FFmpegError as error:
        message = f"cannot be read ({error.strerror}); it is not a media file, or truncated: {COPY_AGAIN}"
        raise MediaError(path, "unreadable", message) from error
    with container:
        yield container


def video_stream(container: InputContainer) -> VideoStream | None:
    """The first video track, without cover art."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            return stream
    return None


def audio_stream(container: InputContainer) -> AudioStream | None:
    """The first audio track."""
    return container.streams.audio[0] if container.streams.audio else None


def origin(container: InputContainer) -> float:
    """Timestamp of time zero in seconds, the same for both tracks (in broadcast recordings it is arbitrary).

    The time of the first video frame, or the start of the audio if that is more than CODEC_PADDING earlier.
    """
    begin = max(0.0, (container.start_time or 0) / av.time_base)
    video = video_stream(container)
    if video is None or video.start_time is None or video.time_base is None:
        return begin
    first = float(video.start_time * video.time_base)
    return first if 0.0 < first - begin <= CODEC_PADDING else begin


def declared_end(container: InputContainer, stream: VideoStream | AudioStream) -> float | None:
    """Seconds from the origin to the declared end of a track; None when the container does not declare it."""
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
    """Raise MediaError when a track decoded up to `reached` seconds ends clearly before its declared end.

    If only the file declares a duration, it is compared with the longest track. Broadcast (mpegts) and raw streams
    declare no duration, so their truncation is not detected.
    """
    if container.format.name.split(",")[0] not in WITH_DURATION:
        return
    due = declared_end(container, stream)
    if due is None:
        due = (container.duration or 0) / av.time_base
        reached = max(reached, _last_packet(path) if _short(due, end, reached) else reached)
    if _short(due, end, reached):
        message = f"{stream.type} ends at {reached:.1f} s of {due:.1f} s declared; {COPY_AGAIN}"
        raise MediaError(path, "truncated", message)


def _short(due: float, end: float | None, reached: float) -> bool:
    due = due if end is None else min(due, end)
    return due - reached > max(SHORTFALL[0], SHORTFALL[1] * due)


def _last_packet(path: Path | str) -> float:
    """Seconds from the origin to the end of the last packet of any track."""
    ends = [0.0]
    with open_container(path) as container:
        for packet in container.demux():
            if packet.pts is not None:
                ends.append(float((packet.pts + (packet.duration or 0)) * packet.time_base) - origin(container))
    return max(ends)


def _missing_bytes(path: Path) -> int:
    """Bytes that the top-level boxes of an mp4, mov, wav or avi file declare beyond the end of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if head[:4] == b"RIFF" and len(head) == 8:
            declared = struct.unpack("<I", head[4:])[0] + 8
            return max(0, declared - size) if declared < 1 << 32 else 0  # live recorders write 2^32 - 1
        return _missing_boxes(file, size) if head[4:] in ISO_BOXES else 0


def _missing_boxes(file: BinaryIO, size: int) -> int:
    place = 0
    while place + 8 <= size:
        file.seek(place)
        head = file.read(16)
        length = struct.unpack(">I", head[:4])[0]
        if length == 1 and len(head) == 16:
            length = struct.unpack(">Q", head[8:])[0]
        if length < 8:  # 0: up to the end of the file; other values are invalid
            return 0
        place += length
    return max(0, place - size)
