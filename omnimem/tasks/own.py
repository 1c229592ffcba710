"""A multiple-choice set of the user's own: one question per line; questions about one stream share a pass.

{"id", "video", "question", "options": [texts], "answer": letter, "audio", "start", "end", "at": seconds,
"categories": {axis: label or list of labels}}; the first five are required; see docs/benchmarks.md.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, final

from omnimem.data import Item, Sample, is_inside, is_seconds, unknown_key
from omnimem.errors import counted
from omnimem.tasks.annotations import (
    AnnotationReader,
    Asked,
    Options,
    Row,
    kept_letters,
    labels_of,
    lettered,
    stream_of,
)
from omnimem.tasks.base import AnnotatedBenchmark
from omnimem.tasks.rules import LETTERS, LMMS_EVAL, RuleSet
from omnimem.textfile import path_problem, read_objects

KEYS = ("id", "video", "question", "options", "answer", "audio", "start", "end", "at", "categories")


def letter(prediction: str, letters: str) -> str | None:
    """A letter by itself, in either case, with any punctuation; nothing else is an answer."""
    found = re.fullmatch(r"[\W_]*([A-Za-z])[\W_]*", prediction)
    return found[1].upper() if found and found[1].upper() in letters else None


@final
@dataclass(frozen=True, kw_only=True)
class OwnOptions(AnnotatedBenchmark):
    """Questions of the user's own."""

    rule_sets: ClassVar[Mapping[str, RuleSet]] = {
        "lmms_eval": LMMS_EVAL,
        "letter": RuleSet(read=letter, denominator="all"),
    }
    cure: ClassVar[str] = "correct the file"
    name: Literal["own"] = "own"
    root: str = "data/own"  # paths of media are relative to it
    questions: str = "questions.jsonl"  # in the folder
    title: str = "own"  # of the result files
    # after the options of a question
    instruction: str = "Answer with the option's letter from the given choices directly."
    rules: Literal["lmms_eval", "letter"] = "lmms_eval"
    allow_absolute_paths: bool = False  # accept media outside of root

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", self.title):
            raise ValueError(f"title = {self.title!r} cannot name a file; use letters, digits, `.`, `_` and `-`")

    @property
    def label_parts(self) -> list[str]:
        return [self.title]

    @property
    def annotations(self) -> tuple[Path, ...]:
        return (Path(self.root) / self.questions,)

    @property
    def sources(self) -> tuple[str, str]:
        return "write it as docs/benchmarks.md shows", "put them there, or correct `video`"

    def read(self, reader: AnnotationReader) -> list[Sample]:
        """One sample per stream (video, audio, start, end), in order of appearance."""
        streams: dict[tuple[object, ...], list[tuple[str, Row]]] = {}
        for origin, row in read_objects(self.annotations[0]):
            reader.problems += [
                f"{origin} {key}: {unknown_key(key, KEYS, 'put it under categories')}" for key in row if key not in KEYS
            ]
            stream = tuple(repr(row.get(key)) for key in ("video", "audio", "start", "end"))
            streams.setdefault(stream, []).append((origin, row))
        return [self._sample(rows, reader) for rows in streams.values()]

    def _sample(self, rows: list[tuple[str, Row]], reader: AnnotationReader) -> Sample:
        # 1. check the values of the stream
        origin, first = rows[0]
        video = self._media(reader.text(first, "video", origin), "video", origin, reader)
        audio = first.get("audio")
        start, end = _seconds(first, "start", origin, reader) or 0.0, _seconds(first, "end", origin, reader)
        if end is not None and end <= start:
            reader.problems.append(f"{origin} end: {end:g} is not after start = {start:g}; swap or remove them")
        # 2. name it by them
        span = "" if (start, end) == (0.0, None) else f"@{start:g}-{'' if end is None else f'{end:g}'}"
        return stream_of(
            f"{first.get('video')}{'' if audio is None else f'+{audio}'}{span}",
            video,
            [self._asked(row, place, start, end, reader) for place, row in rows],
            audio=None if audio is None else self._media(reader.text(first, "audio", origin), "audio", origin, reader),
            start=start,
            end=end,
            cluster=str(first.get("video")),
            origin=origin,
        )

    def _asked(self, row: Row, origin: str, start: float, end: float | None, reader: AnnotationReader) -> Asked:
        # 1. check the values
        where, options = reader.text(row, "id", origin), _options(row, origin, reader)
        answer = reader.letter(row, "answer", origin)
        if answer and answer not in LETTERS[: len(options.texts)]:
            reader.problems.append(
                f"{origin} answer: {answer} is not one of {counted(len(options.texts), 'option')}; correct one of them"
            )
        at = _seconds(row, "at", origin, reader)
        if at is not None and (at <= start or (end is not None and at > end)):
            reader.problems.append(f"{origin} at: {at:g} is outside the stream; give seconds of the file")
        categories = {} if row.get("categories") is None else row["categories"]
        if not isinstance(categories, dict):
            reader.problems.append(f"{origin} categories: expected an object of labels; write {{axis: label}}")
            categories = {}
        # 2. write the prompt
        question = reader.text(row, "question", origin)
        return Asked(
            item=Item(id=where, question=question, options=options.texts, categories=labels_of(categories, categories)),
            prompt="\n".join([question, *options.lines, self.instruction]),
            answer=answer,
            at=at,
        )

    def _media(self, path: str, key: str, origin: str, reader: AnnotationReader) -> Path:
        if problem := path_problem(path):
            reader.problems.append(f"{origin} {key}: {problem}")
        if not self.allow_absolute_paths and not is_inside(path):
            cure = f"use a path below {self.root}, or allow it (allow_absolute_paths: true)"
            reader.problems.append(f"{origin} {key}: {path} is outside the folder; {cure}")
        return Path(self.root) / path


def _options(row: Row, origin: str, reader: AnnotationReader) -> Options:
    """The texts with letters; letters are kept if every option has its own, and added to the texts otherwise.

    So `A. A. Milne` is an option when the others have letters too, and `A.M. radio` one when they have none.
    """
    texts = row.get("options")
    if (
        not isinstance(texts, list)
        or not 2 <= len(texts) <= len(LETTERS)
        or not all(isinstance(text, str) and text.strip() for text in texts)
    ):
        reader.problems.append(f'{origin} options: expected a list of 2 to {len(LETTERS)} texts; write ["...", "..."]')
        return Options(lines=(), texts=())
    return kept_letters(texts) or lettered(texts)


def _seconds(row: Row, key: str, origin: str, reader: AnnotationReader) -> float | None:
    value = row.get(key)
    if value is None or is_seconds(value):
        return None if value is None else float(value)
    reader.problems.append(f"{origin} {key}: expected seconds (0 or more) or null, got {value!r}; correct it")
    return None
