"""Samples and manifests: JSON lines, checked as a whole; every problem is reported with file and line.

A line: {"id", "video": path | null, "audio": path | null (the video's own track), "start", "end" (seconds, optional),
"frames": [path, ...] and "fps" in place of "video",
"tracks": "video" | "audio" | null (both), "prefix": text before the stream | null,
"messages": [{"role", "content", "at": seconds | null, "loss": bool}],
"meta": {...}}; without video and audio it is text alone. docs/data.md describes it with examples.
Times are seconds of the file. A question is asked at time `at` on a fork of the stream, or after the end if it is null.
Each user message is an independent question about the stream; the assistant message after it is its answer.
"""

import math
import os.path
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, final, get_args

from omnimem.absent import as_url, why_absent
from omnimem.errors import UserError, counted
from omnimem.limits import exceeds
from omnimem.media import FrameList, Video, files_of
from omnimem.textfile import ManifestError, form_problem, got, parse_object, path_problem, read_text, text_lines

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)
KEYS = ("id", "video", "frames", "fps", "audio", "tracks", "start", "end", "prefix", "messages", "meta")
CONVERT = "omnimem convert makes a manifest of such rows"
OTHERS = ("conversations", "videos", "audios", "query", "prompt", "instruction")  # keys of other formats
STILL = "still images are not streamed; make them a video, or remove them"
FOREIGN: dict[str, str] = {
    **dict.fromkeys(OTHERS, f"is of another format; {CONVERT}"),
    **dict.fromkeys(("image", "images"), STILL),
}
MESSAGE_KEYS = ("role", "content", "at", "loss")
MOST_PASSES = 1000  # over a source in an epoch
LISTED = 20  # failures shown in an error message


@final
@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One of several sources of training rows (docs/data.md)."""

    path: str  # a manifest, a .json or .jsonl file of rows, a folder or hub id of `datasets`
    weight: float = 1.0  # passes over its rows per epoch: 2 is each row twice, 0.5 every other row, in turns
    name: str | None = None  # precedes the ids of its samples: name/id; null: the name of the file, folder or data set
    format: Literal["manifest", "rows"] | None = None  # null: .jsonl is a manifest, everything else rows
    media: str | None = None  # folder of relative paths; null: that of the file
    split: str = "train"  # of a data set
    subset: str | None = None  # configuration of a data set
    streaming: bool = False  # read a data set row by row, without a copy on disk
    rows: int | None = None  # of a data set or file: the first ones only

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and 0 < self.weight <= MOST_PASSES):
            raise ValueError(f"weight must be above 0 and at most {MOST_PASSES}, got {self.weight}")
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"rows must be 1 or more, got {self.rows}")
        if self.name is not None and (not self.name or "/" in self.name):
            raise ValueError(f"name must be a word without /, got {self.name!r}")
        for name, given in (("split", self.split != "train"), ("subset", self.subset), ("streaming", self.streaming)):
            if given and not self.is_data_set:
                raise ValueError(f"{name} is of a data set, and {self.path} is a file of rows; remove it")
        if self.media is not None and self.is_manifest:
            raise ValueError(
                f"media has no effect on a manifest, whose paths are relative to the folder of {self.path}; remove it, "
                "or set format: rows"
            )

    @property
    def is_data_set(self) -> bool:
        """Whether it is read by `datasets`, and not line by line."""
        return Path(self.path).suffix not in (".json", ".jsonl")

    @property
    def is_manifest(self) -> bool:
        """Whether its lines are those of a manifest."""
        return (self.format or ("manifest" if Path(self.path).suffix == ".jsonl" else "rows")) == "manifest"

    @property
    def base(self) -> Path:
        """The folder of relative paths."""
        path = Path(self.path)
        if self.media or self.is_manifest:
            return Path(self.media) if self.media else path.parent
        return path if path.is_dir() else path.parent if path.is_file() else Path()

    @property
    def label(self) -> str:
        """The name, or that of the file, folder or data set."""
        return self.name or Path(self.path).name.removesuffix(".jsonl").removesuffix(".json")


@final
@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """The outputs of the frozen encoders on disk, shared by epochs, arms, runs and processes (docs/data.md)."""

    folder: str = ".cache/encoded"  # may be shared; one that is read only serves what it holds
    size_gb: float | None = 100.0  # 10^9 bytes of all entries; the least recently used are removed; null: no limit

    def __post_init__(self) -> None:
        if not self.folder:
            raise ValueError("folder: is empty; name a folder")
        if self.size_gb is not None and not (math.isfinite(self.size_gb) and self.size_gb > 0):
            raise ValueError(f"size_gb must be above 0, or null for no limit, got {self.size_gb:g}")


@final
@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Training data, and how much of it may be unreadable."""

    train: str | tuple[DataSource | str, ...] | None = None  # a manifest, or a list of sources (docs/data.md)
    # read every train.eval_steps and not trained on: a manifest, or a share of the recordings (0.1)
    validation: str | float | None = None
    max_failures: float = 0.01  # fraction of samples that may fail before the run stops
    allow_absolute_paths: bool = False  # accept media outside the folder of the manifest
    # keep the outputs of the frozen encoders on disk, so that later epochs, arms and runs neither decode nor encode;
    # true: with the defaults of the section
    cache: CacheOptions | bool = False

    def __post_init__(self) -> None:
        _check_fraction("max_failures", self.max_failures)
        if isinstance(self.validation, float) and not 0 < self.validation < 1:
            raise ValueError(f"validation = {self.validation:g} is no share between 0 and 1; give one, or a manifest")
        if self.train == ():
            raise ValueError("train: the list of sources is empty; name one")
        labels = Counter(source.label for source in self.sources)
        for label in [label for label, count in labels.items() if count > 1]:
            raise ValueError(f"train: two sources are called {label!r}; give each a `name` of its own")

    @property
    def cached(self) -> CacheOptions | None:
        """The section `cache`; None: off."""
        return CacheOptions() if self.cache is True else self.cache or None

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """The sources of `train`."""
        given = () if self.train is None else (self.train,) if isinstance(self.train, str) else self.train
        return tuple(DataSource(path=each) if isinstance(each, str) else each for each in given)

    @property
    def weights(self) -> dict[str, float]:
        """Passes per epoch by `Sample.source`."""
        return {"": sources[0].weight} if len(sources := self.sources) == 1 else {s.label: s.weight for s in sources}


@final
@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn; `at` is the time of a question (None: after the end), `loss` whether an answer is trained on."""

    role: Role
    content: str
    at: float | None = None
    loss: bool = True


@final
@dataclass(frozen=True, kw_only=True)
class Item:
    """A benchmark's facts about a question."""

    id: str
    question: str = ""  # the original text, without options and prompt
    options: tuple[str, ...] = ()  # of a multiple choice, without letters; () for a free answer
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # axis -> one or more labels


@final
@dataclass(frozen=True, kw_only=True)
class Question:
    """A user message with its answer."""

    index: int  # within the sample
    text: str
    answer: str | None  # None: unknown
    at: float | None
    kind: str  # from meta["kinds"]; "" if it is not given
    loss: bool
    item: Item


@final
@dataclass(frozen=True, kw_only=True)
class Sample:
    """A stream and the questions about it."""

    id: str
    video: Video | None
    audio: Path | None  # None: the video's own track
    start: float = 0.0
    end: float | None = None  # None: the end of the file
    tracks: Literal["video", "audio"] | None = None  # the one track that is read; None: both
    prefix: str = ""  # text of the user's turn before the stream
    messages: tuple[Message, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)
    items: tuple[Item, ...] = ()  # one per question, in order; () in a manifest
    published: bool = False  # of a published benchmark: its times are scored as they are, and counted as defects
    cluster: str = ""  # id of the recording: answers about one recording are not independent; "": the sample's id
    source: str = ""  # of several sources of a run, the name of its own
    origin: str = field(default="", compare=False)  # file:line
    remarks: tuple[str, ...] = field(default=(), compare=False)  # how its row was read, where that may surprise

    @property
    def files(self) -> tuple[Path, ...]:
        """All media files."""
        return files_of((self.video, self.audio))

    @property
    def shown(self) -> Path:
        """What messages call the stream: its file, the first of several."""
        return Path(str(self.video or self.audio or self.id))

    @property
    def has_stream(self) -> bool:
        """Whether there is a file to read; False: the row is text alone."""
        return self.video is not None or self.audio is not None

    @property
    def system(self) -> str | None:
        """The system prompt, or None for the backbone's default."""
        return next((message.content for message in self.messages[:1] if message.role == "system"), None)

    @property
    def questions(self) -> tuple[Question, ...]:
        """Every user message with the assistant message that follows it."""
        # 1. kinds are listed by question
        kinds = self.meta.get("kinds", [])
        # 2. a question per user message, with the answer after it
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
    def is_learned(self) -> bool:
        """Whether any question has an answer to train on."""
        return any(question.loss and question.answer is not None for question in self.questions)

    @property
    def times(self) -> tuple[float | None, ...]:
        """Time of each question in seconds of the stream; None: after its end."""
        asked = (message.at for message in self.messages if message.role == "user")
        return tuple(None if at is None else at - self.start for at in asked)

    @property
    def moments(self) -> tuple[float | None, ...]:
        """The distinct times of the questions, in order; None (after the end) is the last."""
        times = self.times
        during = sorted({time for time in times if time is not None})
        return (*during, None) if None in times else tuple(during)

    def asked(self, due: Sequence[float | None]) -> list[int]:
        """Indices of the questions that are asked at these times."""
        return [number for number, time in enumerate(self.times) if time in due]

    def _item(self, number: int, kind: str) -> Item:
        """The item of a manifest's question: id from the sample and the index, its kind the only category."""
        return Item(id=f"{self.id}#{number}", categories={"kind": (kind,)} if kind else {})


def read_manifest(path: Path | str, *, allow_absolute: bool = False, text_only: bool = False) -> list[Sample]:
    """The samples of a manifest, in order; does not check that the media files exist.

    Paths must be inside the manifest's folder unless `allow_absolute`; symbolic links are followed. With `text_only`
    some lines may have neither video nor audio. Raises ManifestError with all problems.
    """
    # 1. open the file
    path = Path(path)
    if os.path.isdir(path):
        out = f"{path}.jsonl" if path.name.strip(".") else "train.jsonl"
        cure = f"make one of its rows: `omnimem convert {path} --out {out}`"
        raise ManifestError([f"{path}: is a folder, and a manifest is a file; {cure}"])
    if not os.path.isfile(path):
        create = f"create it with `omnimem synthesize --out {path.parent}` (recall), "
        create += f"or with `omnimem convert YOUR_FILES --out {path}` (your data)"
        raise ManifestError([f"{as_url(path) or path}: no such file; {why_absent(path, create)}"])
    if _is_list(path):
        out = path.with_suffix(".jsonl") if path.suffix != ".jsonl" else path.with_name(f"{path.stem}-manifest.jsonl")
        cure = f"convert it: `omnimem convert {path} --out {out}`"
        raise ManifestError([f"{path}: is a list of rows, and a manifest has one object per line; {cure}"])
    # 2. read the lines, collecting all problems
    samples: list[Sample] = []
    problems: list[str] = []
    first_use: dict[str, str] = {}
    for origin, line in text_lines(path):
        try:
            row = parse_object(line, origin)
            how: Any = {"allow_absolute": allow_absolute, "text_only": text_only}
            sample = read_row(row, folder=path.parent, origin=origin, **how)
        except ManifestError as error:
            problems += error.problems
            continue
        if first_use.setdefault(sample.id, origin) != origin:
            before = first_use[sample.id].rpartition(":")[2]
            problems.append(f"{origin} id: {sample.id!r} is already used in line {before}; rename one")
        samples.append(sample)
    # 3. report them together
    if not samples and not problems:
        problems.append(f"{path}: holds no samples; create it again")
    if problems:
        cure = "write one row per line, or the rows as a list in [ ], of which `omnimem convert` makes a manifest"
        form = form_problem(path, read_text(path), cure)
        raise ManifestError([form] if form else problems)
    return samples


def _is_list(path: Path) -> bool:
    """Whether a file begins as a JSON list of objects."""
    with path.open("rb") as file:
        return re.match(rb"(?:\xef\xbb\xbf)?\s*\[\s*\{", file.read(1024)) is not None


def read_row(
    data: dict[str, Any], *, folder: Path, origin: str, allow_absolute: bool = False, text_only: bool = False
) -> Sample:
    """The sample of one line, with media below `folder`; raises ManifestError with all problems of the line."""
    row = _Row(folder=folder, origin=origin, allow_absolute=allow_absolute, text_only=text_only)
    sample = row.sample(data)
    if sample is None:
        raise ManifestError(row.problems)
    return sample


@final
class _Row:
    """Parses one line of a manifest and collects its problems."""

    def __init__(self, *, folder: Path, origin: str, allow_absolute: bool, text_only: bool) -> None:
        self.folder = folder
        self.text_only = text_only
        self.origin = origin
        self.allow_absolute = allow_absolute
        self.problems: list[str] = []

    def problem(self, key: str, what: str) -> None:
        self.problems.append(f"{self.origin} {key}: {what}" if key else f"{self.origin}: {what}")

    def sample(self, data: dict[str, Any]) -> Sample | None:
        """The sample, or None when there are problems."""
        # 1. parse the values; of a row of another format nothing else is to be repaired
        self.check_keys("", data, KEYS, "put it under meta")
        if any(key in data for key in OTHERS):
            return None
        values: dict[str, Any] = {
            "id": self.id(data),
            "video": self.frames(data) if data.get("frames") is not None else self.media(data, "video"),
            "audio": self.media(data, "audio"),
            "start": self.seconds(data, "start") or 0.0,
            "end": self.seconds(data, "end"),
            "tracks": self.track(data),
            "prefix": self.prefix(data),
            "meta": self.meta(data),
        }
        # 2. check them together
        if not any(data.get(key) is not None for key in ("video", "frames", "audio")):
            self.check_text(data)
        elif data.get("frames") is None and data.get("fps") is not None:
            self.problem("fps", "is the rate of `frames`; remove it, and set stream.fps for how many frames are read")
        if values["end"] is not None and values["end"] <= values["start"]:
            self.problem("end", f"{values['end']} is not after start = {values['start']}; swap or remove them")
        messages = self.messages(data, values["start"], values["end"])
        self.check_kinds(values["meta"], messages)
        return None if self.problems else Sample(**values, messages=messages, origin=self.origin)

    def check_keys(self, where: str, data: dict[str, Any], known: tuple[str, ...], otherwise: str) -> None:
        for key in data:
            if key not in known:
                foreign = FOREIGN.get(key) if not where else None
                self.problem(where + key, foreign or unknown_key(key, known, otherwise))

    def id(self, data: dict[str, Any]) -> str:
        value = data.get("id")
        if isinstance(value, str) and value:
            return value
        self.problem("id", f"expected a name, got {got(value)}; give each sample a unique id")
        return ""

    def media(self, data: dict[str, Any], key: str) -> Path | None:
        """The path of a media file, which must be inside the manifest's folder."""
        value = data.get(key)
        return None if value is None else self.path(key, value)

    def frames(self, data: dict[str, Any]) -> FrameList | None:
        """The frames of a video as image files, with their rate."""
        # 1. the rate
        rate, given = data.get("fps"), data["frames"]
        if data.get("video") is not None:
            self.problem("frames", "are given beside video; keep one of them")
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not (math.isfinite(rate) and rate > 0):
            self.problem("fps", f"expected the frames per second of `frames`, above 0, got {got(rate)}")
            rate = 1.0
        # 2. the files
        if not isinstance(given, list) or not given:
            self.problem("frames", f"expected a list of image files, got {got(given)}")
            return None
        paths = [self.path(f"frames[{number}]", each) for number, each in enumerate(given)]
        return FrameList(tuple(path for path in paths if path is not None) or (Path(),), float(rate))

    def path(self, key: str, value: Any) -> Path | None:
        """A path below the manifest's folder."""
        if not isinstance(value, str) or not value:
            self.problem(key, f"expected a path{'' if '[' in key else ' or null'}, got {got(value)}")
            return None
        if problem := path_problem(value):
            self.problem(key, problem)
        if not self.allow_absolute and not is_inside(value):
            cure = f"use a path below {self.folder}, or set data.allow_absolute_paths: true"
            self.problem(key, f"{value} is outside the folder of the manifest; {cure}")
        return self.folder / value

    def check_text(self, data: dict[str, Any]) -> None:
        """A row without a file: text alone, which has no times and tracks."""
        if not self.text_only:
            self.problem("video", "neither video nor audio is given; name at least one file")
        for key in [key for key in ("start", "end", "tracks", "prefix", "fps") if data.get(key) is not None]:
            self.problem(key, "is about a file, and neither video nor audio is given; remove it, or name a file")
        messages = data.get("messages")
        for index, message in enumerate(messages if isinstance(messages, list) else ()):
            if isinstance(message, dict) and message.get("at") is not None:
                self.problem(f"messages[{index}].at", "is a time of a file, and none is given; remove it, or name one")

    def track(self, data: dict[str, Any]) -> Any:
        """The one track that is read; null: both."""
        value = data.get("tracks")
        if value not in (None, "video", "audio"):
            self.problem("tracks", f"expected video, audio or null (both), got {got(value)}")
        elif value == "video" and not (data.get("video") or data.get("frames")) and data.get("audio") is not None:
            self.problem("tracks", "is video, and only audio is given; name a video, or remove it")
        return value

    def prefix(self, data: dict[str, Any]) -> str:
        """The text before the stream; null: none."""
        value = data.get("prefix")
        if value is not None and not isinstance(value, str):
            self.problem("prefix", f"expected text or null, got {got(value)}")
        elif value is not None and (what := exceeds("text_characters", len(value))):
            self.problem("prefix", f"its length of {what}")
        return value if isinstance(value, str) else ""

    def seconds(self, data: dict[str, Any], key: str, where: str = "") -> float | None:
        value = data.get(key)
        if value is None or is_seconds(value):
            return None if value is None else float(value)
        self.problem(where + key, f"expected seconds (0 or more) or null, got {got(value)}")
        return None

    def meta(self, data: dict[str, Any]) -> dict[str, Any]:
        value = data.get("meta")
        if value is not None and not isinstance(value, dict):
            self.problem("meta", f"expected an object, got {got(value)}")
            return {}
        return {key: part for key, part in (value or {}).items() if part is not None}  # null is as good as none

    def messages(self, data: dict[str, Any], start: float, end: float | None) -> tuple[Message, ...]:
        value = data.get("messages")
        if not isinstance(value, list) or not value:
            self.problem("messages", f"expected a list of messages, got {got(value)}")
            return ()
        found = [self.message(f"messages[{index}]", item, start, end) for index, item in enumerate(value)]
        messages = tuple(message for message in found if message)
        if len(messages) == len(found):
            self.check_turns(messages)
        return messages

    def message(self, where: str, data: Any, start: float, end: float | None) -> Message | None:
        if not isinstance(data, dict):
            self.problem(where, f"expected an object, got {got(data)}")
            return None
        # 1. check role, content and loss
        before = len(self.problems)
        where += "."
        self.check_keys(where, data, MESSAGE_KEYS, "remove it")
        role, content, loss = data.get("role"), data.get("content"), data.get("loss")
        if role not in ROLES:
            self.problem(where + "role", f"expected {', '.join(ROLES)}, got {got(role)}")
        if isinstance(content, list):
            self.problem(where + "content", f"expected text, got content parts; {CONVERT}")
        elif not isinstance(content, str) or not content.strip():
            self.problem(where + "content", f"expected text, got {got(content)}")
        elif what := exceeds("text_characters", len(content)):
            self.problem(where + "content", f"its length of {what}")
        if loss is not None and not isinstance(loss, bool):
            self.problem(where + "loss", f"expected true or false, got {got(loss)}")
        elif loss and role != "assistant":
            self.problem(where + "loss", "only an answer is learned; remove it, or make it false")
        # 2. check the time
        at = self.seconds(data, "at", where)
        if at is not None:
            if role != "user":
                self.problem(where + "at", "only a user message has a time; move it there")
            if at <= start or (end is not None and at > end):
                span = f"({start}, {'end' if end is None else end}]"
                self.problem(where + "at", f"{at} is outside the stream {span}; give seconds of the file")
        if len(self.problems) > before:
            return None
        return Message(role=role, content=content, at=at, loss=loss is not False)  # pyright: ignore[reportArgumentType]

    def check_turns(self, messages: tuple[Message, ...]) -> None:
        """Check that a system message is first, an assistant message follows a user message, and a question exists."""
        for index, message in enumerate(messages):
            if message.role == "system" and index > 0:
                self.problem(f"messages[{index}].role", "a system message must be the first one; move or remove it")
            if message.role == "assistant" and (index == 0 or messages[index - 1].role != "user"):
                self.problem(f"messages[{index}].role", "an answer without a question; put a user message before it")
        if all(message.role != "user" for message in messages):
            self.problem("messages", "there is no question; add a user message")

    def check_kinds(self, meta: dict[str, Any], messages: tuple[Message, ...]) -> None:
        kinds = meta.get("kinds")
        if kinds is None or not messages:
            return
        asked = sum(message.role == "user" for message in messages)
        if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds) or len(kinds) != asked:
            self.problem("meta.kinds", f"expected one word per question ({asked}), got {got(kinds)}")


def is_inside(path: str) -> bool:
    """Whether a path below a folder stays inside of it."""
    return not os.path.isabs(path) and os.path.normpath(path).split(os.sep)[0] != os.pardir


def is_seconds(value: Any) -> bool:
    """Whether a value of a JSON file is a time: a finite number, 0 or more."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def unknown_key(key: str, known: Sequence[str], otherwise: str) -> str:
    """The problem of an unknown key: the nearest known one, or what to do with it."""
    near = get_close_matches(key, known, n=1)
    return f"unknown key; {f'did you mean {near[0]}?' if near else otherwise}"


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value}")


# ------------------------------------------------------------------------------------------------------ failed samples


@final
@dataclass(frozen=True, kw_only=True)
class Failure:
    """A sample that could not be used."""

    id: str
    reason: str  # one word, as in MediaError
    message: str = ""


@final
class TooManyFailures(UserError):
    """More samples failed than `max_failures` allows."""


@final
@dataclass(frozen=True, kw_only=True)
class Failures:
    """The samples of a data set that failed so far, each once; a failed sample is left out, not counted as wrong."""

    samples: int  # in the data set
    max_failures: float  # as a fraction of `samples`
    setting: str = "data.max_failures"  # that it comes from, for the message
    found: tuple[Failure, ...] = ()

    def __post_init__(self) -> None:
        _check_fraction("max_failures", self.max_failures)

    def add(self, *failures: Failure) -> "Failures":
        """A copy with more failures; raises TooManyFailures as soon as their fraction exceeds `max_failures`."""
        grown = self
        for failure in failures:
            if all(known.id != failure.id for known in grown.found):
                grown = replace(grown, found=(*grown.found, failure))
                if len(grown.found) > self.max_failures * self.samples:
                    raise TooManyFailures(grown._verdict())
        return grown

    @property
    def reasons(self) -> dict[str, int]:
        """Count of each reason, the most common first."""
        return dict(Counter(failure.reason for failure in self.found).most_common())

    def _verdict(self) -> str:
        lines = [f"{failure.id}: {failure.reason}; {failure.message}" for failure in self.found[-LISTED:]]
        share = f"{len(self.found)} of {counted(self.samples, 'sample')} failed"
        cure = f"fix or remove them (omnimem check lists all), or raise {self.setting}"
        return "\n".join([*lines, f"{share}, more than max_failures = {self.max_failures:g}; {cure}"])
