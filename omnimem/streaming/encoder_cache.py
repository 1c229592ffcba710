"""Encoder outputs on disk: one safetensors file per sample and reading options; a damaged one is made again."""

import errno
import hashlib
import json
import os
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, takewhile
from pathlib import Path
from typing import final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from omnimem.aside import written_aside
from omnimem.backbones import Backbone, Encoded
from omnimem.checksums import share
from omnimem.data import Sample
from omnimem.media import FileSource, MediaError

FORMAT = 4  # version of the cache files


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


def fingerprint(backbone: Backbone) -> str:
    """sha256 of the encoders' weights and of the geometry they read."""
    digest = hashlib.sha256(f"{backbone.geometry}".encode())
    for tensor in backbone.encoder_weights():
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@final
@dataclass(frozen=True)
class EncoderCache:
    """A folder of encoder outputs; a file is found by the sha256 of its inputs."""

    folder: Path
    fingerprint: str  # of the encoders
    damaged: list[Path] = field(default_factory=list)  # files found damaged, whose samples were encoded again

    def path_of(self, sample: Sample, source: FileSource) -> Path:
        """The cache file of a sample as `source` reads it, whether or not it exists.

        Raises MediaError when a media file of the sample is missing.
        """
        span = f"{source.start} {source.end}{' causal' if source.causal else ''}"
        span += "".join(f" {at}" for at in source.asks)
        digest = hashlib.sha256(f"{FORMAT} {self.fingerprint} {source.options} {span}".encode())
        for path in (sample.video, sample.audio):
            if path is not None:
                if not path.is_file():
                    raise MediaError(path, "missing", "is not there; restore it or correct the manifest")
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return self.folder / f"{digest.hexdigest()}.safetensors"

    def load(self, path: Path, device: torch.device) -> Iterator[EncodedSegment] | None:
        """The segments of a cache file, one after the other, on a device; None if there is none, or it is damaged."""
        try:
            with safe_open(path, framework="pt") as file:
                known: dict[str, str] = file.metadata() or {}
                names = sorted(file.keys())
                what = None if known.get("sha256") == _digest(known, names, file.get_tensor) else "its checksum differs"
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            what = str(error)
        if what is None:
            return self._segments(path, device)
        self.damaged.append(path)
        again = f"encoding its sample again ({len(self.damaged)} so far)"
        print(f"cache: {path} is damaged ({what}); {again}", file=sys.stderr, flush=True)
        return None

    @staticmethod
    def _segments(path: Path, device: torch.device) -> Iterator[EncodedSegment]:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for number, row in enumerate(json.loads(file.metadata()["segments"])):
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
                )
                yield EncodedSegment(encoded=encoded, heard=MediaStats(frames=frames, audio_seconds=audio_seconds))

    @staticmethod
    def store(path: Path, segments: Sequence[EncodedSegment]) -> None:
        """Write the segments to a cache file, with a checksum; renamed into place when it is complete on disk."""
        # 1. tensors by segment number and track, and a table of the rest
        tensors, table = {}, []
        for number, segment in enumerate(segments):
            encoded, heard = segment.encoded, segment.heard
            levels = ((f"deepstack.{level}", part) for level, part in enumerate(encoded.deepstack))
            for name, track in (("visual", encoded.visual), ("audio", encoded.audio), *levels):
                if track is not None:
                    tensors[f"{number}.{name}"] = track.detach().cpu().contiguous()
            times = [encoded.start, encoded.seconds, encoded.seconds_per_grid]
            rest = [] if encoded.at is None and not encoded.repeated else [encoded.at, encoded.repeated]
            rest = rest if encoded.repeated else rest[:1]
            table.append([encoded.grid, *times, heard.frames, heard.audio_seconds, *rest])
        known = {"segments": json.dumps(table)}
        known["sha256"] = _digest(known, sorted(tensors), tensors.__getitem__)
        # 2. write beside the file, then rename
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with written_aside(path) as partial:
                save_file(tensors, partial, metadata=known)
                share(partial)
                with partial.open("rb") as file:
                    os.fsync(file.fileno())
        except (SafetensorError, OSError) as error:  # a full disk
            number = (isinstance(error, OSError) and error.errno) or errno.EIO
            raise OSError(number, str(error), str(path)) from error


def _levels(number: int, names: Container[str]) -> Iterator[str]:
    """Names of the deepstack tensors of a segment, in order."""
    return takewhile(names.__contains__, (f"{number}.deepstack.{level}" for level in count()))


def _digest(known: Mapping[str, str], names: Iterable[str], tensor: Callable[[str], Tensor]) -> str:
    """sha256 of the table and the tensors of a cache file."""
    digest = hashlib.sha256(known.get("segments", "").encode())
    for name in names:
        found = tensor(name)
        digest.update(f"{name} {found.dtype} {tuple(found.shape)}".encode())
        digest.update(found.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
