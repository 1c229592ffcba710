"""A benchmark of given samples, and an evaluation that ends in the middle of a line."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omnimem.data import Question, Sample
from omnimem.tasks import Defect, Gap, Verdict

Line = dict[str, Any]


class Given:
    """A benchmark of given samples; an even number of letters is right, none at all is no answer."""

    label, rules, annotations = "given", "even", ()

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = list(samples)

    def samples(self) -> list[Sample]:
        return self._samples

    def gaps(self) -> list[Gap]:
        return []

    def defects(self) -> list[Defect]:
        return [Defect(rule="known", where="somewhere", what="handled")]

    def judge(self, question: Question, prediction: str) -> Verdict:
        answer = prediction or None
        return Verdict(
            answer=answer, correct=len(prediction) % 2 == 0 and bool(prediction), counted=bool(answer), bare=True
        )


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
