"""A run that failed before its first step starts again with repaired settings, under the same name."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
from support.finished_run import config_of

from omnimem.commands.finetune import checked_start
from omnimem.config import ConfigError, RunConfig, dump
from omnimem.run import append_line, plan


@pytest.fixture
def begun(tmp_path, monkeypatch) -> RunConfig:
    """The settings of a run that has opened its folder, and written its budget."""
    monkeypatch.chdir(tmp_path)
    run = replace(config_of(tmp_path), name="x")
    folder = plan("x").open(dump(run), {})
    folder.budget.write_text("{}")
    return run


@pytest.mark.parametrize("resume", [None, "auto"])
@pytest.mark.parametrize("slots", [12, 9])
def test_settings_may_change_before_the_first_step(resume, slots, begun) -> None:
    repaired = replace(begun, memory=replace(begun.memory, slots_per_layer=slots))
    start = checked_start(repaired, Namespace(resume=resume, overwrite=False))
    start.open(dump(repaired), {})
    assert start.budgeted == start.folder.budget.is_file() == (slots == 12)
    assert Path("runs/x/budget.json.1").is_file() == (slots != 12)


def test_settings_stay_after_a_step(begun) -> None:
    append_line(plan("x").folder.metrics, {"step": 1})
    repaired = replace(begun, memory=replace(begun.memory, slots_per_layer=9))
    with pytest.raises(ConfigError, match="slots_per_layer"):
        checked_start(repaired, Namespace(resume="auto", overwrite=False))
