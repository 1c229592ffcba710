"""benchmarks/cost.py: each arm in a process of its own, medians over its results."""

import json

import pytest
from support.commands import run_benchmark

from omnimem.recall.renderer import write_mp4
from omnimem.recall.worlds import draw_world


@pytest.mark.slow
def test_arms_are_measured_on_the_users_file(tmp_path) -> None:
    video = tmp_path / "video.mp4"
    write_mp4(draw_world(3, 24), video)
    given = ["--config", "tiny.yaml", "--out", tmp_path, "--video", video, "--ask", "what colour was the star ?"]
    done = run_benchmark("cost", *given, "--policy", "uniform", "--rounds", 1)
    assert done.returncode == 0, done.stderr
    costs = json.loads((tmp_path / "cost.json").read_text())["median"]
    assert {name: cost["kept"] for name, cost in costs.items()} == {"full_memory": 216, "uniform": 18}
    assert all(cost["tokens_in"] == 216 and cost["first_token_seconds"] > 0 for cost in costs.values())
    assert costs["full_memory"]["bytes"] > 4 * costs["uniform"]["bytes"]
    assert 'id="cost"' in (tmp_path / "report.html").read_text()
    assert "| uniform | 216 | 18 |" in done.stdout
