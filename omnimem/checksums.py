"""Folders with checksums: sealed after writing, moved into place atomically, verified before use."""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from omnimem.errors import counted
from omnimem.limits import read_within

SEAL = "sealed.json"
FORMAT = "omnimem sealed folder 1"
FREE = ("README.md",)  # for people; may be edited
SHOWN = 12  # characters of a digest in a message


@final
@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the weights of a sealed folder come from; None: not known."""

    run: str | None = None  # id in run.json
    step: int | None = None  # optimizer steps
    base: str | None = None  # of the weights that were tuned (`omnimem.backbones.files.weights_digest`)


def seal(folder: Path, origin: Origin | None = None, *, names: Collection[str] = (), **facts: Any) -> None:
    """Sync all files of a folder, or those of `names`, to disk and write their sizes and SHA-256 to sealed.json.

    `facts` are written beside them.
    """
    known = {name: value for name, value in asdict(origin or Origin()).items() if value is not None}
    chosen = {name: path for name, path in _files(folder).items() if not names or name in names}
    for path in chosen.values():
        share(path)
    files = {name: {"bytes": path.stat().st_size, "sha256": _digest(path)} for name, path in chosen.items()}
    partial = folder / f".{SEAL}"
    with partial.open("w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, **facts, **known, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / SEAL)
    for inner in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        _sync(inner)


def seal_again(folder: Path) -> None:
    """Seal a folder with the facts that its sealed.json has, after a file was added; without a seal it stays so."""
    if is_sealed(folder):
        table = json.loads((folder / SEAL).read_bytes())
        seal(folder, **{name: value for name, value in table.items() if name not in ("format", "files")})


def is_sealed(folder: Path) -> bool:
    """Whether a folder has a sealed.json, of whatever kind or content."""
    return os.path.lexists(folder / SEAL)


def origin_of(folder: Path) -> Origin:
    """What sealed.json says about where the weights come from; nothing without it, or where it cannot be read."""
    try:
        table = json.loads(read_within(folder / SEAL))
        found = {name: table.get(name) for name in ("run", "step", "base")}
    except (OSError, ValueError, AttributeError, RecursionError):
        return Origin()
    kinds = {"run": str, "step": int, "base": str}
    return Origin(**{name: value for name, value in found.items() if type(value) is kinds[name]})


def share(place: Path) -> None:
    """Give a file, or all files of a folder, the mode of a new file: safetensors writes 0600, whatever the umask."""
    umask = os.umask(0o077)  # it can be read only by setting it
    os.umask(umask)
    for path in place.rglob("*") if place.is_dir() else (place,):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~umask)


def put(folder: Path, place: Path) -> None:
    """Rename a folder to `place` atomically (on one file system); an existing folder there is removed."""
    former = folder.with_name(f"{folder.name}.former")
    if place.exists():
        place.rename(former)
    folder.rename(place)
    _sync(place.parent)
    shutil.rmtree(former, ignore_errors=True)


def damage(folder: Path, names: Collection[str] = (), *, listed: bool = True) -> str | None:
    """A description of the damage of a sealed folder; None when all sealed files are unchanged.

    With `names` only these are read, and must be among the sealed files if `listed`. Files added later are ignored.
    """
    try:
        table = json.loads(read_within(folder / SEAL).decode())
        files = {str(name): (int(known["bytes"]), str(known["sha256"])) for name, known in table["files"].items()}
    except FileNotFoundError:
        return f"{SEAL} is missing"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        return f"{SEAL} cannot be read"
    if not files:
        return f"{SEAL} lists no files"
    if listed and (unknown := [name for name in names if name not in files]):
        return f"{SEAL} does not list {unknown[0]}"
    chosen = {name: known for name, known in files.items() if name in names or (not names and name not in FREE)}
    return next((what for name, known in chosen.items() if (what := _changed(folder / name, name, *known))), None)


def _changed(path: Path, name: str, size: int, digest: str) -> str | None:
    try:
        status = path.stat()
        found = status.st_size
        if not stat.S_ISREG(status.st_mode):
            return f"{name!a} is not a file"
        if found != size:
            return f"{name} has {found} of {counted(size, 'byte')}"
        now = _digest(path, sync=False)
        return None if now == digest else f"{name} has changed (sha256 {now[:SHOWN]}, sealed as {digest[:SHOWN]})"
    except FileNotFoundError:
        return f"{name} is missing"
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        return f"{name!a} cannot be read ({getattr(error, 'strerror', error)})"


def _files(folder: Path) -> dict[str, Path]:
    """The files of a folder by relative name, in order, without sealed.json."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in found.items() if name not in (SEAL, f".{SEAL}", *FREE)}


def _digest(path: Path, *, sync: bool = True) -> str:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """Sync the entries of a folder to disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
