"""Sources of settings: YAML, read with line numbers, and `key=value` overrides."""

import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import yaml
from yaml.nodes import MappingNode, Node, SequenceNode

from omnimem.errors import ProblemList, counted
from omnimem.limits import exceeds, read_within

Key = tuple[str | int, ...]  # ("evaluate", "benchmarks", 0, "name"); a number is an index into a list
Problem = tuple[Key, str]  # a key, and its message with the cure

COMMAND_LINE = "command line"


class ConfigError(ProblemList):
    """The user's settings are wrong; one line per problem: `file:line key: what; how to repair`."""


@final
@dataclass(frozen=True, kw_only=True)
class Source:
    """Settings as plain values, and the file and line of each of them."""

    file: str
    data: dict[str, Any]
    places: dict[Key, str] = field(default_factory=dict)

    def place(self, key: Key) -> str:
        """`file:line`, or `command line`, of a key, of one inside it, or of the innermost section around it."""
        return self.places.get(self._placed(key), self.file)

    def _placed(self, key: Key) -> Key:
        """The key, a key inside it, or the innermost section around it: the first that has a place."""
        inner = (placed for placed in self.places if placed[: len(key)] == key)
        outer = (key[:length] for length in range(len(key) - 1, 0, -1) if key[:length] in self.places)
        return next(inner, next(outer, ()))

    def error(self, problems: Sequence[Problem]) -> ConfigError:
        """The problems in the order of the file, those of the command line last."""
        order = {key: number for number, key in enumerate(self.places)}
        lines = sorted(problems, key=lambda problem: order.get(self._placed(problem[0]), -1))
        return ConfigError([f"{self.place(key)} {dotted(key)}: {what}" for key, what in lines])


def read(path: Path) -> Source:
    """Settings of a YAML file; raises ConfigError if it cannot be read, is not a mapping, or has a key twice."""
    try:
        text = read_within(path, pipe=True).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read ({error}); give a YAML file in UTF-8"]) from error
    if what := exceeds("config_bytes", len(text)):
        raise ConfigError([f"{path}: {what}"])
    reader = _Reader(place=lambda line: f"{path}:{line}")
    data = reader.read(text, ())
    if not reader.problems and not isinstance(data, dict):
        reader.problems.append(f"{path}:1: holds no settings; write sections such as `name:` and `model:`")
    if reader.problems:
        raise ConfigError(reader.problems)
    return Source(file=str(path), data=data, places=reader.places)


def override(source: Source, overrides: Sequence[str]) -> Source:
    """The source with each `a.b=value` applied in order; a value is a YAML scalar, flow list or map."""
    data, places = deepcopy(source.data), dict(source.places)
    problems: list[str] = []
    for text in overrides:
        name, equals, value = text.partition("=")
        key: Key = tuple(int(part) if re.fullmatch("[0-9]{1,9}", part) else part for part in name.split("."))
        if not equals or "" in key or name != name.strip():
            problems.append(f"{COMMAND_LINE} {text}: not a setting; write section.key=value, without blanks around =")
            continue
        reader = _Reader(place=lambda line: COMMAND_LINE)
        chosen = reader.read(value, key)
        problems += reader.problems or _put(data, key, chosen)
        places = {old: place for old, place in places.items() if old[: len(key)] != key}
        places |= reader.places | {key: COMMAND_LINE}
    if problems:
        raise ConfigError(problems)
    return Source(file=source.file, data=data, places=places)


def dotted(key: Key) -> str:
    """A key as it is written in an override."""
    return ".".join(map(str, key))


class _Loader(yaml.SafeLoader):
    """Safe YAML with the plain scalars of YAML 1.2: `1e-5` is a number; `on`, `no`, `1:30` and dates are words."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", [*"~nN", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", [*"tTfF"]),
    ("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", [*"-+0123456789"]),
    (
        "float",
        r"^[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN)$",
        [*"-+.0123456789"],
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


@final
@dataclass
class _Reader:
    """Converts YAML text into plain values; records the place of each value, and problems."""

    place: Callable[[int], str]  # of a line, counted from 1
    places: dict[Key, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    values: int = 0  # so far, each as often as aliases repeat it

    def read(self, text: str, key: Key) -> Any:
        """The value in `text`, which belongs to `key`; None and a problem if it is not valid YAML."""
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
            return None if node is None else self._value(loader, node, key)
        except (RecursionError, ValueError) as error:
            what = "nested too deep" if isinstance(error, RecursionError) else str(error)
            self.problems.append(f"{self.place(1)} {dotted(key)}".rstrip() + f": {what}; write it out")
        except yaml.YAMLError as error:
            marked = isinstance(error, yaml.MarkedYAMLError)
            mark = error.problem_mark if marked else None
            what = error.problem if marked else " ".join(str(error).split())
            place = self.place(mark.line + 1 if mark else 1)
            self.problems.append(f"{place} {dotted(key)}".rstrip() + f": not valid YAML ({what}); fix or quote it")
        return None

    def _value(self, loader: _Loader, node: Node, key: Key) -> Any:
        self.values += 1
        if what := exceeds("config_values", self.values):
            raise ValueError(f"its aliases (&, *) repeat values: {what}")
        if isinstance(node, MappingNode):
            return self._mapping(loader, node, key)
        if isinstance(node, SequenceNode):
            return [self._placed(loader, item, item, (*key, index)) for index, item in enumerate(node.value)]
        return loader.construct_object(node)

    def _mapping(self, loader: _Loader, node: MappingNode, key: Key) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            name = str(name_node.value)
            inner = (*key, name)
            if name in values:
                place = self.place(name_node.start_mark.line + 1)
                self.problems.append(f"{place} {dotted(inner)}: already given at {self.places[inner]}; keep one")
            values[name] = self._placed(loader, name_node, value_node, inner)
        return values

    def _placed(self, loader: _Loader, mark: Node, node: Node, key: Key) -> Any:
        self.places[key] = self.place(mark.start_mark.line + 1)
        return self._value(loader, node, key)


def _put(data: Any, key: Key, value: Any) -> list[str]:
    """Set `key` in `data`, creating missing sections; returns the problem if a value on the way is not a section."""
    for depth, part in enumerate(key):
        way = dotted(key[:depth])
        if isinstance(data, list) and not (isinstance(part, int) and part < len(data)):
            return [
                f"{COMMAND_LINE} {dotted(key)}: {way} has {counted(len(data), 'item')}, counted from 0; set {way}=[...]"
            ]
        if not isinstance(data, list | dict):
            return [f"{COMMAND_LINE} {dotted(key)}: {way} is {data!r}, not a section; set {way} itself"]
        section: Any = data
        if depth == len(key) - 1:
            section[part] = value
        elif isinstance(data, dict) and data.get(part) is None:
            data = section[part] = {}
        else:
            data = section[part]
    return []
