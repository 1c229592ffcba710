"""Reads annotation files: rows with their origin, options with their letters, videos on disk."""

import os.path
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, final

from omnimem.data import Item, Message, Sample
from omnimem.errors import counted, first_line
from omnimem.extras import optional
from omnimem.limits import exceeds
from omnimem.tasks.rules import LETTERS
from omnimem.textfile import ManifestError, got, parse_json, path_problem, read_text

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import parquet
else:
    pyarrow, parquet = optional("pyarrow"), optional("pyarrow.parquet")

SUFFIXES = (".mp4", ".MP4", ".mkv", ".webm")
# "A. text", "A.text", "A) text", "(A) text", "A: text"; not the initials of "A.M. radio"
LABEL = re.compile(r"\(?([A-Z])[.):](?![A-Z]\.)\s*")
AGAIN = "download the annotations again"
PARQUET_ROWS = 256  # of a table are unpacked at once

Row = Mapping[str, Any]


@final
@dataclass(frozen=True, kw_only=True)
class Defect:
    """An error in the published annotations and how it was handled; listed in every result."""

    rule: str  # one word for the kind of defect
    where: str  # id of the question or of the sample
    what: str  # the error, and how it was handled


@final
@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question with its prompt."""

    item: Item
    prompt: str
    answer: str
    at: float | None = None


@final
@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a question: lines for the prompt, and texts without letters."""

    lines: tuple[str, ...]
    texts: tuple[str, ...]


@final
@dataclass
class AnnotationReader:
    """Collects problems, which are raised at the end, and defects, which are handled and listed."""

    problems: list[str] = field(default_factory=list)
    defects: list[Defect] = field(default_factory=list)
    cure: str = AGAIN  # of a value that is not as the authors of the annotations wrote it

    def text(self, row: Row, key: str, origin: str) -> str:
        """The text of a key; anything else is a problem."""
        value = row.get(key)
        if isinstance(value, str) and value.strip():
            return value
        self.problems.append(f"{origin} {key}: expected text, got {got(value)}; {self.cure}")
        return ""

    def one_of(self, row: Row, key: str, known: Sequence[str], origin: str) -> None:
        """A value outside of `known` is a problem: no selection would contain it."""
        if row.get(key) not in known:
            self.problems.append(f"{origin} {key}: expected {', '.join(known)}, got {got(row.get(key))}; {self.cure}")

    def letter(self, row: Row, key: str, origin: str) -> str:
        """The letter of the right answer, in upper case, without the characters around it."""
        found = re.match(r"\s*\(?([A-Za-z])(?![A-Za-z])", str(row.get(key) or ""))
        if found:
            return found[1].upper()
        self.problems.append(f"{origin} {key}: expected the letter of an option, got {got(row.get(key))}; {self.cure}")
        return ""

    def options(self, strings: Sequence[str], where: str) -> Options:
        """Options from their strings. Repairs, each of them a defect: empty strings and strings before option A are
        left out, the parts of a split option are joined, missing letters are added.
        """
        # 1. leave out what is no option
        filled = [string.strip() for string in strings if string.strip()]
        if len(filled) < len(strings):
            self.defect(
                "option_list",
                where,
                f"{len(strings) - len(filled)} of {counted(len(strings), 'option')} empty; left out",
            )
        first = next((place for place, string in enumerate(filled) if _labelled(string, 0)), None)
        if first is None or not any(_labelled(string, 1) for string in filled[first + 1 :]):
            self.defect("option_letters", where, "options without letters; added in their order")
            return lettered(filled)
        if first:
            self.defect("option_list", where, f"{' '.join(filled[:first])!r} precedes option A; left out")
        # 2. join the parts of split options
        lines: list[str] = []
        for string in filled[first:]:
            if _labelled(string, len(lines)):
                lines.append(string)
            else:
                lines[-1] += f" {string}"
        if len(lines) < len(filled) - first:
            split = f"{counted(len(filled) - first, 'string')} for {counted(len(lines), 'option')}"
            self.defect("option_list", where, f"{split}; the others are joined to the previous option")
        return Options(lines=tuple(lines), texts=tuple(LABEL.sub("", line, count=1) for line in lines))

    def check_answer(self, answer: str, texts: Sequence[str], where: str) -> None:
        """A right answer outside of the options, with which no prediction is correct, is a defect."""
        if answer and texts and answer not in LETTERS[: len(texts)]:
            what = f"the right answer is {answer} of {counted(len(texts), 'option')}; no prediction is correct"
            self.defect("answer", where, what)

    def several_labels(self, samples: Sequence[Sample], axis: str) -> None:
        """A defect if questions have several labels of an axis."""
        labels = [question.item.categories.get(axis, ()) for sample in samples for question in sample.questions]
        several = sum(len(each) > 1 for each in labels)
        if several:
            what = f"{several:,} of {counted(len(labels), 'question')} with several; each counts once under every label"
            self.defect("several_labels", axis, what)

    def defect(self, rule: str, where: str, what: str) -> None:
        """Add a defect."""
        self.defects.append(Defect(rule=rule, where=where, what=what))

    def done(self, samples: Sequence[Sample]) -> None:
        """Raises ManifestError if there are problems; no questions, and two questions of one id, are problems too."""
        if not samples and not self.problems:
            self.problems.append(f"no questions were found; {self.cure}")
        ids = Counter(question.item.id for sample in samples for question in sample.questions)
        self.problems += [
            f"{sample.origin}: question {question.item.id!r} occurs {ids[question.item.id]} times; {self.cure}"
            for sample in samples
            for question in sample.questions
            if ids[question.item.id] > 1
        ]
        if self.problems:
            raise ManifestError(list(dict.fromkeys(self.problems)))


def _labelled(string: str, place: int) -> bool:
    """Whether a string begins with the letter of its position."""
    found = LABEL.match(string)
    return found is not None and place < len(LETTERS) and found[1] == LETTERS[place]


def kept_letters(strings: Sequence[str]) -> Options | None:
    """Options whose strings all begin with the letter of their position; None if one of them does not."""
    lines = tuple(string.strip() for string in strings)
    if not all(_labelled(line, place) for place, line in enumerate(lines)):
        return None
    return Options(lines=lines, texts=tuple(LABEL.sub("", line, count=1) for line in lines))


def lettered(texts: Sequence[str]) -> Options:
    """Options of texts without letters."""
    lines = tuple(f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False))
    return Options(lines=lines, texts=tuple(texts))


def strings_of(value: Any) -> list[str] | None:
    """The value if it is a list of strings, else None."""
    return list(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else None


def grouped(rows: Iterable[tuple[str, Row]], key: str) -> list[list[tuple[str, Row]]]:
    """Rows grouped by a value, in the order of first appearance."""
    groups: dict[str, list[tuple[str, Row]]] = {}
    for origin, row in rows:
        groups.setdefault(str(row.get(key)), []).append((origin, row))
    return list(groups.values())


def labels_of(row: Row, keys: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Categories of a row: labels by axis, without the axes that the row does not have."""
    found = {key: row[key] if isinstance(row.get(key), list) else [row.get(key)] for key in keys}
    named = {key: tuple(str(label) for label in labels if label not in (None, "")) for key, labels in found.items()}
    return {key: labels for key, labels in named.items() if labels}


def stream_of(
    name: str,
    video: Path,
    asked: Sequence[Asked],
    *,
    audio: Path | None = None,
    start: float = 0.0,
    end: float | None = None,
    seconds: tuple[float, float] | None = None,
    cluster: str = "",
    origin: str = "",
) -> Sample:
    """A sample with its questions in order; `seconds`: the shortest and longest length expected of the file."""
    # 1. a user message and its answer per question
    turns = [
        (Message(role="user", content=one.prompt, at=one.at), Message(role="assistant", content=one.answer))
        for one in asked
    ]
    # 2. the stream
    return Sample(
        id=name,
        video=video,
        audio=audio,
        start=start,
        end=end,
        messages=tuple(message for turn in turns for message in turn),
        meta={} if seconds is None else {"seconds": seconds},
        items=tuple(one.item for one in asked),
        cluster=cluster,
        origin=origin,
    )


# ------------------------------------------------------------------------------------------------------------ files


def read_json(path: Path) -> Any:
    """The value of a JSON file; raises ManifestError."""
    return parse_json(read_text(path, AGAIN), str(path), AGAIN)


def read_parquet(path: Path) -> list[tuple[str, Row]]:
    """The rows of a parquet file, each with `file:row n`; raises ManifestError."""
    rows: list[Row] = []
    size = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                size += batch.nbytes
                for name, value in (("table_bytes", size), ("table_rows", len(rows) + batch.num_rows)):
                    if what := exceeds(name, value):
                        raise ManifestError([f"{path}: unpacked, its size ({name}) of {what}"])
                rows += batch.to_pylist()
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise ManifestError([f"{path}: cannot be read ({first_line(error)}); {AGAIN}"]) from error
    return [(f"{path}:row {number}", row) for number, row in enumerate(rows, start=1)]


def first_file(candidates: Iterable[Path]) -> Path | None:
    """The first existing file."""
    return next((path for path in candidates if os.path.isfile(path)), None)


def video_file(root: Path, folders: Sequence[str], stem: str) -> Path:
    """The video of this name in one of the folders, else its expected path."""
    if PurePosixPath(stem).name != stem or "\\" in stem or path_problem(stem + SUFFIXES[0]):
        raise ManifestError([f"{root}: {stem[:60]!r} cannot name a video; {AGAIN}"])
    paths = [root / folder / f"{stem}{suffix}" for folder in folders for suffix in SUFFIXES]
    return first_file(paths) or paths[0]
