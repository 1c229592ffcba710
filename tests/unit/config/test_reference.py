"""The reference of a config is made from its schema: every key has a meaning, and the page is what the code says."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
import yaml
from support.commands import exit_code
from support.paths import ROOT

from omnimem.commands import explain as command
from omnimem.commands import list as listing
from omnimem.config import CONFIGS, find
from omnimem.config.check import ELSEWHERE, alternatives, choices_of
from omnimem.config.reference import explain, field_comments, markdown, schema, section, type_name
from omnimem.errors import UserError
from omnimem.policies import PolicyOptions
from omnimem.tasks import BenchmarkOptions
from omnimem.training.arguments import REFUSED, on_resume, train_docs, train_section

TRAIN, DOCS = train_section(), train_docs()
SECTIONS = {each.key: each for each in schema(TRAIN, DOCS)}


@dataclass
class Inner:
    """A part."""

    size: int  # of it


@dataclass
class Example:
    """An example. It has a second sentence."""

    beside: int = 1  # a comment beside
    # a comment above,
    # of two lines
    above: str | None = None
    both: tuple[Literal["a", "b"], ...] = ("a",)
    inner: Inner = field(default_factory=lambda: Inner(size=1))
    bare: Annotated[float, "unit"] = 0.5


def test_a_section_has_names_types_defaults_and_the_comments_of_its_source() -> None:
    found = section(Example, "example")
    assert found.doc == "An example"
    assert [(each.name, each.kind, each.default, each.doc) for each in found.entries] == [
        ("beside", "whole number", "1", "a comment beside"),
        ("above", "text or null", "null", "a comment above, of two lines"),
        ("both", "list of a or b", "[a]", ""),
        ("inner", "section", "{}", "A part"),
        ("bare", "number", "0.5", ""),
    ]
    assert field_comments(Example)["above"] == "a comment above, of two lines"


@pytest.mark.parametrize(
    ("hint", "expected"),
    [(dict[str, Any], "section"), (list[int] | None, "list of whole number or null"), (bool, "true or false")],
)
def test_types_are_named_as_a_reader_of_yaml_would(hint, expected) -> None:
    assert type_name(hint) == expected


@pytest.mark.parametrize("key", [key for key in SECTIONS if key != "train"])
def test_every_key_has_a_meaning_and_a_default_that_is_yaml(key) -> None:
    assert SECTIONS[key].doc
    assert [each.name for each in SECTIONS[key].entries if not each.doc] == []
    for each in SECTIONS[key].entries:
        assert not each.default or isinstance(yaml.safe_load(each.default), object)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("", "memory: section (default {})"),
        ("memory.policy.snapkv", "window: whole number or null (default null)"),
        ("memory.policy.paper", "eqs. 8-10 as printed"),
        ("memory.policy", "memory.policy.k_center  k-center: keeps tokens that are far apart"),
        ("memory.policy.snapkv.window", "number of queries"),
        ("stream.fps", "stream.fps: number (default 1.0)  # frames per second"),
        ("evaluate.benchmarks", "evaluate.benchmarks.lvbench  LVBench: fifteen questions"),
        ("evaluate.benchmarks.0.own", "instruction: text"),
        ("train.learning_rate", "train.learning_rate: number (default 5e-05)  # The initial learning rate"),
        ("tuning.budgets", "low: whole number (required)  # fewest slots per layer"),
        ("data.train", "weight: number (default 1.0)"),
    ],
)
def test_any_key_is_explained(key, expected) -> None:
    assert expected in explain(key, TRAIN, DOCS)


@pytest.mark.parametrize(
    ("key", "cure"),
    [
        ("memory.policy.snapvk", "did you mean 'snapkv'?"),
        ("stream.fsp", "did you mean 'fps'?"),
        ("memory.zzz", "known: policy, slots_per_layer, budget, selection_from"),
        ("steam.fps", "did you mean 'stream.fps'?"),
        ("stream.fps.more", "stream.fps has no keys"),
        ("train.learning_rat", "did you mean 'learning_rate'?"),
        ("snapkv", "did you mean 'memory.policy.snapkv'?"),
        ("slots_per_layer", "did you mean 'memory.slots_per_layer'?"),
        ("train.fps", "did you mean 'stream.fps'?"),
        ("train.zzz", "omnimem explain lists what there is"),
    ],
)
def test_an_unknown_key_names_one_of_the_same_name_or_of_the_same_section(key, cure) -> None:
    with pytest.raises(UserError) as caught:
        explain(key, TRAIN, DOCS)
    assert cure in str(caught.value)


def test_the_page_is_what_the_code_says() -> None:
    """After a change: omnimem explain --markdown > docs/configuration.md"""
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert page == markdown(TRAIN, DOCS, on_resume(), REFUSED)


@pytest.mark.parametrize("what", listing.KINDS)
def test_everything_that_can_be_chosen_has_one_line(what, capsys) -> None:
    assert exit_code(listing.main, [what]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines)
    names = [name for name, _ in listing.KINDS[what]()]
    assert len(set(names)) == len(names) == len(lines)
    if what in ("models", "configs"):
        assert all(find(name, CONFIGS) for name in names if "/" in name or name.endswith(".yaml"))


def test_every_policy_and_benchmark_is_listed() -> None:
    """The names are those that the schema accepts."""
    for what, kinds in (("policies", PolicyOptions), ("benchmarks", BenchmarkOptions)):
        accepted = [name for kind in alternatives(kinds) for name in choices_of(kind)]
        assert [name for name, _ in listing.KINDS[what]()] == accepted


def test_the_command_prints_a_key_and_the_page(capsys) -> None:
    assert exit_code(command.main, ["stream"]) == 0
    assert "chunk_tokens: whole number (default 16384)" in capsys.readouterr().out
    assert exit_code(command.main, ["stram"]) == 2
    assert "did you mean 'stream'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_key_of_another_trainer_names_one_that_exists(name) -> None:
    key = ELSEWHERE[name]
    assert explain(key, TRAIN, DOCS).startswith(key)
    with pytest.raises(UserError, match=f"did you mean '{key}'"):
        explain(f"train.{name}", TRAIN, DOCS)
