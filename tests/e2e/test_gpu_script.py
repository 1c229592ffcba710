"""benchmarks/gpu.sh runs from end to end without a GPU, and an error in one section does not affect the others."""

import json
import os
import subprocess
import sys

import pytest
import torch
from support.paths import ROOT

from benchmarks.accelerator.record import Record

CHECKED = {"attention", "streaming", "kept sets", "gradient"}
MEASURED = {"ceilings", "chunk steps", "asking", "training", "attention", "compiled tokens", "compiled chunks"}


@pytest.mark.slow
def test_the_script_checks_and_measures_everything_on_a_small_model(tmp_path) -> None:
    command = [ROOT / "benchmarks" / "gpu.sh", "--device", "cpu", "--small", "--out", tmp_path]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    expected = {f"check of {name}, torch.{dtype}" for name in CHECKED for dtype in ("float32", "bfloat16")}
    assert set(found["sections"]) == expected | {f"speed of {name}" for name in MEASURED}
    assert found["ok"]
    assert all(section["state"] == "done" for section in found["sections"].values())
    assert all(check["ok"] for check in found["checks"])
    named = " ".join(check["name"] for check in found["checks"])
    assert all(word in named for word in ("output", "mass", "gate", "packed", "one shot", "kept sets", "recomputed"))
    arms = {row["arm"] for row in found["rows"] if row["section"].startswith("chunk of")}
    ours = {
        "distinct",
        "distinct, by head",
        "lambda 0",
        "lambda 0.02",
        "lambda 0.02, feature 128",
        "lambda 0.02, no coverage",
    }
    assert arms == ours | {"stock sdpa", "random"}
    assert all(row["median_ms"] > 0 for row in found["rows"] if "median_ms" in row)
    assert (tmp_path / "gpu.md").read_text() in result.stdout


def test_a_section_that_fails_is_noted_and_the_others_still_run(tmp_path) -> None:
    record = Record(tmp_path, {"device": "none", "packages": {}}, deadline=float("inf"))

    def broken() -> None:
        raise RuntimeError("no kernel image is available")

    record.section("broken", broken)
    record.section("sound", lambda: record.check("sum", torch.float32, 0.0, 1e-5))
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["sections"]["broken"]["error"] == "RuntimeError: no kernel image is available"
    assert found["sections"]["sound"]["state"] == "done"
    assert found["checks"][0]["ok"]
    assert not found["ok"]
