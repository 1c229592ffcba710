"""A multiple-choice set of the user's own: one question a line, questions on one stream asked in one pass.

{"id", "video", "question", "options": [texts], "answer": letter, "audio", "start", "end", "at": seconds,
"categories": {axis: label or list of labels}}; the first five are needed, docs/benchmarks.md tells the rest.
"""

import math
import os.path
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, final

from omnimem.data import Item, Question, Sample
from omnimem.tasks.annotations import (
    AnnotationReader,
    Asked,
    Options,
    Row,
    labels_of,
    missing_videos,
    read_lines,
    stream_of,
)
from omnimem.tasks.base import Defect, Gap, Verdict
from omnimem.tasks.rules import LETTERS, LMMS_EVAL, RuleSet

KEYS = ("id", "video", "question", "options", "answer", "audio", "start", "end", "at", "categories")


def letter(prediction: str, letters: str) -> str | None:
    """A letter by itself, in either case, with any signs around it; nothing else is an answer."""
    found = re.fullmatch(r"[\W_]*([A-Za-z])[\W_]*", prediction)
    return found[1].upper() if found and found[1].upper() in letters else None


RULES: Mapping[str, RuleSet] = {"lmms_eval": LMMS_EVAL, "letter": RuleSet(read=letter, denominator="all")}


@final
@dataclass(frozen=True, kw_only=True)
class OwnOptions:
    """Questions of one's own."""

    name: Literal["own"] = "own"
    root: str = "data/own"  # media are found below it
    questions: str = "questions.jsonl"  # in the folder
    title: str = "own"  # of the result files
    instruction: str = "Answer with the option's letter from the given choices directly."
    rules: Literal["lmms_eval", "letter"] = "lmms_eval"
    allow_absolute_paths: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", self.title):
            raise ValueError(f"title = {self.title!r} cannot name a file; use letters, digits, `.`, `_` and `-`")

    @property
    def label(self) -> str:
        """Of the result files."""
        return self.title if self.rules == "lmms_eval" else f"{self.title}_{self.rules}"

    @property
    def published(self) -> None:
        """Nobody else knows how many there should be."""
        return

    @property
    def annotations(self) -> tuple[Path, ...]:
        """The file of questions."""
        return (Path(self.root) / self.questions,)

    def gaps(self) -> list[Gap]:
        """The questions and the videos."""
        if not self.annotations[0].is_file():
            return [Gap(what=f"{self.annotations[0]}", how="write it as docs/benchmarks.md shows")]
        return missing_videos(self.samples(), "put them there, or mend `video`")

    def samples(self) -> list[Sample]:
        """One sample a stream (video, audio, start, end), in order of appearance; raises ManifestError."""
        return self._read()[0]

    def defects(self) -> list[Defect]:
        """What was repaired in lists of options."""
        return self._read()[1]

    def judge(self, question: Question, prediction: str) -> Verdict:
        """By the rule set of `rules`."""
        return RULES[self.rules].judge(question, prediction)

    def _read(self) -> tuple[list[Sample], list[Defect]]:
        reading = AnnotationReader()
        streams: dict[tuple[object, ...], list[tuple[str, Row]]] = {}
        for origin, row in read_lines(self.annotations[0]):
            _check_keys(row, origin, reading)
            streams.setdefault(tuple(repr(row.get(key)) for key in ("video", "audio", "start", "end")), []).append(
                (origin, row)
            )
        samples = [self._sample(rows, reading) for rows in streams.values()]
        reading.done(samples)
        return samples, reading.defects

    def _sample(self, rows: list[tuple[str, Row]], reading: AnnotationReader) -> Sample:
        origin, first = rows[0]
        video = self._media(reading.text(first, "video", origin), "video", origin, reading)
        audio = first.get("audio")
        start, end = _seconds(first, "start", origin, reading) or 0.0, _seconds(first, "end", origin, reading)
        if end is not None and end <= start:
            reading.problems.append(f"{origin} end: {end:g} is not after start = {start:g}; swap or remove them")
        span = "" if (start, end) == (0.0, None) else f"@{start:g}-{'' if end is None else f'{end:g}'}"
        return stream_of(
            f"{first.get('video')}{'' if audio is None else f'+{audio}'}{span}",
            video,
            [self._asked(row, place, start, end, reading) for place, row in rows],
            audio=None if audio is None else self._media(str(audio), "audio", origin, reading),
            start=start,
            end=end,
            cluster=str(first.get("video")),
            origin=origin,
        )

    def _asked(self, row: Row, origin: str, start: float, end: float | None, reading: AnnotationReader) -> Asked:
        where, options = reading.text(row, "id", origin), _options(row, origin, reading)
        answer = reading.letter(row, "answer", origin)
        if answer and answer not in LETTERS[: len(options.texts)]:
            reading.problems.append(
                f"{origin} answer: {answer} is none of {len(options.texts)} options; mend one of them"
            )
        at = _seconds(row, "at", origin, reading)
        if at is not None and (at <= start or (end is not None and at > end)):
            reading.problems.append(f"{origin} at: {at:g} lies outside the stream; it counts seconds of the file")
        categories = row.get("categories") or {}
        if not isinstance(categories, dict):
            reading.problems.append(f"{origin} categories: expected an object of labels; write {{axis: label}}")
            categories = {}
        question = reading.text(row, "question", origin)
        return Asked(
            item=Item(id=where, question=question, options=options.texts, categories=labels_of(categories, categories)),
            prompt="\n".join([question, *options.lines, self.instruction]),
            answer=answer,
            at=at,
        )

    def _media(self, path: str, key: str, origin: str, reading: AnnotationReader) -> Path:
        inside = not os.path.isabs(path) and os.path.normpath(path).split(os.sep)[0] != os.pardir
        if not inside and not self.allow_absolute_paths:
            cure = f"use a path below {self.root}, or allow it (allow_absolute_paths: true)"
            reading.problems.append(f"{origin} {key}: {path} leaves the folder; {cure}")
        return Path(self.root) / path


def _check_keys(row: Row, origin: str, reading: AnnotationReader) -> None:
    for key in row:
        if key not in KEYS:
            near = get_close_matches(key, KEYS, n=1)
            cure = f"did you mean {near[0]}?" if near else "put it under categories"
            reading.problems.append(f"{origin} {key}: unknown key; {cure}")


def _options(row: Row, origin: str, reading: AnnotationReader) -> Options:
    """The texts with letters; those that bring their own are taken as they are."""
    texts = row.get("options")
    if not isinstance(texts, list) or not 2 <= len(texts) <= len(LETTERS) or not all(isinstance(t, str) for t in texts):
        reading.problems.append(f'{origin} options: expected a list of 2 to {len(LETTERS)} texts; write ["...", "..."]')
        return Options(lines=(), texts=())
    if str(texts[0]).startswith(("A.", "(A)", "A)", "A:")):
        return reading.options(texts, str(row.get("id")))
    lines = tuple(f"{sign}. {text}" for sign, text in zip(LETTERS, texts, strict=False))
    return Options(lines=lines, texts=tuple(texts))


def _seconds(row: Row, key: str, origin: str, reading: AnnotationReader) -> float | None:
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        reading.problems.append(f"{origin} {key}: expected seconds (0 or more) or null, got {value!r}; mend it")
        return None
    return float(value)
