"""Limits against input that would fill memory or run for hours; each is raised with `--limit NAME=N`.

The option is stored in an environment variable, so that processes which a command starts have the same limits.
"""

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from omnimem.errors import UserError

BYTES_PER_SECOND = 16  # of a file beyond `sparse_seconds`: a still picture, or silence, has more
RAISED = "OMNIMEM_LIMITS"  # NAME=N,NAME=N
LIMITS = {
    "text_characters": 65_536,  # of a question, an answer or a system prompt
    "template_characters": 200_000,  # of a rendered chat template
    "template_seconds": 20,  # to render it
    "file_bytes": 2_000_000_000,  # of a text or JSON file, which is read at once
    "config_bytes": 1_000_000,  # of a YAML file, and of overrides
    "config_values": 20_000,  # in a config, after its aliases are expanded
    "table_bytes": 200_000_000,  # of an xlsx or parquet table when it is unpacked
    "table_rows": 1_000_000,
    "table_columns": 512,
    "frame_pixels": 36_000_000,  # of a decoded frame: 8K
    "sparse_seconds": 3600,  # of a stream whose file has fewer than BYTES_PER_SECOND
    "frames_per_byte": 1,  # of a file
    "resampling": 16,  # the checkpoint's sample rate over that of the audio
    "lora_rank": 4096,
    "model_layers": 1024,  # of each tower and of the text model
    "budget_layers": 4096,
    "processes": 256,  # of an evaluation, and decoders of each
    "bootstrap_draws": 1_000_000,
    "upload_bytes": 8_000_000_000,  # of a file that is uploaded to `omnimem demo-ui`
}


def limit(name: str) -> int:
    """The value of a limit: as raised by `--limit`, else as in LIMITS."""
    given = dict(part.split("=") for part in os.environ.get(RAISED, "").split(",") if part)
    return int(given.get(name, LIMITS[name]))


def raise_limits(settings: Sequence[str]) -> None:
    """Set limits from NAME=N, for this process and those that it starts; raises UserError."""
    for setting in settings:
        name, _, number = setting.partition("=")
        if name not in LIMITS or not (number.isascii() and number.isdigit() and 0 < int(number[:20]) < 2**62):
            raise UserError(f"--limit {setting[:60]}: expected NAME=N, a number; the names are {', '.join(LIMITS)}")
        os.environ[RAISED] = f"{os.environ.get(RAISED, '')},{name}={number}".strip(",")


def exceeds(name: str, value: int) -> str | None:
    """Why a value is refused, with the option that allows it; None within the limit."""
    most = limit(name)
    return None if value <= most else f"{value:,} is more than {name} = {most:,}; lower it, or give --limit {name}=N"


def read_within(path: Path, *, pipe: bool = False) -> bytes:
    """The bytes of a file of at most `file_bytes`; `pipe`: or of a pipe, such as `<(command)` in a shell.

    Raises OSError as `open`, for a larger file, and for a device or a pipe, which may have no end.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or (pipe and stat.S_ISFIFO(mode))):
        raise OSError(errno.EINVAL, "it is a device, a socket or a pipe", str(path))
    most = limit("file_bytes")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = [file.read()] if size <= most and stat.S_ISREG(mode) else []
        while not stat.S_ISREG(mode) and size <= most and (block := file.read(1 << 20)):
            content.append(block)
            size += len(block)
    if what := exceeds("file_bytes", size):
        raise OSError(errno.EFBIG, what, str(path))
    return b"".join(content)
