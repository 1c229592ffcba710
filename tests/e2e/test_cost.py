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

from omnimem.config import ConfigError
from omnimem.media import MediaError
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


def test_rounds_are_summed_up_by_their_median(script: ModuleType) -> None:
    rounds = [{"bytes": 3, "beyond_the_model": None}, {"bytes": 1, "beyond_the_model": None}]
    assert script.middle([*rounds, {"bytes": 2, "beyond_the_model": None}]) == {"bytes": 2, "beyond_the_model": None}


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (["--policy", "uniform", "--policy", "omnimen"], ConfigError, "memory.policy"),
        (["--video", "film.mp4"], SystemExit, "--video and --ask go together"),
        (["--video", "film.mp4", "--ask", "What?"], MediaError, "film.mp4: is not there"),
        (["--rounds", "0"], SystemExit, "must be at least 1"),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_is_measured(
    script: ModuleType,
    arguments: list[str],
    error: type[BaseException],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(error) as raised:
        script.main(["--config", "tiny.yaml", "--out", str(tmp_path), *arguments])
    assert said in f"{raised.value} {capsys.readouterr().err}"
    assert not list(tmp_path.iterdir())


def test_a_file_of_an_earlier_run_may_be_given_again(script: ModuleType, tmp_path: Path) -> None:
    film = tmp_path / "videos" / "film.mp4"
    film.parent.mkdir()
    film.write_bytes(b"film")
    for given in (film, film, tmp_path / "other" / "film.mp4"):
        if given is not film:
            given.parent.mkdir()
            given.write_bytes(b"other")
        script.adopt(tmp_path, given, ["What?"])
        assert film.read_bytes() == given.read_bytes()


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
