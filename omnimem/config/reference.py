"""Every key of a config with type, default and meaning, from the schema itself: fields and the comments beside them.

`omnimem explain KEY` prints a part of it, docs/configuration.md all of it; a test compares the page.
"""

import ast
import inspect
import io
import re
import sys
import textwrap
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, final, get_args, get_origin, get_type_hints

import yaml

from omnimem.config import RunConfig
from omnimem.config.check import ELSEWHERE, alternatives, choices_of, nearest
from omnimem.errors import UserError

PAGE = """# Configuration

<!-- made by `omnimem explain --markdown > docs/configuration.md` -->

All keys of a config, from the schema; `omnimem explain KEY` prints a part of it. A section with a `name` has the keys
of what is chosen. On the command line: `section.key=value`."""
TRAIN = """The fields of transformers.TrainingArguments (5.17 to 5.23) and our own (`omnimem explain train`), and what
`--resume` does when one differs from the run's own `config.yaml`:

- **takes effect**: from the next step; a warning names both values, `config.yaml` then states the new one, and
  `changed_settings` of run.json both.
- **refused**: exit code 2, one line with the name and both values. The value is in the checkpoint (optimizer) or in the
  steps that were taken (seed, order of samples). Give the old value, or start another run.
- **in no run**: the setting is refused when it is read, with the reason.

Ranks, `per_device_train_batch_size` and `gradient_accumulation_steps` may change as long as their product does not.
`max_steps` and `num_train_epochs` also stretch the schedule of the learning rate and of `tuning.selection.temperature`
from the next step on. A new `learning_rate`, warm-up or schedule continues at the step that was reached: the rate of
the next step is the one that a run with the new settings from the start would have there. Where the state of a
checkpoint holds them (`lr_scheduler_type` reduce_lr_on_plateau or greedy, schedule-free and layerwise optimizers, a
`scheduler` section of the DeepSpeed file) these are refused too. All settings outside of `train` are refused but for
those of `evaluate`, `data.cache` and `data.max_failures`; so are other `optimizer` and `scheduler` sections in the
DeepSpeed settings."""
COMMON = {  # meanings of keys that many sections share
    "name": "chooses the section",
    "preset": "settings of null keys: as published, as released, or with our audio-visual split (docs/policies.md)",
    "root": "folder of its files",
    "rules": "prompt and answer extraction (docs/benchmarks.md)",
}
Docs = Mapping[str, tuple[str, str]]  # default and meaning of fields, where their class does not give them
OF_PRESET = "null: as the preset has it"
WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text", Path: "path", NoneType: "null"}


@final
@dataclass(frozen=True, kw_only=True)
class Entry:
    """A key of a section."""

    name: str
    kind: str  # as a reader would write it
    default: str  # as YAML; "" if the key must be given
    doc: str
    hint: Any

    @property
    def line(self) -> str:
        """The key in one line."""
        default = f"default {self.default}" if self.default else "required"
        return f"{self.name}: {self.kind} ({default})" + (f"  # {self.doc}" if self.doc else "")


@final
@dataclass(frozen=True, kw_only=True)
class Section:
    """A dataclass of the schema, or a choice between several by their `name`."""

    key: str
    doc: str
    entries: tuple[Entry, ...]
    choices: Mapping[str, str] = field(default_factory=dict)  # values of `name`, and what each of them is


def section(kind: type, key: str, docs: Docs | None = None) -> Section:
    """The section of a dataclass; `docs` are defaults and meanings that its source does not give."""
    hints, comments, found = get_type_hints(kind, include_extras=True), field_comments(kind), []
    named = "preset" in hints or len(choices_of(kind)) > 1  # null keys have the values of a preset
    for each in fields(kind):
        if each.init and "refused" not in each.metadata:
            hint = hints[each.name]
            doc = _doc(each.name, hint, comments)
            doc += f"; {OF_PRESET}" if named and each.default is None and "null:" not in doc else ""
            default, doc = (docs or {}).get(each.name, (_default(each), doc))
            found.append(Entry(name=each.name, kind=type_name(hint), default=default, doc=doc, hint=hint))
    return Section(
        key=key, doc=about(kind), entries=tuple(found), choices={name: about(kind, name) for name in choices_of(kind)}
    )


def about(kind: type, name: str = "") -> str:
    """What a section is, or its choice `name`: one sentence of the class, or of its module if it is alone there."""
    table = re.search(rf"^ *{name} {{2,}}((?:.|\n {{12,}})*)", kind.__doc__ or "", re.MULTILINE) if name else None
    if table:
        return re.split(r"; |, so | \(docs/", " ".join(table[1].split()))[0]
    module = sys.modules[kind.__module__]
    beside = [each for each in vars(module).values() if is_dataclass(each) and choices_of(each)]
    alone = bool(choices_of(kind)) and all(each is kind for each in beside)
    return first_sentence(module.__doc__ if alone else kind.__doc__)


def _doc(name: str, hint: Any, comments: Mapping[str, str]) -> str:
    """The comment of a field, what all fields of its name mean, or what the section in it says."""
    kinds = [kind for kind in alternatives(hint) if is_dataclass(kind)]
    inner = first_sentence(kinds[0].__doc__) if len(kinds) == 1 else ""
    return comments.get(name) or COMMON.get(name) or inner


def schema(train: type, docs: Docs) -> Iterator[Section]:
    """All sections in the order of a config; `train` is the section `train`, `docs` the meanings of its fields."""

    def inside(kind: type, key: str) -> Iterator[Section]:
        found = section(kind, key, docs if kind is train else None)
        yield found
        for each in found.entries:
            yield from of_hint(each.hint, f"{key}.{each.name}".strip("."))

    def of_hint(hint: Any, key: str) -> Iterator[Section]:
        kinds = [kind for kind in alternatives(hint) if isinstance(kind, type) and is_dataclass(kind)]
        kinds = [train] if key == "train" else kinds
        for kind in kinds:
            names = choices_of(kind)
            yield from inside(kind, f"{key}.{names[0]}" if names and len(kinds) > 1 else key)

    yield from inside(RunConfig, "")


def explain(key: str, train: type, docs: Docs) -> str:
    """Fields, types, defaults and meaning of a key such as `memory.policy.snapkv`; "" lists the sections.

    Raises UserError, with the nearest key of the same section, if there is no such key.
    """
    # 1. a section
    sections = {each.key: each for each in schema(train, docs)}
    for each in tuple(sections.values()):  # one section may have several names
        names = [name for name in each.choices if len(each.choices) > 1 or each.key.endswith(f".{name}")]
        parent = each.key.rpartition(".")[0]
        sections |= {f"{parent}.{n}": replace(each, key=f"{parent}.{n}", doc=each.choices[n]) for n in names}
    key = ".".join(part for part in key.split(".") if not part.isdigit())  # places in a list
    if key in sections:
        return _shown(sections[key], sections)
    # 2. a choice between sections, or a key of one
    choices = [each for each in sections if key and each.rpartition(".")[0] == key]
    parent, _, name = key.rpartition(".")
    entry = next((each for each in sections[parent].entries if each.name == name), None) if parent in sections else None
    if entry is None:
        raise UserError(f"{key}: no such key; {_nearest(key, sections)}")
    shown = [f"{parent}.{entry.line}".strip(".")]
    return "\n".join([*shown, *(f"  {each}  {sections[each].doc}" for each in choices)])


def _nearest(key: str, sections: Mapping[str, Section]) -> str:
    """A key of the same name in another section, or for the first unknown part of a key the nearest key there."""
    name = key.rpartition(".")[2]
    if name in ELSEWHERE:
        return f"did you mean {ELSEWHERE[name]!r}?"
    named = [each for each in sections if each.rpartition(".")[2] == name]
    named += [
        f"{each}.{entry.name}" for each, found in sections.items() for entry in found.entries if entry.name == name
    ]
    if name and named:
        return f"did you mean {min(named, key=len)!r}?"
    parent = ""
    for part in key.split("."):
        inside = [each.name for each in sections[parent].entries] if parent in sections else []
        inside += [each.rpartition(".")[2] for each in sections if each and each.rpartition(".")[0] == parent]
        if part not in inside:
            return nearest(part, list(dict.fromkeys(inside))) if inside else f"{parent} has no keys"
        parent = f"{parent}.{part}".strip(".")
    return f"omnimem explain {parent}"


def _shown(found: Section, sections: Mapping[str, Section]) -> str:
    """A section, one line per key, with the sections inside it named."""
    lines = [f"{found.key or 'a config'}: {found.doc}"]
    for each in found.entries:
        inner = f"{found.key}.{each.name}".strip(".")
        more = any(other == inner or other.startswith(f"{inner}.") for other in sections)
        lines.append(f"  {each.line}" + (f"  (omnimem explain {inner})" if more else ""))
    return "\n".join(lines)


def markdown(train: type, docs: Docs, on_resume: Mapping[str, str], refused: Mapping[str, str]) -> str:
    """docs/configuration.md: a table per section, and what `--resume` does with each setting of `train`."""
    parts = [PAGE]
    for found in schema(train, docs):
        if found.key != "train":
            names = f"name: {' or '.join(found.choices)}. " if found.choices else ""
            title = f"`{found.key}`" if found.key else "A config"
            parts += [f"## {title}", textwrap.fill(f"{names}{found.doc}.", 118, break_on_hyphens=False)]
            cells = [
                [f"`{e.name}`", e.kind, f"`{e.default}`" if e.default else "required", e.doc] for e in found.entries
            ]
            parts.append(_table(["key", "type", "default", "meaning"], cells))
            continue
        settings = {**on_resume, **{name: f"in no run: {reason}" for name, reason in refused.items()}}
        parts.append(f"## `train`\n\n{TRAIN}")
        parts.append(_table(["setting", "on resume"], [[f"`{name}`", settings[name]] for name in sorted(settings)]))
    return "\n\n".join(parts) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in lines)


# ------------------------------------------------------------------------------------------------ types, defaults, docs


def type_name(hint: Any) -> str:
    """A type as a reader of YAML would say it: `a, b or null`, `list of text`."""
    origin, given = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return type_name(given[0])
    if origin is Literal:
        return " or ".join(str(word) for word in given)
    if origin in (Union, UnionType):
        sections = [each for each in given if is_dataclass(each) and choices_of(each)]
        names = [" or ".join(map(str, choices_of(each))) for each in sections]
        others = [type_name(each) for each in given if each not in sections]
        return " or ".join([*([f"section, name: {', '.join(names)}"] if names else []), *dict.fromkeys(others)])
    if origin in (tuple, list):
        items = [each for each in given if each is not ...]
        return f"list of {' or '.join(type_name(each) for each in items)}"
    if origin in (dict, Mapping) or hint is dict:
        return "section"
    if is_dataclass(hint):
        return "section"
    return WORDS.get(hint, "any")


def _default(field: Field[Any]) -> str:
    """The default as YAML on one line; "" without one."""
    if field.default is MISSING and field.default_factory is MISSING:
        return ""
    value = field.default if field.default is not MISSING else field.default_factory()  # pyright: ignore[reportCallIssue]
    if is_dataclass(value):
        names = choices_of(type(value))
        return f"{{name: {getattr(value, 'name', names[0])}}}" if names else "{}"
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


@cache
def field_comments(kind: type) -> dict[str, str]:
    """The comment beside each field in the source of a dataclass and its bases."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not is_dataclass(base):
            continue
        try:
            text = inspect.cleandoc("\n" + inspect.getsource(base))
        except (OSError, TypeError):  # made at run time
            continue
        tree, rows = ast.parse(text).body[0], text.splitlines()
        comments = {
            token.start[0]: token.string.removeprefix("#").strip()
            for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type == tokenize.COMMENT
        }
        for node in tree.body if isinstance(tree, ast.ClassDef) else ():
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                first = node.lineno
                while first - 1 in comments and rows[first - 2].lstrip().startswith("#"):  # lines of their own, above
                    first -= 1
                lines = range(first, (node.end_lineno or node.lineno) + 1)
                said = [re.sub(r"^(pyright|type|noqa):.*", "", comments[line]) for line in lines if line in comments]
                found[node.target.id] = " ".join(said).strip() or found.get(node.target.id, "")
    return found


def first_sentence(text: str | None) -> str:
    """The first sentence of a docstring, on one line."""
    paragraph = " ".join((text or "").strip().split("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z])", paragraph)[0].removesuffix(".")
