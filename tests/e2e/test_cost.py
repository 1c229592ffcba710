"""benchmarks/cost.py: each arm in a process of its own, medians of what its lines say."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.paths import ROOT

from omnimem.recall.renderer import write_mp4
from omnimem.recall.worlds import draw_world


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return import_module("cost")


def line(at: float, first_token: float) -> dict[str, Any]:
    """What a result says of a question that was asked at this second."""
    return {
        "stream_seconds": at,
        "tokens_in": {"audio": at, "visual": 8 * at},
        "entries": 18.0,
        "seconds": {"media": 0.01 * at, "reading": 0.02 * at, "first_token": first_token, "answer": 0.5},
        "peak_memory": 700 + at,
        "bytes": 166,
    }


def test_a_cost_is_that_of_the_whole_stream_and_the_first_token_a_median(script: ModuleType) -> None:
    cost = script.cost_of([line(100, 0.1), line(40, 0.4), line(60, 0.2)], loaded=600)
    assert cost == {
        "tokens_in": 900,
        "kept": 18.0,
        "media_seconds": pytest.approx(0.01),
        "text_model_seconds": pytest.approx(0.02),
        "first_token_seconds": 0.2,
        "beyond_the_model": 200,
        "bytes": 166,
    }
    assert script.cost_of([line(100, 0.1)], loaded=None)["beyond_the_model"] is None


@pytest.mark.slow
def test_arms_are_measured_on_a_file_of_ones_own_and_drawn(tmp_path: Path) -> None:
    film, script = tmp_path / "film.mp4", ROOT / "benchmarks" / "cost.py"
    write_mp4(draw_world(3, 24), film)
    given = ["--config", "tiny.yaml", "--out", tmp_path, "--video", film, "--ask", "what colour was the star ?"]
    done = subprocess.run(
        [sys.executable, script, *given, "--policy", "uniform", "--rounds", "1"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    costs = json.loads((tmp_path / "cost.json").read_text())["median"]
    assert {name: cost["kept"] for name, cost in costs.items()} == {"full_memory": 216, "uniform": 18}
    assert all(cost["tokens_in"] == 216 and cost["first_token_seconds"] > 0 for cost in costs.values())
    assert costs["full_memory"]["bytes"] > 4 * costs["uniform"]["bytes"]
    assert 'id="cost"' in (tmp_path / "report.html").read_text()
    assert "| uniform | 216 | 18 |" in done.stdout
