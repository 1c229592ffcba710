"""benchmarks/cost.py: each arm in a process of its own, medians of what its lines say."""

import json
import os
import subprocess
import sys

import pytest
from support.paths import ROOT

from omnimem.recall.renderer import write_mp4
from omnimem.recall.worlds import draw_world


@pytest.mark.slow
def test_arms_are_measured_on_a_file_of_ones_own_and_drawn(tmp_path) -> None:
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
