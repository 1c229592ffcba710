"""The demo's configs can be read, and read the data that its first command renders."""

import pytest
from support.commands import exit_code

from omnimem.commands import demo
from omnimem.commands.demo import DEMOS
from omnimem.config import load
from omnimem.extras import EXTRAS
from omnimem.training.arguments import train_section

EVERY = [(base, quick) for base in DEMOS for quick in (False, True)]


@pytest.mark.parametrize(("base", "quick"), EVERY)
def test_a_demo_trains_on_and_evaluates_what_it_renders(base, quick) -> None:
    one = DEMOS[base][quick]
    run = load(one.config, one.settings, train=train_section())
    folder = one.data[one.data.index("--out") + 1]
    assert run.data.train == f"{folder}/train.jsonl"
    assert [str(benchmark.manifest.parent) for benchmark in run.evaluate.benchmarks] == [folder]
    assert one.report.parts[1] == run.name
    assert run.model.path.endswith(base)
    assert {EXTRAS[package] for package in one.packages} <= {"real"}


def test_a_missing_package_of_the_base_is_named_before_anything_is_rendered(tmp_path, monkeypatch) -> None:
    def absent(*packages: str) -> None:
        missing = [package for package in packages if EXTRAS[package] == "real"]
        raise ModuleNotFoundError(f"No module named {missing[0]!r}", name=missing[0])

    monkeypatch.setattr(demo, "require", absent)
    assert exit_code(demo.main, ["--base", "assembled", "--out", str(tmp_path / "d")]) == 2
    assert not (tmp_path / "d" / "data").exists()


def test_a_base_that_no_demo_has_is_one_line_before_anything_is_rendered(tmp_path, capsys) -> None:
    assert exit_code(demo.main, ["--base", "large", "--out", str(tmp_path / "d")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "large" in said
    assert all(base in said for base in DEMOS)
    assert not (tmp_path / "d").exists()
