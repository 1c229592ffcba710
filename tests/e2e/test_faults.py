"""One trial of each fault: the run resumes to the weights of an unbroken one (benchmarks/faults.py runs many)."""

import json
import subprocess
import sys

import pytest
from support.paths import ROOT


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_survives_every_kind_of_fault_bit_for_bit(tmp_path) -> None:
    arguments = ["--trials", "6", "--engines", "1", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "faults.py", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "faults.json").read_text())["passed"] == 6
