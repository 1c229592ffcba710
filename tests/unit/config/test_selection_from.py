"""`memory.selection_from` in a config: where it works, what does not go with it, and what depends on it."""

from pathlib import Path
from typing import Any

import pytest
from support.configs import loaded, problems

from omnimem.budget import Budget
from omnimem.cli.eval_fingerprint import EvalFingerprint
from omnimem.config import RunConfig
from omnimem.config.exported import policies_of
from omnimem.config.policy import policy
from omnimem.evaluation import Arm
from omnimem.run import RunFolder

BASE, HARD = "memory.selection_from=base", "tuning.selection.softening=hard"
OF_TUNING = "tuning.selection.softening"


@pytest.mark.parametrize(
    ("overrides", "key", "what"),
    [
        (["memory.selection_from=bose", HARD], "memory.selection_from", "'tuned' or 'base', got 'bose'; did you mean"),
        ([BASE], OF_TUNING, "straight_through has no effect with memory.selection_from: base"),
        ([BASE, f"{OF_TUNING}=soft"], OF_TUNING, "soft has no effect with memory.selection_from: base"),
        ([BASE, HARD, "tuning.gradient=paper"], "memory.selection_from", "unlike tuning.gradient: paper"),
        ([BASE, HARD, "tuning.gradient=released"], "memory.selection_from", "unlike tuning.gradient: released"),
        ([BASE, HARD, "memory.policy={name: hermes}"], "memory.selection_from", "policy hermes merges tokens"),
        ([BASE, HARD, "memory.policy={name: streammem}"], "memory.selection_from", "policy streammem merges tokens"),
        (
            [BASE, HARD, "memory.policy={name: streammem, frame_filter: false, per_head: true}"],
            "memory.selection_from",
            "policy streammem merges tokens",
        ),
    ],
)
def test_what_does_not_go_with_it_is_one_line_with_its_key_and_cure(overrides, key, what, tmp_path) -> None:
    lines = [line for line in problems(tmp_path, overrides=overrides) if "selection_from" in line]
    assert len(lines) == 1, lines
    assert f" {key}: " in lines[0]
    assert what in lines[0]


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["tuning.gradient=states"],
        ["tuning.horizon=2"],
        ["memory.policy={name: lava}"],
        ["memory.policy={name: hermes, summary: false}"],
        ["memory.policy={name: streammem, prototypes: false}"],
    ],
)
def test_what_goes_with_it_reaches_the_policy_at_every_size(settings, tmp_path) -> None:
    run = loaded(tmp_path, BASE, HARD, *settings)
    policies = policies_of(run.memory, Budget.shared(4, 64))
    assert [policies(slots).selection_from for slots in (64, 16, None)] == ["base"] * 3
    assert policies(64).with_budget(None).selection_from == "base"


def test_it_is_tuned_by_default_and_python_can_choose(tmp_path) -> None:
    assert loaded(tmp_path).memory.selection_from == "tuned"
    assert policy("omnimem", Budget.shared(4, 8)).selection_from == "tuned"
    assert policy("omnimem", Budget.shared(4, 8), selection_from="base", coverage=0.2).selection_from == "base"


def settings_of(run: RunConfig, folder: Path, *, tuned: bool, whole: bool = False) -> dict[str, Any]:
    budget = Budget.shared(4, 64)
    target = RunFolder(path=folder)
    budget.write(target.budget)
    arm = Arm(name="x", policy=policies_of(run.memory, budget)(None if whole else 64), tracks="both")
    found = EvalFingerprint(run=run, folder=target, adapter=folder / "adapter")._of(arm, tuned=tuned)
    return {key: value for key, value in found.items() if key != "benchmarks"}


def test_results_depend_on_it_where_an_adapter_evicts_and_nowhere_else(tmp_path) -> None:
    tuned, base = (loaded(tmp_path, f"memory.selection_from={name}", HARD) for name in ("tuned", "base"))
    found = {
        (name, adapted, whole): settings_of(run, tmp_path, tuned=adapted, whole=whole)
        for name, run in (("tuned", tuned), ("base", base))
        for adapted in (True, False)
        for whole in (True, False)
    }
    for adapted, whole in ((True, True), (False, True), (False, False)):
        assert found["tuned", adapted, whole] == found["base", adapted, whole]
    mine, theirs = found["tuned", True, False], found["base", True, False]
    assert {key for key in theirs if mine[key] != theirs[key]} == {"selection_from"}
    assert mine["selection_from"] is None  # as in results that were made before the setting existed


def test_results_of_all_queries_are_those_of_before_and_a_stride_is_named(tmp_path) -> None:
    usual, one, four = (
        settings_of(loaded(tmp_path, f"memory.policy={{name: omnimem{given}}}"), tmp_path, tuned=True)
        for given in ("", ", query_stride: 1", ", query_stride: 4")
    )
    assert usual == one
    assert "query_stride" not in str(usual["memory"]) + usual["policy"]
    assert {key for key in four if usual[key] != four[key]} == {"query_stride"}
    assert (usual["query_stride"], four["query_stride"]) == (None, 4)
