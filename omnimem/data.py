"""Samples and the manifest that lists them: JSON lines, checked as a whole, every problem named with file and row.

A line: {"id", "video": path | null, "audio": path | null (the video's own track), "start", "end" (seconds, optional),
"messages": [{"role", "content", "at": seconds | null, "loss": true | false}], "meta": {...}}.
Times are seconds of the file; `at` asks at that time on a fork, null after the end. Each user message is a question
of its own, asked of the stream alone, and the assistant message after it is its answer.
"""

import json
import math
import os.path
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, final, get_args

from omnimem.errors import ProblemList, UserError

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)
KEYS = ("id", "video", "audio", "start", "end", "messages", "meta")
MESSAGE_KEYS = ("role", "content", "at", "loss")
LISTED = 20  # failures that an error message shows


@final
@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What is trained on, and how much of it may be unreadable."""

    train: str | None = None  # the manifest
    max_failures: float = 0.01  # share of samples that may fail before the run stops
    allow_absolute_paths: bool = False  # media outside the folder of the manifest
    cache: bool = False  # keep what the frozen encoders made of each file in .cache/encoded

    def __post_init__(self) -> None:
        _check_share("max_failures", self.max_failures)


@final
@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn; `at` is the time at which it is asked, None after the end; `loss` whether an answer is learned."""

    role: Role
    content: str
    at: float | None = None
    loss: bool = True


@final
@dataclass(frozen=True, kw_only=True)
class Item:
    """What a benchmark knows of a question beside its text."""

    id: str
    question: str = ""  # as it was written, without options and without the prompt around it
    options: tuple[str, ...] = ()  # of a multiple choice, without their letters; () where any word may be the answer
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # axis -> labels, several of a multi-label


@final
@dataclass(frozen=True, kw_only=True)
class Question:
    """A user message with its answer."""

    index: int  # among the questions of its sample
    text: str
    answer: str | None  # None: not known
    at: float | None
    kind: str  # from meta["kinds"]; "" where the manifest names none
    loss: bool
    item: Item


@final
@dataclass(frozen=True, kw_only=True)
class Sample:
    """A stream and what is asked about it."""

    id: str
    video: Path | None
    audio: Path | None  # None: the video's own track
    start: float = 0.0
    end: float | None = None  # None: the end of the file
    messages: tuple[Message, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)
    items: tuple[Item, ...] = ()  # one a question, in their order; () where a manifest names none
    cluster: str = ""  # what samples cut from one recording share: their answers are not independent; "": the id
    origin: str = field(default="", compare=False)  # file:line

    @property
    def system(self) -> str | None:
        """The system prompt, or None for the backbone's own."""
        return next((message.content for message in self.messages[:1] if message.role == "system"), None)

    @property
    def questions(self) -> tuple[Question, ...]:
        """Every user message with the assistant message that follows it."""
        kinds = self.meta.get("kinds", [])
        found: list[Question] = []
        for message in self.messages:
            if message.role == "user":
                number = len(found)
                kind = kinds[number] if number < len(kinds) else ""
                asked = Question(
                    index=number,
                    text=message.content,
                    answer=None,
                    at=message.at,
                    kind=kind,
                    loss=False,
                    item=self.items[number] if self.items else self._item(number, kind),
                )
                found.append(asked)
            elif message.role == "assistant":
                found[-1] = replace(found[-1], answer=message.content, loss=message.loss)
        return tuple(found)

    @property
    def times(self) -> tuple[float | None, ...]:
        """When each question is asked, in seconds of the stream; None: after its end."""
        return tuple(None if question.at is None else question.at - self.start for question in self.questions)

    @property
    def moments(self) -> tuple[float | None, ...]:
        """The distinct times at which something is asked, in order; None, after the end, is the last."""
        times = self.times
        during = sorted({time for time in times if time is not None})
        return (*during, None) if None in times else tuple(during)

    def asked(self, due: Sequence[float | None]) -> list[int]:
        """Numbers of the questions that are asked at these moments."""
        return [number for number, time in enumerate(self.times) if time in due]

    def _item(self, number: int, kind: str) -> Item:
        """Of a question of a manifest: named after the stream and its place, its kind the only category."""
        return Item(id=f"{self.id}#{number}", categories={"kind": (kind,)} if kind else {})


@final
class ManifestError(ProblemList):
    """Everything that is wrong with a manifest, one line a problem: `file:line key: what; how to repair`."""


def read_manifest(path: Path | str, *, allow_absolute: bool = False) -> list[Sample]:
    """The samples of a manifest, in order; media files are not opened, nor looked for.

    Paths stay below the manifest's folder unless `allow_absolute`; a symbolic link there is the user's own decision.
    Raises ManifestError with all problems.
    """
    path = Path(path)
    if not path.is_file():
        raise ManifestError(
            [
                f"{path}: no such file; make it with `python data_prep/synthesize.py --out {path.parent}` (recall), or "
                f"with `python data_prep/convert.py YOUR_FILES --out {path}` (your data)"
            ]
        )
    samples: list[Sample] = []
    problems: list[str] = []
    first_use: dict[str, int] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        origin = f"{path}:{number}"
        try:
            sample = read_line(line, folder=path.parent, origin=origin, allow_absolute=allow_absolute)
        except ManifestError as error:
            problems += error.problems
            continue
        if first_use.setdefault(sample.id, number) != number:
            problems.append(f"{origin} id: {sample.id!r} is used in line {first_use[sample.id]} already; rename one")
        samples.append(sample)
    if not samples and not problems:
        problems.append(f"{path}: holds no samples; make it again")
    if problems:
        raise ManifestError(problems)
    return samples


def read_line(line: bytes | str, *, folder: Path, origin: str, allow_absolute: bool = False) -> Sample:
    """The sample of one line, with media below `folder`; raises ManifestError with problems that begin by `origin`."""
    row = _Row(folder=folder, origin=origin, allow_absolute=allow_absolute)
    sample = row.sample(line)
    if sample is None:
        raise ManifestError(row.problems)
    return sample


@final
class _Row:
    """One line of a manifest on its way to a sample; collects what is wrong with it."""

    def __init__(self, *, folder: Path, origin: str, allow_absolute: bool) -> None:
        self.folder = folder
        self.origin = origin
        self.allow_absolute = allow_absolute
        self.problems: list[str] = []

    def problem(self, key: str, what: str) -> None:
        self.problems.append(f"{self.origin} {key}: {what}" if key else f"{self.origin}: {what}")

    def sample(self, line: bytes | str) -> Sample | None:
        """The sample, or None where anything is wrong."""
        data = self.parsed(line)
        if data is None:
            return None
        self.check_keys("", data, KEYS, "; put it under meta")
        values: dict[str, Any] = {
            "id": self.id(data),
            "video": self.media(data, "video"),
            "audio": self.media(data, "audio"),
            "start": self.seconds(data, "start") or 0.0,
            "end": self.seconds(data, "end"),
            "meta": self.meta(data),
        }
        if data.get("video") is None and data.get("audio") is None:
            self.problem("video", "neither video nor audio is given; name at least one file")
        if values["end"] is not None and values["end"] <= values["start"]:
            self.problem("end", f"{values['end']} is not after start = {values['start']}; swap or remove them")
        messages = self.messages(data, values["start"], values["end"])
        self.check_kinds(values["meta"], messages)
        return None if self.problems else Sample(**values, messages=messages, origin=self.origin)

    def parsed(self, line: bytes | str) -> dict[str, Any] | None:
        try:
            data = json.loads(line)
        except UnicodeDecodeError as error:
            self.problem("", f"is not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8")
        except json.JSONDecodeError as error:
            self.problem("", f"is not JSON ({error.msg} at column {error.colno}); write one object a line")
        else:
            if isinstance(data, dict):
                return data
            self.problem("", f"expected an object, got {_got(data)}; write one object a line")
        return None

    def check_keys(self, where: str, data: dict[str, Any], known: tuple[str, ...], otherwise: str) -> None:
        for key in data:
            if key not in known:
                near = get_close_matches(key, known, n=1)
                cure = f"; did you mean {near[0]}?" if near else otherwise
                self.problem(where + key, f"unknown key{cure}")

    def id(self, data: dict[str, Any]) -> str:
        value = data.get("id")
        if isinstance(value, str) and value:
            return value
        self.problem("id", f"expected a name, got {_got(value)}; give each sample its own")
        return ""

    def media(self, data: dict[str, Any], key: str) -> Path | None:
        """The file below the manifest's folder."""
        value = data.get(key)
        if value is None:
            return None
        if not isinstance(value, str) or not value:
            self.problem(key, f"expected a path or null, got {_got(value)}")
            return None
        inside = not os.path.isabs(value) and os.path.normpath(value).split(os.sep)[0] != os.pardir
        if not inside and not self.allow_absolute:
            cure = f"use a path below {self.folder}, or allow it (allow_absolute_paths: true)"
            self.problem(key, f"{value} leaves the folder of the manifest; {cure}")
        return self.folder / value

    def seconds(self, data: dict[str, Any], key: str, where: str = "") -> float | None:
        value = data.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            self.problem(where + key, f"expected seconds (0 or more) or null, got {_got(value)}")
            return None
        return float(value)

    def meta(self, data: dict[str, Any]) -> dict[str, Any]:
        value = data.get("meta")
        if value is None or isinstance(value, dict):
            return value or {}
        self.problem("meta", f"expected an object, got {_got(value)}")
        return {}

    def messages(self, data: dict[str, Any], start: float, end: float | None) -> tuple[Message, ...]:
        value = data.get("messages")
        if not isinstance(value, list) or not value:
            self.problem("messages", f"expected a list of messages, got {_got(value)}")
            return ()
        found = [self.message(f"messages[{index}]", item, start, end) for index, item in enumerate(value)]
        messages = tuple(message for message in found if message)
        if len(messages) == len(found):
            self.check_turns(messages)
        return messages

    def message(self, where: str, data: Any, start: float, end: float | None) -> Message | None:
        if not isinstance(data, dict):
            self.problem(where, f"expected an object, got {_got(data)}")
            return None
        before = len(self.problems)
        where += "."
        self.check_keys(where, data, MESSAGE_KEYS, "; remove it")
        role, content, loss = data.get("role"), data.get("content"), data.get("loss")
        if role not in ROLES:
            self.problem(where + "role", f"expected {', '.join(ROLES)}, got {_got(role)}")
        if not isinstance(content, str) or not content.strip():
            self.problem(where + "content", f"expected text, got {_got(content)}")
        if loss is not None and not isinstance(loss, bool):
            self.problem(where + "loss", f"expected true or false, got {_got(loss)}")
        at = self.seconds(data, "at", where)
        if at is not None:
            if role != "user":
                self.problem(where + "at", "only a user message is asked at a time; move it there")
            if at <= start or (end is not None and at > end):
                span = f"({start}, {'end' if end is None else end}]"
                self.problem(where + "at", f"{at} lies outside the stream {span}; it counts seconds of the file")
        if len(self.problems) > before:
            return None
        return Message(role=role, content=content, at=at, loss=loss is not False)  # pyright: ignore[reportArgumentType]

    def check_turns(self, messages: tuple[Message, ...]) -> None:
        """A system message may stand first; an assistant message follows a user message; something is asked."""
        for index, message in enumerate(messages):
            if message.role == "system" and index > 0:
                self.problem(f"messages[{index}].role", "a system message must be the first one; move or remove it")
            if message.role == "assistant" and (index == 0 or messages[index - 1].role != "user"):
                self.problem(f"messages[{index}].role", "this answer follows no question; put a user message before it")
        if all(message.role != "user" for message in messages):
            self.problem("messages", "nothing is asked; add a user message")

    def check_kinds(self, meta: dict[str, Any], messages: tuple[Message, ...]) -> None:
        kinds = meta.get("kinds")
        if kinds is None or not messages:
            return
        asked = sum(message.role == "user" for message in messages)
        if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds) or len(kinds) != asked:
            self.problem("meta.kinds", f"expected one word a question ({asked}), got {_got(kinds)}")


def _got(value: Any) -> str:
    """A value as it stood in the file, cut to a readable length."""
    if value is None:
        return "nothing"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} = {value} is no share; give a number from 0 (none) to 1 (all)")


# ---------------------------------------------------------------------------------------------------- absent, not wrong


@final
@dataclass(frozen=True, kw_only=True)
class Failure:
    """A sample that could not be used."""

    id: str
    reason: str  # one word, as of MediaError
    message: str = ""


@final
class TooManyFailures(UserError):
    """More samples failed than the policy lets pass."""


@final
@dataclass(frozen=True, kw_only=True)
class Failures:
    """The samples of a data set that failed so far, each once; a failed sample is absent, never a wrong answer."""

    samples: int  # in the data set
    max_failures: float  # share of them
    found: tuple[Failure, ...] = ()

    def __post_init__(self) -> None:
        _check_share("max_failures", self.max_failures)

    def add(self, failure: Failure) -> "Failures":
        """With one more; raises TooManyFailures when their share is above `max_failures`."""
        if any(known.id == failure.id for known in self.found):
            return self
        grown = replace(self, found=(*self.found, failure))
        if len(grown.found) > self.max_failures * self.samples:
            raise TooManyFailures(grown._verdict())
        return grown

    @property
    def reasons(self) -> dict[str, int]:
        """How often each reason occurred, the commonest first."""
        return dict(Counter(failure.reason for failure in self.found).most_common())

    def _verdict(self) -> str:
        lines = [f"{failure.id}: {failure.reason}; {failure.message}" for failure in self.found[-LISTED:]]
        share = f"{len(self.found)} of {self.samples} samples failed, more than max_failures = {self.max_failures:g}"
        cure = "repair or remove them (data_prep/check.py lists all), or raise data.max_failures"
        return "\n".join([*lines, f"{share}; {cure}"])
