"""benchmarks/long_stream.py: no question comes before its evidence, and a short real run."""

import json

import pytest
from support.commands import run_benchmark

from benchmarks.long_stream import asked, world_of
from omnimem.commands.synthesize import evidence


def test_every_question_comes_after_its_evidence_and_every_mark_has_one() -> None:
    world, every = world_of(60, 10), 10
    pairs = list(asked(world, every, 3600))
    assert len({question.key for question, _ in pairs if question.kind != "auditory"}) == 16  # all symbols
    assert all(at is None or evidence(world, question)[1] <= at < 3600 for question, at in pairs)
    assert {at for _, at in pairs} >= {600, 1200, 1800, 2400, 3000, None}
    spread = sorted(evidence(world, question)[0] for question, _ in pairs)
    assert spread[0] < 600 < 3000 < spread[-1]


@pytest.mark.slow
def test_two_minutes_are_streamed_answered_and_written_down(tmp_path) -> None:
    done = run_benchmark("long_stream", "--config", "tiny.yaml", "--minutes", 2, "--every", 1, "--out", tmp_path)
    written = json.loads((tmp_path / "long_stream.json").read_text())
    assert done.returncode == (1 if written["wrong"] else 0), done.stderr
    assert not [problem for problem in written["wrong"] if "CPU" not in problem], "a minute is too short to time"
    budget, full = written["budget"], written["full_memory"]
    assert budget["answered"] == budget["questions"] == sum(count for _, count in budget["right"].values())
    assert [row["minutes"] for row in budget["rows"]] == [1.0, 2.0]
    assert [row["entries"] for row in budget["rows"]] == [18, 18]
    assert [row["entries"] for row in full["rows"]] == [540]
    assert "| full memory | 1 |" in done.stdout
