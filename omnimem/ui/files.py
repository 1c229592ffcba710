"""Files that the page may read: those below one folder, and one upload at a time."""

import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, final

from omnimem.errors import UserError
from omnimem.limits import exceeds

SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".ts", ".mpg", ".mpeg", ".flv", ".wmv", ".ogv", ".gif")
SUFFIXES += (".wav", ".mp3", ".m4a", ".flac", ".ogg", ".opus", ".aac")
LISTED = 2000  # entries of a folder


@final
class FileError(UserError):
    """A file that the page asks for and may not have, or that is not there."""


@final
class Library:
    """The media files below a folder."""

    def __init__(self, root: Path | None) -> None:
        """Raises FileError if the folder does not exist; None: there is no such folder."""
        if root is not None and not root.is_dir():
            raise FileError(f"--root: {root} is not a folder; give one with media files")
        self.root = None if root is None else root.resolve()

    def place(self, relative: str) -> Path:
        """The path of a file or folder of the library. Raises FileError for any other one."""
        if self.root is None:
            raise FileError("no folder is shared; start omnimem demo-ui with --root DIR, or upload a file")
        try:
            found = (self.root / relative).resolve(strict=True)
        except (OSError, ValueError, RuntimeError) as error:  # missing, a null byte, a loop of links
            raise FileError(f"{relative[:200]!r} is not below the shared folder") from error
        if not found.is_relative_to(self.root):
            raise FileError(f"{relative[:200]!r} is not below the shared folder")
        return found

    def file(self, relative: str) -> Path:
        """A media file of the library. Raises FileError."""
        found = self.place(relative)
        if not found.is_file() or found.suffix.lower() not in SUFFIXES:
            raise FileError(f"{relative[:200]!r} is not a media file ({', '.join(sorted(SUFFIXES))})")
        return found

    def listing(self, relative: str) -> dict[str, Any]:
        """Folders and media files of a folder; hidden ones, and links that lead out of the library, are left out."""
        if self.root is None:
            return {"root": None, "path": "", "folders": [], "files": [], "left_out": 0}
        folder = self.place(relative)
        if not folder.is_dir():
            raise FileError(f"{relative[:200]!r} is not a folder")
        folders, files = list[str](), list[dict[str, Any]]()
        for path in sorted(folder.iterdir(), key=lambda each: each.name.lower()):
            if path.name.startswith(".") or not path.exists() or not path.resolve().is_relative_to(self.root):
                continue
            if path.is_dir():
                folders.append(path.name)
            elif path.is_file() and path.suffix.lower() in SUFFIXES:
                files.append({"name": path.name, "bytes": path.stat().st_size})
        inside = folder.relative_to(self.root).as_posix()
        return {
            "root": self.root.name,
            "path": "" if inside == "." else inside,
            "folders": folders[:LISTED],
            "files": files[:LISTED],
            "left_out": max(0, len(folders) - LISTED) + max(0, len(files) - LISTED),
        }


@final
class Uploads:
    """The latest upload, in a folder of its own that `close` removes."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="omnimem-ui-"))
        self._number = 0
        self.latest: tuple[str, Path] | None = None  # name and file
        self.used: Path | None = None  # by a stream, which opens it more than once

    async def receive(self, name: str, size: int | None, parts: AsyncIterator[bytes]) -> None:
        """Write an upload; the one before it is removed. Raises FileError if it is too large or no media file."""
        suffix = Path(name).suffix.lower()
        if suffix not in SUFFIXES:
            raise FileError(f"{name[:200]!r} is not a media file ({', '.join(sorted(SUFFIXES))})")
        self._number += 1
        place, written = self._folder / f"{self._number}{suffix}", 0
        with ExitStack() as undo:
            undo.callback(place.unlink, missing_ok=True)  # of a part: refused, no room, or the browser has left
            _check(size or 0)
            with place.open("wb") as file:
                async for part in parts:
                    written += len(part)
                    _check(written)
                    file.write(part)
            if not written:
                raise FileError(f"{name[:200]!r} is empty")
            undo.pop_all()
        for path in self._folder.iterdir():
            if path not in (place, self.used):
                path.unlink()
        self.latest = Path(name).name[:200], place

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _check(size: int) -> None:
    if what := exceeds("upload_bytes", size):
        raise FileError(f"the upload: {what}")
