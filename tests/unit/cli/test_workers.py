"""Two evaluations of one run do not write into the same results; shards and helpers of one evaluation do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from omnimem.cli import workers
from omnimem.cli.workers import HELPER, LocalWorkers, ShardWorker
from omnimem.evaluation import EvaluationError, Shard

SHARDS = [ShardWorker(Shard(index=index, count=2)) for index in range(2)]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PATIENCE", 0.0)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 1), (1, 0)])
def test_a_second_evaluation_is_refused_until_the_first_has_ended(first, second, tmp_path) -> None:
    kinds = (LocalWorkers(1, []), SHARDS[0])
    with (
        kinds[first].claim(tmp_path / "run"),
        pytest.raises(EvaluationError, match="another evaluation is writing its results; wait"),
        kinds[second].claim(tmp_path / "run"),
    ):
        pass
    with kinds[second].claim(tmp_path / "run"):
        pass


def test_shards_of_one_evaluation_and_the_helpers_of_a_process_write_together(tmp_path, monkeypatch) -> None:
    with SHARDS[0].claim(tmp_path), SHARDS[1].claim(tmp_path):
        pass
    with LocalWorkers(2, []).claim(tmp_path):
        monkeypatch.setenv(HELPER, "1")
        with SHARDS[1].claim(tmp_path):
            pass


def test_a_helper_that_outlives_its_evaluation_still_holds_the_lock(tmp_path: Path) -> None:
    with workers._locked(tmp_path, 2) as lock:
        helper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,))
    with pytest.raises(EvaluationError), SHARDS[0].claim(tmp_path):
        pass
    helper.communicate(b"\n")
    with SHARDS[0].claim(tmp_path):
        assert os.listdir(tmp_path) == [".eval.lock"]
