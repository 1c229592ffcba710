"""Frame lists: image files with a rate, read wherever a video file is."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from omnimem.errors import counted

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@final
@dataclass(frozen=True)
class FrameList:
    """Image files of one size; number i is shown from i / fps to (i + 1) / fps seconds."""

    files: tuple[Path, ...]
    fps: float  # of the list; how many of them are read is `stream.fps`

    def __str__(self) -> str:
        return f"{self.files[0]} (the first of {counted(len(self.files), 'frame')})"

    @property
    def seconds(self) -> float:
        """Length of the video."""
        return len(self.files) / self.fps

    def is_file(self) -> bool:
        """Whether all files exist."""
        return all(path.is_file() for path in self.files)

    @classmethod
    def of_folder(cls, folder: Path, fps: float) -> "FrameList":
        """The image files of a folder, in order of their names, numbers in them by value; raises ValueError."""
        files = sorted((path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES), key=_natural)
        if not files:
            raise ValueError(f"holds no frames ({', '.join(SUFFIXES)})")
        return cls(tuple(files), fps)


Video = Path | FrameList


def files_of(media: Sequence[Video | None]) -> tuple[Path, ...]:
    """All files of videos and audio files."""
    each = (one.files if isinstance(one, FrameList) else (one,) for one in media if one is not None)
    return tuple(path for paths in each for path in paths)


def _natural(path: Path) -> list[tuple[int, str]]:
    parts = re.findall(r"\d+|\D+", path.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
