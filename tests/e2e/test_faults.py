"""One trial of each fault: the run resumes to the weights of an unbroken one (benchmarks/faults.py runs many)."""

import json

import pytest
from support.command_faults import KILLED
from support.commands import run_benchmark
from support.faults import FAULTS

KINDS = len(FAULTS) + len(KILLED)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_survives_every_kind_of_fault_bit_for_bit(tmp_path) -> None:
    done = run_benchmark("faults", "--trials", KINDS, "--engines", 1, "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "faults.json").read_text())["passed"] == KINDS
