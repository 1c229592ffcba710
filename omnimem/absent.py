"""Why a path names no file: a URL, a `~` or variable that no shell expanded, or a name that is written otherwise."""

import os.path
import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):/+", re.IGNORECASE)
_DIFFER: dict[str, Callable[[str], str]] = {  # what may differ between the name that is given and the one that exists
    "in Unicode form": lambda name: unicodedata.normalize("NFC", name),
    "in upper and lower case": str.casefold,
    "in spaces around it": str.strip,
    "in spelling": lambda name: unicodedata.normalize("NFKC", unquote(name)).casefold().strip(),
}


def why_absent(path: Path | str, otherwise: str) -> str:
    """How to repair a path that does not exist, where that can be seen; else `otherwise`.

    A file of the same name is looked for in another case, Unicode form (NFC, NFD), with other spaces around it, with
    `/` for each backslash, and with `%20` and the like decoded.
    """
    given = str(path)
    # 1. no path
    if url := as_url(given):
        if url.startswith("file:"):
            return f"is a URL; give the path alone: {unquote(_SCHEME.sub('/', url))}"
        return "is a URL, and only files are read; download it, and give the path of the file"
    # 2. what a shell would have expanded; Python does not
    if sign := next((part for part in Path(given).parts if part.startswith(("~", "$"))), None):
        whole = os.path.expanduser(os.path.expandvars(given[given.index(sign) :]))
        found = f": {whole}" if os.path.exists(whole) else ""
        return f"{sign} is not expanded here; write the whole path{found}"
    # 3. a name that is written otherwise
    if "\\" in given:
        other = Path(given.replace("\\", "/"))
        at = other if other.exists() else _written_otherwise(other)
        return f"write / in place of \\ between folders{'' if at is None else f': {at}'}"
    if (found_at := _written_otherwise(Path(given))) is None:
        return otherwise
    shown = ascii(str(found_at)) if _looks_same(found_at, given) else str(found_at)
    return f"there is {shown}, which differs {_difference(Path(given), found_at)}; rename it, or correct the path"


def as_url(path: Path | str) -> str | None:
    """The URL that a path is, with the second slash that `Path` drops; None for the path of a file."""
    scheme = _SCHEME.match(str(path))
    if scheme is None or os.path.exists(scheme[0]):
        return None
    start = "file:///" if scheme[1].lower() == "file" else f"{scheme[1]}://"
    return start + str(path)[scheme.end() :]


def _written_otherwise(path: Path) -> Path | None:
    """The one that exists and differs from `path` only as `_DIFFER` lists, in any of its folders too; or None."""
    place = Path(path.anchor)
    for part in path.parts[1 if path.anchor else 0 :]:
        if not os.path.lexists(place / part):
            try:
                names = _names(str(place), os.stat(place).st_mtime_ns)
            except OSError:
                return None
            part = names.get(_DIFFER["in spelling"](part), "")
            if not part:
                return None
        place /= part
    return place if place.exists() else None


@lru_cache(maxsize=8)
def _names(folder: str, _changed: int) -> dict[str, str]:
    """The names in a folder, by their common spelling; `_changed` is its time of change."""
    return {_DIFFER["in spelling"](name): name for name in os.listdir(folder)}


def _difference(given: Path, found: Path) -> str:
    """The least of `_DIFFER` by which two paths differ."""
    pairs = list(zip(given.parts, found.parts, strict=True))
    return next((how for how, same in _DIFFER.items() if all(same(a) == same(b) for a, b in pairs)), "in spelling")


def _looks_same(found: Path, given: str) -> bool:
    """Whether two paths cannot be told apart where they are shown."""
    return unicodedata.normalize("NFC", str(found)) == unicodedata.normalize("NFC", given)
