"""Metadata of media files, and MediaError for files that cannot be used."""

import errno
import math
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BufferedIOBase, RawIOBase
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, Literal, TypeVar, final

import av
import numpy as np
from av import logging
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.error import EOFError as EndOfFileError
from av.error import FFmpegError, InvalidDataError
from av.format import Flags
from av.packet import Packet
from av.stream import Disposition
from av.video.stream import VideoStream

from omnimem.absent import as_url, why_absent
from omnimem.errors import UserError, counted, printable
from omnimem.limits import BYTES_PER_SECOND, exceeds, limit
from omnimem.media.frames import SUFFIXES, FrameList, Video

Track = TypeVar("Track", VideoStream, AudioStream)
Reason = Literal["missing", "unreadable", "no_video", "no_audio", "empty", "truncated", "too_short"]

CODEC_PADDING = 0.1  # seconds of padding that audio codecs add at the beginning and the end to fill their blocks
RESTART = 0.5  # seconds that a clock goes back where it starts again; less is jitter
SHORTFALL = (1.0, 0.02)  # seconds, and fraction of the declared length, that a track may lack
COPY_AGAIN = "copy or convert the file again"
# ffmpeg's names of the formats that are read: each holds its media itself, unlike playlists, and none is plain text
FORMATS = (
    "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,wav,w64,mp3,flac,aac,ac3,eac3,dts,amr,aiff,au,caf,ape,wv,tta,rm,mxf,nut,"
    "dv,wtv,gif,apng,webp,ivf,av1,obu,h264,hevc,m4v,mpegvideo,mjpeg,jpeg_pipe,png_pipe,webp_pipe,bmp_pipe"
)
IMAGES = ("jpeg_pipe", "png_pipe", "webp_pipe", "bmp_pipe")  # those of frame lists
READABLE = "mp4, mov, mkv, webm, avi, mpegts, flv, asf, ogg, wav, mp3, flac or similar"
# errors of the machine, which say nothing about the file
MACHINE = {
    *(errno.EIO, errno.ENOMEM, errno.ENFILE, errno.EMFILE, errno.ENOSPC, errno.EDQUOT, errno.ESTALE),
    *(errno.ENODEV, errno.ENXIO, errno.EREMOTEIO, errno.ETIMEDOUT),
}
LIBRARIES = av.library_versions  # of ffmpeg, which a build of PyAV may have from the system
ISO_BOXES = {b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"}  # box types at the beginning of mp4 and mov files
TRIAL_BYTES = 1 << 28  # more than the decoders of most files need
# where headers declare a length: what precedes it, its type, and the place it counts from (None: the end of itself)
LENGTHS = (
    (rb"RIFF", "<I", 8),  # wav, avi
    (rb"RF64.{16}", "<Q", 8),
    (rb"riff\x2e\x91\xcf\x11.{8}", "<Q", 0),  # w64
    (rb"\x30\x26\xb2\x75.*?\xa1\xdc\xab\x8c\x47\xa9\xcf\x11.{32}", "<Q", 0),  # asf
    (rb"caff.*?data", ">Q", None),
)
# containers with durations written by the muxer; for all others ffmpeg estimates them from the bit rate
WITH_DURATION = "mov,matroska,avi,flv,wav,flac,asf,w64,aiff,au,caf,ape,wv,tta,rm".split(",")  # noqa: SIM905 - one line
OF_FILE = {"matroska", "flv", "asf", "rm"}  # those that declare one duration for all tracks, apart from tags


@final
class MediaError(UserError):
    """A media file that cannot be used: `path`, `reason`, and a message of one line with the problem and the fix."""

    def __init__(self, path: Video | str, reason: Reason, message: str) -> None:
        super().__init__(printable(f"{as_url(str(path)) or path}: {message}"))
        self.path = Path(str(path))
        self.reason: Reason = reason


@final
@dataclass(frozen=True, kw_only=True)
class MediaInfo:
    """The tracks of a container and their lengths; 0 where the container declares none."""

    has_video: bool
    has_audio: bool
    video_seconds: float
    audio_seconds: float
    restarts: tuple[float, ...] = ()  # of a measured file: seconds to add to its clock after each restart (`Clock`)

    @property
    def seconds(self) -> float:
        """Length of the longer track."""
        return max(self.video_seconds, self.audio_seconds)


def probe(path: Video | str, *, measure: bool = False) -> MediaInfo:
    """Read the header of a file without decoding it; of a frame list, whether all files exist, and the first one.

    `measure`: where the muxer wrote no duration, so that ffmpeg estimates it or has none, read all packets instead.
    Raises MediaError: `missing`, `empty` (zero bytes), `unreadable`, `truncated` (shorter than its header says).
    """
    if isinstance(path, FrameList):
        return _probed_list(path)
    try:
        state = state_of(Path(path))
    except OSError:
        return _probed(path, measure)
    return _probed_once(path, measure, state)


def state_of(path: Path) -> tuple[int, ...]:
    """What changes with the content of a file; copies may have its size and its time of modification (`cp -p`)."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_ctime_ns, status.st_mtime_ns, status.st_size


@lru_cache(maxsize=4096)
def _probed_once(path: Path | str, measure: bool, state: tuple[int, ...]) -> MediaInfo:
    """`_probed`, once for each state of a file."""
    return _probed(path, measure)


def _probed(path: Path | str, measure: bool) -> MediaInfo:
    with open_container(path) as container:
        # 1. tracks and declared lengths
        tracks = {"video": video_stream(container), "audio": audio_stream(container)}
        present = {name: track for name, track in tracks.items() if track is not None}
        ends = {name: declared_end(container, track) or 0.0 for name, track in present.items()}
        # 2. measured lengths
        declared, restarts = container.format.name.split(",")[0] in WITH_DURATION and all(ends.values()), list[float]()
        if measure and not declared:
            ends = dict.fromkeys(ends, 0.0)
            names = {track.index: (name, Clock(container, restarts)) for name, track in present.items()}
            for packet in container.demux(*present.values()):
                if packet.pts is not None:
                    (name, clock), tick = names[packet.stream_index], packet.time_base
                    order = None if packet.dts is None else float(packet.dts * tick)
                    time = clock.seconds(float(packet.pts * tick), max(ends.values()), order)
                    ends[name] = max(ends[name], time + float((packet.duration or 0) * tick))
    return MediaInfo(
        has_video="video" in present,
        has_audio="audio" in present,
        video_seconds=ends.get("video", 0.0),
        audio_seconds=ends.get("audio", 0.0),
        restarts=tuple(restarts),
    )


def _probed_list(frames: FrameList) -> MediaInfo:
    for path in frames.files:
        _require_file(path)
    with blaming(str(frames), "cannot be read", "correct its fps"):
        Plausible(frames).refuse_length(frames.seconds)
    with open_image(frames.files[0]):
        return MediaInfo(has_video=True, has_audio=False, video_seconds=frames.seconds, audio_seconds=0.0)


@contextmanager
def open_image(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open an image file, whatever its name; errors are MediaErrors as of `open_container`."""
    fix = f"it is truncated, or not one of {', '.join(SUFFIXES)}: {COPY_AGAIN}"
    with ExitStack() as opened:
        with blaming(path, "cannot be read", fix):
            _require_file(path)
            if path.stat().st_size == 0:
                raise MediaError(path, "empty", "has zero bytes; copy or download it again")
            file = opened.enter_context(path.open("rb"))
            container = opened.enter_context(open_input(_nameless(file), protocols="none"))
            if container.format.name not in IMAGES:
                what = f"is no image ({container.format.name}); give images as frames, and a video file as video"
                raise MediaError(path, "unreadable", what)
        with blaming(path, "decoding failed", COPY_AGAIN, cut="truncated"):
            stream = container.streams.video[0]
            decodable(stream)
            stream.codec_context.options = {**stream.codec_context.options, "err_detect": "explode"}  # truncated ones
            yield container, stream


def _nameless(file: BinaryIO) -> Any:
    """A file without a name, by which ffmpeg would take it for one of a numbered sequence of files."""
    return SimpleNamespace(read=file.read, seek=file.seek, tell=file.tell)


@contextmanager
def open_container(path: Path | str) -> Iterator[InputContainer]:
    """Open a container for reading; every error until it is closed is a MediaError as of `probe` (`blaming`)."""
    with blaming(path, "cannot be read", f"it is truncated, or not {READABLE}: {COPY_AGAIN}"):
        _require_file(Path(path))
        if Path(path).stat().st_size == 0:
            raise MediaError(path, "empty", "has zero bytes; copy or download it again")
        if missing := _missing_bytes(Path(path)):
            raise MediaError(path, "truncated", f"lacks its last {counted(missing, 'byte')}; {COPY_AGAIN}")
        container = open_input(f"file:{path}", protocols="file")  # with the prefix, names may have colons
    with container, blaming(path, "decoding failed", COPY_AGAIN, cut="truncated"):
        yield container


def open_input(file: str | BufferedIOBase | RawIOBase | SimpleNamespace, *, protocols: str) -> InputContainer:
    """Open one of FORMATS, which may refer to other media by `protocols` only; tags may have any encoding.

    `file` is a name or an object with `read`.
    """
    allowed = {"format_whitelist": FORMATS, "protocol_whitelist": protocols, "max_pixels": str(limit("frame_pixels"))}
    level = logging.get_level()
    logging.set_level(logging.ERROR)  # ffmpeg names a refused format in its log only
    try:
        with logging.Capture():
            opened: Any = av.open(file, "r", options=allowed, metadata_errors="replace")
            return opened
    finally:
        logging.set_level(level)


@contextmanager
def blaming(path: Path | str, what: str, fix: str, *, cut: Reason = "unreadable") -> Iterator[None]:
    """Raise every error as a MediaError of `path`, except those of the machine: memory, disk, number of open files.

    The reason is `cut` if the data end early or are invalid, else `unreadable`.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # PyAV raises errors of many types for damaged files; one file must not end a run
        if _of_machine(error, path):
            raise
        detail = f"{error.strerror}" if isinstance(error, FFmpegError) else f"{type(error).__name__}: {error}"
        log: Any = error.log if isinstance(error, FFmpegError) else None  # level, name of the format, message
        if log and "not on whitelist" in log[2]:
            detail = f"its format {log[1]} is not read: it may refer to other files, or is text"
        reason = cut if isinstance(error, (InvalidDataError, EndOfFileError)) else "unreadable"
        raise MediaError(path, reason, f"{what} ({' '.join(detail.split())}); {fix}") from error


def _of_machine(error: Exception, path: Path | str) -> bool:
    """Whether an error is one of MACHINE. ffmpeg gives two of them for invalid data too: those are tried again here."""
    number = getattr(error, "errno", None)
    if isinstance(error, FFmpegError) and number in (errno.EIO, errno.ENOMEM):
        np.empty(TRIAL_BYTES, np.uint8)
        if Path(path).is_file():
            with Path(path).open("rb") as file:
                while file.read(1 << 20):
                    pass
        return False
    out_of_memory = isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate mem" in str(error))
    return out_of_memory or number in MACHINE


def video_stream(container: InputContainer) -> VideoStream | None:
    """The video track that ffmpeg chooses: the default one, then the largest; without cover art."""
    tracks = [one for one in container.streams.video if not one.disposition & Disposition.attached_pic]
    return max(_known(tracks), key=lambda one: (_rank(one), one.width * one.height), default=next(iter(tracks), None))


def audio_stream(container: InputContainer) -> AudioStream | None:
    """The audio track that ffmpeg chooses: the default one, then the one with most channels."""
    tracks = container.streams.audio
    return max(_known(tracks), key=lambda one: (_rank(one), one.channels), default=next(iter(tracks), None))


def decodable(track: Track | None) -> Track | None:
    """The track; raises LookupError, in `blaming` a MediaError, if ffmpeg does not know its codec, or for a limit."""
    if track is not None and track.codec_context is None:
        raise LookupError(f"the codec of its {track.type} is unknown")
    if isinstance(track, VideoStream):
        refuse_large(track.width, track.height)
        if not track.width * track.height:  # ffmpeg gave up at the first frame
            most = limit("frame_pixels")
            raise ValueError(f"its frames have no size, or more than frame_pixels = {most:,} (--limit frame_pixels=N)")
        track.codec_context.options = {"max_pixels": str(limit("frame_pixels"))}  # frames may become larger
    return track


def refuse_large(width: int, height: int) -> None:
    """Raises ValueError for frames with more pixels than the limit."""
    if what := exceeds("frame_pixels", width * height):
        raise ValueError(f"its frames of {width} x {height} pixels: {what}")


@final
class Plausible:
    """What a file of its size may hold: `sparse_seconds`, and more with BYTES_PER_SECOND; `frames_per_byte`.

    Gaps, repeated frames and empty packets make streams of any length from few bytes.
    """

    def __init__(self, path: Video | str) -> None:
        files = path.files if isinstance(path, FrameList) else (Path(path),)
        self._bytes = max(1, sum(file.stat().st_size for file in files if file.is_file()))
        self._seconds = limit("sparse_seconds") + self._bytes // BYTES_PER_SECOND
        self._frames = limit("frames_per_byte") * self._bytes

    def refuse_length(self, seconds: float) -> None:
        """Raises ValueError if a track of so many seconds cannot be in the file."""
        if seconds <= self._seconds:
            return
        filled = self._bytes // BYTES_PER_SECOND
        if what := exceeds("sparse_seconds", max(0, int(min(seconds, 1e15)) - filled)):
            raise ValueError(
                f"a length of {seconds:,.0f} s from {counted(self._bytes, 'byte')}: beyond {filled:,} s, {what}"
            )

    def refuse_frames(self, count: int) -> None:
        """Raises ValueError if so many video frames cannot be in the file."""
        if count <= self._frames:
            return
        if what := exceeds("frames_per_byte", -(-count // self._bytes)):
            raise ValueError(f"{counted(count, 'frame')} from {counted(self._bytes, 'byte')}: {what}")

    def refuse_track(self, container: InputContainer, stream: VideoStream | AudioStream, end: float | None) -> None:
        """`refuse_length` and `refuse_frames` of what the header declares up to `end`."""
        declared = declared_end(container, stream) or 0.0
        self.refuse_length(declared if end is None else min(declared, end))
        if isinstance(stream, VideoStream):
            self.refuse_frames(stream.frames)


def _known(tracks: Sequence[Track]) -> list[Track]:
    return [track for track in tracks if track.codec_context is not None]


def _rank(track: VideoStream | AudioStream) -> int:
    """Default tracks before others, tracks for impaired viewers last."""
    impaired = Disposition.hearing_impaired | Disposition.visual_impaired
    return bool(track.disposition & Disposition.default) - bool(track.disposition & impaired)


def origin(container: InputContainer) -> float:
    """Timestamp of time zero in seconds, the same for both tracks (in broadcast recordings it is arbitrary).

    The time of the first video frame, or the start of the audio if that is more than CODEC_PADDING earlier. It may be
    negative, for instance where a clock is about to wrap; codec padding before 0 is cut off.
    """
    begin = (container.start_time or 0) / av.time_base
    begin = 0.0 if -CODEC_PADDING <= begin < 0.0 else begin
    video = video_stream(container)
    if video is None or video.start_time is None or video.time_base is None:
        return begin
    first = float(video.start_time * video.time_base)
    return first if 0.0 < first - begin <= CODEC_PADDING else begin


@final
class Clock:
    """Seconds from the origin on the clock of a track.

    In formats where a clock may start again (broadcast and program streams, ogg), joined recordings have one for each.
    Time then goes on after all that came before, as in ffmpeg. `restarts` are the seconds to add after each restart,
    the same for all tracks; what is missing in them is added.
    """

    def __init__(self, container: InputContainer, restarts: list[float]) -> None:
        self._zero, self._restarts, self._passed, self._last = origin(container), restarts, 0, -math.inf
        self._joined = may_restart(container)

    def seconds(self, time: float, reached: float, order: float | None = None) -> float:
        """The seconds of a time of the file; `reached`: of all before it. `order` grows where `time` need not."""
        order = time if order is None else order
        if self._joined and order < self._last - RESTART:
            self._passed += 1
            if self._passed > len(self._restarts):
                self._restarts.append(reached - (time - self._zero))
        self._last = order
        return time - self._zero + (self._restarts[self._passed - 1] if self._passed else 0.0)


def may_restart(container: InputContainer) -> bool:
    """Whether the format allows several recordings, each with its clock, one after the other."""
    return bool(container.format.flags & Flags.ts_discont.value)


def declared_end(container: InputContainer, stream: VideoStream | AudioStream) -> float | None:
    """Seconds from the origin to the declared end of a track; None when the container does not declare it."""
    if tag := _duration_tag(stream):
        hours, minutes, seconds = tag.groups()
        end, zero = 3600.0 * int(hours) + 60.0 * int(minutes) + float(seconds), origin(container)
        return end - zero if end > zero else end  # muxers write the end on the file's clock, or the length
    if stream.duration is not None and stream.time_base is not None:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base) - origin(container)
    return None


def _duration_tag(stream: VideoStream | AudioStream) -> re.Match[str] | None:
    """The duration of a track of Matroska; ffmpeg may give the duration of the file as that of the track."""
    return re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))


def _require_file(path: Path) -> None:
    """Raises MediaError `missing`, or `unreadable` for a pipe, which cannot be read twice."""
    if path.is_file():
        return
    if path.is_dir():
        raise MediaError(path, "missing", "is a folder; give a file in it")
    if path.exists():
        what = "is a pipe or a device; copy it to a file, or send it to `omnimem ask --video -` on standard input"
        raise MediaError(path, "unreadable", what)
    raise MediaError(path, "missing", f"is not a file; {why_absent(path, 'check the path')}")


def is_empty(packet: Packet) -> bool:
    """Whether a packet holds nothing, as Theora marks a frame that repeats the one before; decoders refuse it."""
    return packet.size == 0 and packet.pts is not None  # without a time: the signal to decoders that no packet follows


def check_whole(
    path: Path | str,
    container: InputContainer,
    stream: VideoStream | AudioStream,
    end: float | None,
    reached: float,
    *,
    still: bool = False,
) -> None:
    """Raise MediaError when a track decoded up to `reached` seconds ends clearly before its declared end.

    If only the file declares a duration, it is compared with the longest track; so is a `still`, which shows one frame
    for longer than it says. Broadcast (mpegts) and raw streams declare no duration, so their truncation is not
    detected.
    """
    name = container.format.name.split(",")[0]
    if name not in WITH_DURATION and not (name == "mp3" and _counts_frames(Path(path))):
        return
    due = declared_end(container, stream)
    of_file = due is None or (name in OF_FILE and not _duration_tag(stream))
    if due is None or of_file:
        due = (container.duration or 0) / av.time_base
    if (of_file or still) and _short(due, end, reached):
        reached = max(reached, _last_packet(path))
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


def _counts_frames(path: Path) -> bool:
    """Whether the first frame of an mp3 file is a header with the number of frames (Xing, Info or VBRI)."""
    with path.open("rb") as file:
        tag, size = file.read(10), 0
        if tag[:3] == b"ID3":
            size = 10 + sum(byte << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))
        file.seek(size)
        head = file.read(4096)
    found = re.search(rb"(?:Xing|Info)\x00\x00\x00(.)|VBRI", head, re.DOTALL)
    return found is not None and (found[1] is None or found[1][0] & 1 == 1)


def _missing_bytes(path: Path) -> int:
    """Bytes that the header of a file declares beyond its end: the boxes of mp4 and mov, or one of LENGTHS."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(1 << 16)
        if head[4:8] in ISO_BOXES:
            return _missing_boxes(file, size)
    for pattern, number, start in LENGTHS:
        found = re.match(pattern, head, re.DOTALL)
        if found and (end := found.end() + struct.calcsize(number)) <= len(head):
            length = struct.unpack(number, head[found.end() : end])[0]
            live = length >= (1 << 32) - 8 if number == "<I" else length >= 1 << 62  # recorders write -1 or so
            return 0 if live else max(0, (end if start is None else start) + length - size)
    return 0


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
