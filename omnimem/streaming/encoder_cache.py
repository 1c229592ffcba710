"""The encoders' outputs of a sample on disk: one safetensors file per sample and setting."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from omnimem.backbones import Backbone, Encoded

FORMAT = 2  # of the files in the cache


@final
@dataclass(frozen=True, kw_only=True)
class MediaStats:
    """What was really seen and heard of a sample."""

    frames: int = 0
    audio_seconds: float = 0.0


@final
@dataclass(frozen=True, kw_only=True)
class EncodedSegment:
    """An encoded segment, and what was seen and heard of the stream up to its end."""

    encoded: Encoded
    heard: MediaStats


def fingerprint(backbone: Backbone) -> str:
    """sha256 of the encoders' weights and of the geometry they read."""
    digest = hashlib.sha256(f"{backbone.geometry}".encode())
    for tensor in backbone.encoder_weights():
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def store_segments(parts: Sequence[EncodedSegment], path: Path) -> None:
    """One file a sample, renamed into place when whole."""
    tensors, table = {}, []
    for number, part in enumerate(parts):
        segment, heard = part.encoded, part.heard
        for name, track in (("visual", segment.visual), ("audio", segment.audio)):
            if track is not None:
                tensors[f"{number}.{name}"] = track.contiguous()
        times = [segment.start, segment.seconds, segment.seconds_per_grid]
        table.append([segment.grid, *times, heard.frames, heard.audio_seconds])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.{id(parts)}.part")
    try:
        save_file(tensors, partial, metadata={"segments": json.dumps(table)})
    except SafetensorError as error:  # a full disk, in its own words
        partial.unlink(missing_ok=True)
        raise OSError(errno.EIO, str(error), str(path)) from error
    partial.replace(path)


def restore_segments(path: Path, device: torch.device) -> Iterator[EncodedSegment]:
    """The segments as they were made, on the device where they would be made, one after the other."""
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        for number, row in enumerate(json.loads(file.metadata()["segments"])):
            (time, rows, columns), start, seconds, spacing, frames, audio_seconds = row
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
            )
            yield EncodedSegment(encoded=encoded, heard=MediaStats(frames=frames, audio_seconds=audio_seconds))
