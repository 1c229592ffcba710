"""A folder that is whole or does not count: sealed with digests, moved into place at once, judged before it is used."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

SEAL = "sealed.json"
FORMAT = "omnimem sealed folder 1"


def seal(folder: Path, **facts: Any) -> None:
    """Bring every file of a folder to the disk and note its size and sha256 in sealed.json, with what else is said."""
    files = {name: {"bytes": path.stat().st_size, "sha256": _digest(path)} for name, path in _files(folder).items()}
    with (folder / SEAL).open("w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, **facts, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for inner in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        _sync(inner)


def put(folder: Path, place: Path) -> None:
    """Give a folder its name in one step, on one file system; what had the name before is moved away, then removed."""
    former = folder.with_name(f"{folder.name}.former")
    if place.exists():
        place.rename(former)
    folder.rename(place)
    _sync(place.parent)
    shutil.rmtree(former, ignore_errors=True)


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, in words; None when every file is as it was sealed.

    Files that were added later do not count.
    """
    try:
        table = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        files = {str(name): (int(known["bytes"]), str(known["sha256"])) for name, known in table["files"].items()}
    except FileNotFoundError:
        return f"{SEAL} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{SEAL} cannot be read"
    return next((what for name, known in files.items() if (what := _changed(folder / name, name, *known))), None)


def _changed(path: Path, name: str, size: int, digest: str) -> str | None:
    try:
        found = path.stat().st_size
        if found != size:
            return f"{name} has {found} of {size} bytes"
        return None if _digest(path, sync=False) == digest else f"{name} is not what was written (sha256)"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"


def _files(folder: Path) -> dict[str, Path]:
    """The files of a folder by their relative names, in order; a seal of earlier is none of them."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in found.items() if name != SEAL}


def _digest(path: Path, *, sync: bool = True) -> str:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """Bring a folder's list of names to the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
