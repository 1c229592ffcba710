"""Encoder outputs on disk: one safetensors file per track, span and reading options; a damaged one is made again.

An entry holds one track, so that streams of one track and of both share it, whichever was read first: towers read one
track each, and passes are cut by the number of a segment (`separable`).

One file per entry: it is complete or absent by one rename, is removed alone, and no index can disagree with it, so any
number of processes share a folder without waiting for each other.
"""

import errno
import hashlib
import json
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from heapq import merge
from importlib.metadata import version
from itertools import count, groupby, takewhile
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from omnimem.absent import why_absent
from omnimem.aside import remove_leftovers, written_aside
from omnimem.backbones import Backbone, Encoded
from omnimem.backbones.projectors import TRACKS, Track
from omnimem.checksums import share
from omnimem.errors import counted
from omnimem.media import FileSource, FrameList, MediaError, files_of
from omnimem.media.container import LIBRARIES, state_of
from omnimem.media.decode import TICK
from omnimem.media.source import segment_of
from omnimem.tokens import Tracks

FORMAT = 6  # version of the cache files, and of what prepares the input of the encoders
COMPUTES = ("torch", "transformers", "av")  # packages whose versions are a part of the key
RESERVE = 1 << 30  # bytes of a disk that entries leave free, for checkpoints and results
COUNTED = ("hits", "misses", "corrupt", "evicted", "not_stored")
ENTRIES: dict[Tracks, tuple[Track, ...]] = {"both": TRACKS, "video": ("visual",), "audio": ("audio",)}
ALONE: dict[Track, Tracks] = {"visual": "video", "audio": "audio"}
OTHER: dict[Track, dict[str, Any]] = {  # what a segment without the other track has in its fields
    "visual": {"audio": None},
    "audio": {"visual": None, "grid": (0, 0, 0), "deepstack": (), "repeated": 0},
}


@final
@dataclass(frozen=True, kw_only=True)
class MediaStats:
    """How much of a sample was decoded."""

    frames: int = 0
    audio_seconds: float = 0.0


@final
@dataclass(frozen=True, kw_only=True)
class EncodedSegment:
    """An encoded segment, and how much of the stream was decoded up to its end."""

    encoded: Encoded
    heard: MediaStats


@final
@dataclass(frozen=True, kw_only=True)
class TrackSegment:
    """One track of an encoded segment, as a stream of this track alone has it."""

    track: Track
    encoded: Encoded
    media: MediaStats  # of this segment

    @classmethod
    def of(cls, track: Track, whole: Encoded, seconds: float, media: MediaStats) -> "TrackSegment":
        """A track of a segment, which alone is `seconds` long."""
        return cls(track=track, encoded=replace(whole, seconds=seconds, **OTHER[track]), media=media)

    @property
    def place(self) -> tuple[float, float]:
        """Place in the stream: rests, by their times, precede the segment that they begin."""
        return self.encoded.start, math.inf if self.encoded.at is None else self.encoded.at


def in_order(tracks: Iterable[Iterable[TrackSegment]]) -> Iterator[list[TrackSegment]]:
    """The segments of a stream with these tracks, each with its tracks."""
    for _, parts in groupby(merge(*tracks, key=lambda part: part.place), key=lambda part: part.place):
        yield list(parts)


def joined(segments: Iterable[Collection[TrackSegment]]) -> Iterator[EncodedSegment]:
    """Segments with all their tracks, and the media up to the end of each; rests are counted for themselves."""
    total = MediaStats()
    for parts in segments:
        found: dict[Track, TrackSegment] = {part.track: part for part in parts}
        first = found["visual"] if "visual" in found else found["audio"]
        whole = replace(first.encoded, seconds=max(part.encoded.seconds for part in parts))
        if "audio" in found:
            whole = replace(whole, audio=found["audio"].encoded.audio)
        heard = MediaStats(
            frames=total.frames + sum(part.media.frames for part in parts),
            audio_seconds=total.audio_seconds + sum(min(whole.seconds, part.media.audio_seconds) for part in parts),
        )
        total = heard if whole.at is None else total
        yield EncodedSegment(encoded=whole, heard=heard)


def separable(source: FileSource) -> bool:
    """Whether each track of a file is encoded to the same bits without the other one.

    A pass takes segments by their number. A question up to TICK after the beginning of a segment has a rest with audio
    and without frames, which counts where both tracks are read; then no track is shared (ours).
    """
    length = source.geometry.segment(source.options.fps)[0]
    return not any(0 < at - segment_of(at, length) * length <= 2 * TICK for at in source.asks)


def lacking(source: FileSource, held: Container[Track]) -> Tracks | None:
    """The tracks to decode where entries of some are held; None: no track."""
    wanted: list[Track] = [track for track in ENTRIES[source.options.tracks] if track not in held]
    if len(wanted) == 1 and separable(source):
        return ALONE[wanted[0]]
    return source.options.tracks if wanted else None


def fingerprint(backbone: Backbone) -> str:
    """sha256 of the encoders' weights and configurations, and of the geometry they read.

    Projectors that are trained are left out, and named: entries then hold their input.
    """
    before = f" before {' '.join(backbone.unprojected)}" if backbone.unprojected else ""
    settings = [
        (each.to_dict() | {"_name_or_path": ""}, str(each._attn_implementation)) for each in backbone.encoder_settings
    ]
    table = json.dumps(settings, sort_keys=True, default=str)
    digest = hashlib.sha256(f"{backbone.geometry}{before} {table}".encode())
    for tensor in backbone.encoder_weights():
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def adapted_encoders(backbone: Backbone) -> list[str]:
    """Names of the encoder weights that are trained or belong to an adapter: their outputs change."""
    own = {tensor.data_ptr() for tensor in backbone.encoder_weights() if tensor.numel()}
    return [
        name
        for name, weight in backbone.model.named_parameters()
        if weight.data_ptr() in own and (weight.requires_grad or ".lora_" in name or ".modules_to_save." in name)
    ]


@final
class EncoderCache:
    """A folder of encoder outputs; the name of a file is the sha256 of everything that its content depends on.

    Content of the track's file, span and times of questions, options of the track, weights and geometry of the
    encoders, kind of device, versions of what decodes and computes. `counts` of this process, in entries: `hits`,
    `misses`, `corrupt` (read and made again), `evicted`, `not_stored` (no space, no permission, larger than the limit,
    or of a file that changed).
    """

    def __init__(
        self, folder: Path, fingerprint: str, limit: int | None = None, before: tuple[Track, ...] = ()
    ) -> None:
        """`fingerprint` is that of the encoders; `limit` in bytes of all entries, of which the least recently used are
        removed (None: no limit); `before` are the tracks whose entries are the input of a projector."""
        self.folder, self.fingerprint, self.limit, self.before = folder, fingerprint, limit, before
        self.counts: Counter[str] = Counter(dict.fromkeys(COUNTED, 0))
        self._warned: set[str] = set()

    @classmethod
    def of(cls, backbone: Backbone, folder: Path, limit: int | None = None) -> "EncoderCache | None":
        """The cache for the encoders of a model; None, with a line that names a weight, if they are trained."""
        if names := adapted_encoders(backbone):
            what = f"{names[0]} and {counted(len(names) - 1, 'weight')} more" if len(names) > 1 else names[0]
            print(f"cache: off, because encoders are trained ({what})", file=sys.stderr, flush=True)
            return None
        computes = f"{' '.join(f'{name} {version(name)}' for name in COMPUTES)} {LIBRARIES}"
        made_by = f"{fingerprint(backbone)} {backbone.device.type} {computes}"
        return cls(folder, made_by, limit, backbone.unprojected)

    def path_of(self, source: FileSource, track: Track) -> Path:
        """The cache file of a track as `source` reads it, whether or not it exists.

        Raises MediaError when a media file is missing.
        """
        # 1. what of the options and the span the track depends on
        options = replace(source.options, tracks=ALONE[track] if separable(source) else source.options.tracks)
        if track == "audio":
            options = replace(options, min_pixels=1, max_pixels=1)
        causal = " causal" if source.causal and track == "audio" else ""
        span = f"{source.start} {source.end}{causal}" + "".join(f" {at}" for at in source.asks)
        digest = hashlib.sha256(f"{FORMAT} {self.fingerprint} {track} {options} {span}".encode())
        # 2. the files
        media = source.path if track == "visual" else source.audio_path
        if isinstance(media, FrameList):
            digest.update(f"list {len(media.files)} {media.fps}".encode())
        for path in files_of((media,)):
            digest.update(_content(path))
        return self.folder / f"{digest.hexdigest()}.safetensors"

    def paths(self, source: FileSource) -> dict[Track, Path]:
        """The cache file of each track that `source` reads; raises MediaError as `path_of`."""
        return {track: self.path_of(source, track) for track in ENTRIES[source.options.tracks]}

    def load(self, path: Path, device: torch.device, track: Track) -> Iterator[TrackSegment] | None:
        """The segments of a cache file, one after the other, on a device; None if there is none, or it is damaged."""
        try:
            file: Any = safe_open(path, framework="pt")  # kept open: another process may evict the file
            known: dict[str, str] = file.metadata() or {}
            names = sorted(file.keys())
            what = "its checksum differs"
            what = None if known.get("sha256") == _digest(path.stem, known, names, file.get_tensor) else what
        except FileNotFoundError:
            self.counts["misses"] += 1
            return None
        except (OSError, SafetensorError) as error:
            file, known, what = None, {}, str(error)
        if what is None:
            self.counts["hits"] += 1
            with suppress(OSError):  # a folder that is read only
                os.utime(path)  # used now
            return _segments(file, known, device, track, self.before)
        self.counts["corrupt"] += 1
        again = f"encoding its sample again ({self.counts['corrupt']} so far)"
        print(f"cache: {path} is damaged ({what}); {again}", file=sys.stderr, flush=True)
        return None

    def store(self, path: Path, segments: Sequence[TrackSegment]) -> None:
        """Write the segments to a cache file, with a checksum; renamed into place when it is complete on disk.

        A file that cannot be written, or has no room, is counted, with one line for each kind of reason.
        """
        # 1. tensors by segment number and track, and a table of the rest
        tensors, known = _tables(path.stem, segments)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        # 2. room
        if self.limit is not None and size > self.limit:
            self.not_stored(
                "size", f"an entry of {counted(size, 'byte')} is larger than the limit; raise data.cache.size_gb"
            )
            return
        # 3. write beside the file, then rename
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(path.parent).free < size + RESERVE:
                raise OSError(errno.ENOSPC, f"less than {RESERVE >> 30} GiB would be left on the disk")
            with written_aside(path) as partial:
                save_file(tensors, partial, metadata=known)
                share(partial)
                with partial.open("rb") as file:
                    os.fsync(file.fileno())
            self._evict(path)
        except (SafetensorError, OSError) as error:
            self.not_stored(type(error).__name__, f"entries cannot be written to {path.parent} ({error})")

    def not_stored(self, kind: str, what: str) -> None:
        """Count an entry that is not stored, with one line for each kind of reason."""
        self.counts["not_stored"] += 1
        if kind not in self._warned:
            self._warned.add(kind)
            print(f"cache: {what}; going on without storing them", file=sys.stderr, flush=True)

    def _evict(self, newest: Path) -> None:
        """Remove the least recently used entries beyond the limit, and what killed processes left."""
        remove_leftovers(self.folder / "*.safetensors")
        if self.limit is None:
            return
        entries = sorted(self._entries())
        excess = sum(size for _, size, _ in entries) - self.limit
        for _, size, path in entries:  # the same ones in every process
            if excess > 0 and path != newest:
                path.unlink(missing_ok=True)
                self.counts["evicted"] += 1
                excess -= size

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """Time of the last use, size in bytes and path of each entry."""
        for path in self.folder.glob("[0-9a-f]*.safetensors"):
            with suppress(FileNotFoundError):  # removed by hand meanwhile
                status = path.stat()
                yield status.st_mtime_ns, status.st_size, path


def _content(path: Path) -> bytes:
    """sha256 of a file, computed once for each state of it; raises MediaError when it is missing."""
    if not path.is_file():
        cure = why_absent(path, "restore it or correct the manifest")
        raise MediaError(path, "missing", f"is not there; {cure}")
    return _content_once(path, state_of(path))


@lru_cache(maxsize=1 << 16)
def _content_once(path: Path, state: tuple[int, ...]) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _segments(
    file: Any, known: Mapping[str, str], device: torch.device, track: Track, before: tuple[Track, ...]
) -> Iterator[TrackSegment]:
    """The segments of an open cache file."""
    names = set(file.keys())
    for number, row in enumerate(json.loads(known["segments"])):
        (time, rows, columns), start, seconds, spacing, frames, audio_seconds, *at = row
        visual, audio = (
            file.get_tensor(f"{number}.{name}").to(device) if f"{number}.{name}" in names else None
            for name in ("visual", "audio")
        )
        encoded = Encoded(
            visual=visual,
            audio=audio,
            grid=(time, rows, columns),
            start=start,
            seconds=seconds,
            seconds_per_grid=spacing,
            at=at[0] if at else None,
            repeated=at[1] if len(at) > 1 else 0,
            deepstack=tuple(file.get_tensor(name).to(device) for name in _levels(number, names)),
            before=before,
        )
        media = MediaStats(frames=frames, audio_seconds=audio_seconds)
        yield TrackSegment(track=track, encoded=encoded, media=media)


def _tables(key: str, segments: Sequence[TrackSegment]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a cache file by segment number and track, and its metadata."""
    tensors, table = {}, []
    for number, segment in enumerate(segments):
        encoded, media = segment.encoded, segment.media
        levels = ((f"deepstack.{level}", part) for level, part in enumerate(encoded.deepstack))
        for name, track in (("visual", encoded.visual), ("audio", encoded.audio), *levels):
            if track is not None:
                whole = track.detach().cpu().contiguous()
                tensors[f"{number}.{name}"] = (
                    whole.clone() if encoded.before else whole
                )  # projectors may share their input
        times = [encoded.start, encoded.seconds, encoded.seconds_per_grid]
        rest = [] if encoded.at is None and not encoded.repeated else [encoded.at, encoded.repeated]
        rest = rest if encoded.repeated else rest[:1]
        table.append([encoded.grid, *times, media.frames, media.audio_seconds, *rest])
    known = {"segments": json.dumps(table)}
    known["sha256"] = _digest(key, known, sorted(tensors), tensors.__getitem__)
    return tensors, known


def _levels(number: int, names: Container[str]) -> Iterator[str]:
    """Names of the deepstack tensors of a segment, in order."""
    return takewhile(names.__contains__, (f"{number}.deepstack.{level}" for level in count()))


def _digest(key: str, known: Mapping[str, str], names: Iterable[str], tensor: Callable[[str], Tensor]) -> str:
    """sha256 of the key, the table and the tensors of a cache file."""
    digest = hashlib.sha256(f"{key} {known.get('segments', '')}".encode())
    for name in names:
        found = tensor(name)
        digest.update(f"{name} {found.dtype} {tuple(found.shape)}".encode())
        digest.update(found.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
