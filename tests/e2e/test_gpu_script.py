"""benchmarks/gpu.sh runs from end to end without a GPU, and an error in one section does not affect the others."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from typing import Any

import pytest
import torch
from support.paths import ROOT
from support.sections import begins_nothing, serve_faults

from benchmarks.accelerator import UNUSED, processes
from benchmarks.accelerator.record import Record
from benchmarks.accelerator.targets import targets

CHECKED = {"attention", "streaming", "kept sets", "decoding", "waits", "gradient"}
MEASURED = {
    *("ceilings", "attention", "chunk steps", "asking", "hour", "graphed tokens", "training"),
    *("compiled tokens", "compiled chunks"),
}
FACTS: dict[str, Any] = {"device": "none", "packages": {}, "targets of": "no sizes"}
LACKS = """
import sys
from importlib.machinery import PathFinder

class Lacks(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {names} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Lacks
"""


@pytest.mark.slow
def test_the_script_checks_and_measures_everything_on_a_small_model(tmp_path) -> None:
    """On a machine without the packages that only other commands need."""
    lacking = {*UNUSED, "deepspeed", "datasets", "tensorboard", "beartype", "scipy", "matplotlib"}
    (tmp_path / "sitecustomize.py").write_text(LACKS.format(names=lacking))
    command = [ROOT / "benchmarks" / "gpu.sh", "--device", "cpu", "--small", "--out", tmp_path]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    expected = {f"check of {name}, torch.{dtype}" for name in CHECKED for dtype in ("float32", "bfloat16")}
    assert set(found["sections"]) == expected | {f"speed of {name}" for name in MEASURED}
    assert found["ok"]
    assert all(section["state"] == "done" for section in found["sections"].values())
    assert all(check["ok"] for check in found["checks"])
    named = " ".join(check["name"] for check in found["checks"])
    words = ("output", "mass", "gate", "packed", "one shot", "kept sets", "recomputed", "every 4th", "further token")
    assert all(word in named for word in (*words, "waits"))
    arms = {row["arm"] for row in found["rows"] if row["section"].startswith("chunk of")}
    policies = {"random", "omnimem", "omnimem, every 4th query", "omnimem, inputs compared", "paper", "distinct"}
    assert arms == policies | {"distinct, by head", "attention mass alone", "stock sdpa"}
    assert all(row["median_ms"] > 0 for row in found["rows"] if "median_ms" in row)
    # a CPU counts no memory; all other targets have a figure
    without = [aim["target"] for aim in found["targets"] if aim["verdict"] == "not measured"]
    assert all(name.startswith("peak") for name in without)
    assert len(found["targets"]) == len(without) + 12
    assert (tmp_path / "gpu.md").read_text() in result.stdout


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("raises", "RuntimeError: no kernel image is available"),
        ("crashes", "its process ended, exit code 11"),
        ("hangs", "ended after 1 s"),
        ("spoils", None),
    ],
)
def test_a_section_that_fails_is_noted_and_the_others_still_run(tmp_path, fault, said) -> None:
    record, deadline = Record(tmp_path, FACTS, []), time.monotonic() + 60
    limits = {"before": 30.0, fault: 1.0 if fault == "hangs" else 30.0, "sound": 30.0}
    processes.run(record, partial(serve_faults, deadline), limits, deadline, deadline)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [check["name"] for check in found["checks"]] == list(limits)
    assert list(found["sections"]) == list(limits)
    states = {name: section["state"] for name, section in found["sections"].items()}
    assert states == {"before": "done", fault: "failed" if said else "done", "sound": "done"}
    assert said is None or found["sections"][fault]["error"].startswith(said)
    assert found["ok"] == (said is None)
    assert said is None or f"- {fault}: failed: {said}" in (tmp_path / "gpu.md").read_text()


def test_what_cannot_begin_ends_and_what_comes_too_late_is_named(tmp_path) -> None:
    record, now = Record(tmp_path, FACTS, []), time.monotonic()
    processes.run(record, begins_nothing, {"one": 9.0, "two": 9.0}, now + 60, now + 60)
    assert [section["error"] for section in record.sections.values()] == ["its process ended, exit code 3"] * 2
    late = Record(tmp_path, FACTS, [])
    processes.run(late, begins_nothing, {"one": 9.0}, now - 1, now - 1)
    assert late.sections == {"one": {"state": "left out", "error": "no time was left for it"}}
    assert not late.ok


def test_targets_are_met_missed_or_not_measured(tmp_path) -> None:
    record = Record(tmp_path, FACTS, targets((2048, 16384), 64))
    record.measured("chunk of 2048", {"random": {"median_ms": 10.0}, "omnimem": {"median_ms": 11.5}})
    record.measured("chunk of 16384", {"random": {"median_ms": 10.0}, "omnimem": {"median_ms": 11.5}})
    record.measured("an hour of video", {"chunks of 2048": {"seconds_given_up": 75.0, "peak_gib": 17.0}})
    record.check("sum", torch.float32, 0.0, 1e-5)
    lines = (tmp_path / "gpu.md").read_text().splitlines()
    assert "| default over the floor, chunks of 2,048 | 1.15 | 1.15 | met |" in lines
    assert "| default over the floor, chunks of 16,384 | 1.1 | 1.15 | missed |" in lines
    assert "| s for an hour of video, chunks of 2,048 | 60 |  | not measured |" in lines
    assert "| peak over its limit, chunks of 2,048 | 1 |  | not measured |" in lines
    assert len(record.verdicts) == 14
