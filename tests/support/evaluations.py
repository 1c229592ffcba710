"""An evaluation that ends in the middle of a line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def dying(at: int, *, torn: bool, end: Callable[[], None]) -> Callable[[Path, Line], None]:
    """`append_line` that ends the process at a line: before it, or in the middle of it."""
    left = at

    def append(path: Path, line: Line) -> None:
        nonlocal left
        text = json.dumps(line) + "\n"
        with path.open("a") as file:
            file.write(text if left else text[: len(text) // 2 * torn])
        if not left:
            end()
        left -= 1

    return append
