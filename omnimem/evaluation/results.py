"""Result lines of one arm on one benchmark, written by one process or by several at the same time.

Each process appends to its own file: `eval/<arm>/<label>.jsonl` if it is the only one, else a file in `parts/`. At the
end the lines are merged into the first file in the order of the benchmark, independent of the number of processes.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, final

from pydantic import FiniteFloat
from typing_extensions import TypedDict

from omnimem.data import Sample
from omnimem.evaluation.sharding import Shard
from omnimem.limits import read_within
from omnimem.run import append_line, write_text
from omnimem.textfile import of_shape, parse_stored

MEASURED = ("seconds", "peak_memory")  # fields that differ between two runs of the same question
AGAIN = "delete the line and start the evaluation again: it asks the question again"


class ResultLine(TypedDict):
    """What every line holds."""

    id: str
    video: str
    stream: str
    prompt_sha256: str
    answer: str
    kind: str
    categories: dict[str, list[str]]
    correct: bool
    parsed: bool
    counted: bool
    bare: bool


class FailedLine(ResultLine):
    """The line of a question whose stream cannot be read."""

    failed: str
    message: str


class Tokens(TypedDict):
    """Tokens by modality."""

    audio: FiniteFloat
    visual: FiniteFloat


class Seconds(TypedDict):
    """Seconds by what they were taken for."""

    media: FiniteFloat
    reading: FiniteFloat
    first_token: FiniteFloat
    answer: FiniteFloat


class AnsweredLine(ResultLine):
    """The line of an answered question, with its measurements."""

    prediction: str
    stream_seconds: FiniteFloat
    tokens_in: Tokens
    kept: Tokens
    peak_entries: FiniteFloat
    entries: FiniteFloat
    text_entries: NotRequired[FiniteFloat]  # text kept per layer, beyond the budget; not in results of earlier versions
    bytes: int
    frames: int
    audio_seconds: FiniteFloat
    seconds: Seconds
    peak_memory: int | None


@final
class Results:
    """The lines so far; a question of an unreadable stream has a line with `failed`."""

    def __init__(self, folder: Path, label: str, samples: Sequence[Sample], shard: Shard) -> None:
        self.path, self._parts = folder / f"{label}.jsonl", folder / "parts"
        self._label = label
        self._own = self.path if shard.whole else self._parts / f"{label}.{shard.index}of{shard.count}.jsonl"
        self._order = {question.item.id: None for sample in samples for question in sample.questions}
        self._own.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(self._own)

    def answered(self) -> set[str]:
        """Ids of the questions with an answer; failed ones are tried again."""
        return {line["id"] for line in self._lines() if not line.get("failed")}

    def untried(self) -> list[str]:
        """Ids of the questions with neither an answer nor a failure."""
        tried = {line["id"] for line in self._lines()}
        return [key for key in self._order if key not in tried]

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append lines."""
        for line in lines:
            append_line(self._own, line)

    def fold(self) -> list[dict[str, Any]]:
        """Write one file in the order of the benchmark, each question once; no process may still be writing."""
        lines: dict[str, dict[str, Any]] = {}
        for line in self._lines():
            if line["id"] in self._order and not _answers(lines.get(line["id"])):
                lines[line["id"]] = line
        ordered = [lines[key] for key in self._order if key in lines]
        write_text(self.path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in ordered))
        for part in self._others():
            part.unlink()
        if self._parts.is_dir() and not any(self._parts.iterdir()):
            self._parts.rmdir()
        return ordered

    def _others(self) -> list[Path]:
        mine = re.compile(rf"{re.escape(self._label)}\.\d+of\d+\.jsonl")
        return sorted(path for path in self._parts.glob("*.jsonl") if mine.fullmatch(path.name))

    def _lines(self) -> Iterator[dict[str, Any]]:
        for path in (self.path, *self._others()):
            if path.is_file():
                yield from _read(path)


def _answers(line: Mapping[str, Any] | None) -> bool:
    return line is not None and not line.get("failed")


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """Complete lines; the last one may be incomplete. Raises StoredFileError for a damaged line."""
    whole = read_within(path).rpartition(b"\n")[0]
    for number, data in enumerate(whole.split(b"\n"), start=1) if whole else ():
        place = f"{path}:{number}"
        line = parse_stored(data, dict[str, Any], place, AGAIN)
        yield of_shape(line, FailedLine if line.get("failed") else AnsweredLine, place, AGAIN)


def _drop_torn_line(path: Path) -> None:
    """Remove the incomplete last line of a killed process."""
    if path.is_file():
        whole = read_within(path).rpartition(b"\n")
        if whole[2]:
            os.truncate(path, len(whole[0]) + len(whole[1]))
