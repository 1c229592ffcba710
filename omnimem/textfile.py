"""Text files, every fault with file and line: those that users bring, and JSON that a command has stored."""

import json
import math
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, final

from pydantic import TypeAdapter, ValidationError

from omnimem.absent import as_url, why_absent
from omnimem.errors import ProblemList, UserError, counted
from omnimem.limits import read_within

DEPTH = 64  # objects and lists within each other
ROW_KEYS = frozenset(  # any of which makes an object a row of this project or another tool, or a prediction
    {
        *("id", "video", "videos", "audio", "audios", "frames", "messages", "conversations", "query", "prompt", "key"),
        *("instruction", "question", "uid", "doc", "doc_id", "resps", "input", "text"),
    }
)
DIGITS = 300  # of a number; more do not fit into a float


@final
class ManifestError(ProblemList):
    """All problems of a file of samples, one per line: `file:line key: problem; fix`."""


@final
class StoredFileError(UserError):
    """A file that a command has stored is damaged; the message names it, what is wrong and the cure."""


def read_text(path: Path, cure: str = "give a readable file") -> str:
    """The text of a file, without a byte order mark; raises ManifestError with every line that is not UTF-8."""
    # 1. read and decode
    try:
        data = read_within(path, pipe=True)
    except (OSError, ValueError) as error:
        raise ManifestError([f"{path}: cannot be read ({getattr(error, 'strerror', error)}); {cure}"]) from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in data[:4]:
        raise ManifestError([f"{path}:1: is not UTF-8 (it looks like UTF-16 or UTF-32); save the file as UTF-8"])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    # 2. name the lines
    problems = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            what = f"is not UTF-8 ({error.reason} at byte {error.start})"
            problems.append(f"{path}:{number}: {what}; save the file as UTF-8")
    raise ManifestError(problems)


def parse_json(text: str, origin: str, cure: str = "write one object per line") -> Any:
    """The value exactly as written; raises ManifestError for what no value can hold, or what would be dropped."""
    try:
        value = json.loads(text, parse_int=_whole, parse_float=_real, object_pairs_hook=_object)
        _check(value, DEPTH)
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise ManifestError([f"{origin}: is not JSON ({error.msg} at {where}); {cure}"]) from error
    except RecursionError as error:
        raise ManifestError([f"{origin}: lists or objects are more than {DEPTH} deep; flatten them"]) from error
    except ValueError as error:
        raise ManifestError([f"{origin}: {error}"]) from error
    return value


def text_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Each line that is not blank with its `file:line`; raises ManifestError."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):  # JSON strings may contain other line ends
        if line.strip():
            yield f"{path}:{number}", line


def parse_object(line: str, origin: str) -> dict[str, Any]:
    """The object of a line; raises ManifestError."""
    value = parse_json(line, origin)
    if isinstance(value, dict):
        return value
    raise ManifestError([f"{origin}: expected an object, got {got(value)}; write one object per line"])


def form_problem(path: Path, text: str, cure: str) -> str | None:
    """What a file of JSON holds in place of one object per line, and how to repair it; None: nothing that is known.

    Known are an object around the rows (under one key, or each under a key of its own), objects over several lines, and
    objects with commas between them.
    """
    # 1. the values one after the other, with commas between them or without
    values: list[Any] = []
    body, at, commas = text.strip(), 0, False
    try:
        while at < len(body):
            value, at = json.JSONDecoder().raw_decode(body, at)
            values.append(value)
            space = re.compile(r"\s*(,?)\s*").match(body, at)
            commas, at = commas or bool(space and space[1]), space.end() if space else at
    except (ValueError, RecursionError):
        return None
    if not values or not all(isinstance(value, dict) for value in values):
        return None
    # 2. their form
    if len(values) == 1 and (found := _wrapped(values[0])):
        return f"{path}: is one object that holds {found}; {cure}"
    if commas:
        return f"{path}: has commas between {counted(len(values), 'object')} that no [ ] encloses; {cure}"
    if len(values) < sum(bool(line.strip()) for line in body.split("\n")):
        return f"{path}: holds {counted(len(values), 'object')} over several lines; {cure}"
    return None


def _wrapped(value: dict[str, Any]) -> str | None:
    """Where an object, which is no row itself, holds rows: under a key, or each under a key; None: nowhere."""
    if not value or ROW_KEYS & value.keys():
        return None
    for key, inner in value.items():
        if isinstance(inner, list) and inner and all(isinstance(row, dict) for row in inner):
            return f"the list of {counted(len(inner), 'row')} under the key {key!a}"
    if all(isinstance(row, dict) and ROW_KEYS & row.keys() for row in value.values()):
        return f"{counted(len(value), 'row')}, each under a key ({next(iter(value))!a})"
    return None


def read_objects(path: Path, cure: str = "write one row per line") -> list[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, each with `file:line`; raises ManifestError with every wrong line.

    A file of another form is one problem, with `cure` (`form_problem`).
    """
    rows, problems = [], []
    for origin, line in text_lines(path):
        try:
            rows.append((origin, parse_object(line, origin)))
        except ManifestError as error:
            problems += error.problems
    if (problems or len(rows) == 1) and (form := form_problem(path, read_text(path), cure)):
        raise ManifestError([form])
    if problems:
        raise ManifestError(problems)
    return rows


def read_stored(path: Path, shape: Any, cure: str) -> Any:
    """The value of a JSON file that a command has stored; `shape` is the type of it (a TypedDict, list[...] ...).

    Keys that the shape does not name are kept. Raises StoredFileError when the file is missing, damaged or of another
    shape.
    """
    try:
        data = read_within(path)
    except OSError as error:
        raise StoredFileError(f"{path}: cannot be read ({error.strerror}); {cure}") from error
    return parse_stored(data, shape, str(path), cure)


def parse_stored(data: bytes, shape: Any, place: str, cure: str) -> Any:
    """The value of stored JSON, or of a line of it at `place`; raises StoredFileError."""
    if not data.strip(b"\0 \t\r\n"):
        raise StoredFileError(f"{place}: {'holds zero bytes' if data.strip() else 'is empty'}; {cure}")
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "lists or objects too deep"
        raise StoredFileError(f"{place}: not JSON ({reason}); {cure}") from error
    return of_shape(value, shape, place, cure)


def of_shape(value: Any, shape: Any, place: str, cure: str) -> Any:
    """The value if it has a shape (see `read_stored`); raises StoredFileError with the first key that has not."""
    try:
        _shape(shape).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key, what = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Input should be ")
        wrong = "missing" if first["type"] == "missing" else f"expected {what}, got {got(first['input'])}"
        raise StoredFileError(f"{f'{place} {key}'.rstrip()}: {wrong}; {cure}") from error
    return value


@cache
def _shape(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


def path_problem(path: str) -> str | None:
    """Why no file can have this path; None if one can."""
    if "\x00" in path:
        return "holds a zero character; correct the path"
    if as_url(path):
        return f"{path} {why_absent(path, '')}"
    if len(os.fsencode(path)) > 4095 or any(len(os.fsencode(name)) > 255 for name in path.split("/")):
        return f"{path[:40]}... is longer than a file name can be (255 bytes); shorten it"
    return None


def got(value: Any) -> str:
    """A value as JSON for an error message, cut to a readable length."""
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"the number {digits[:20]}... has {counted(len(digits), 'digit')}; write at most {DIGITS}")
    return int(digits)


def _real(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits[:20]} is too large; write a smaller one")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!a} is given twice in an object; keep one of them")
    return made


def _check(value: Any, depth: int) -> None:
    """Raises RecursionError for values that are too deep, and ValueError for halves of characters."""
    if isinstance(value, str):
        whole_characters(value)
    elif isinstance(value, dict | list):
        if depth == 0:
            raise RecursionError
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            _check(part, depth - 1)


def whole_characters(text: str) -> str:
    """The text; raises UserError if half of a character (a lone surrogate) is in it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise UserError(f"{half} in {text[:40]!a} is half of a character; write the whole character") from error
    return text
