"""train/score.py: predictions of other tools, judged by a rule set, as an eval folder that train/compare.py takes."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from support import task_layouts as layouts
from support.task_layouts import LMMS_LVBENCH, LMMS_VIDEO_MME, VLMEVALKIT

from omnimem.cli.parser import run_command
from omnimem.commands import compare, score
from omnimem.tasks.accuracy import accuracy, breakdown, categories_of


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Video-MME as its annotations alone."""
    folder = layouts.video_mme(tmp_path / "video_mme")
    shutil.rmtree(folder / "data")
    return folder


def scored(predictions: Path, root: Path, out: Path, *more: str, benchmark: str = "video_mme") -> dict[str, Any]:
    """The benchmark's entry of the summary."""
    score.main([str(predictions), "--benchmark", benchmark, "--root", str(root), "--out", str(out), *more])
    (entry,) = json.loads((out / "summary.json").read_text())["benchmarks"].values()
    return entry


def test_the_same_predictions_give_the_number_of_the_tool_whose_rules_are_chosen(root, tmp_path, capsys) -> None:
    theirs = scored(LMMS_VIDEO_MME, root, tmp_path / "lmms", "--set", "rules=lmms_eval")
    assert theirs["official"] == theirs["strict"] == pytest.approx(5 / 9)
    assert "the file's own scores: 9, of which 0 differ" in capsys.readouterr().out
    kit = scored(VLMEVALKIT, root, tmp_path / "kit", "--set", "rules=vlmevalkit")
    assert kit["official"] == kit["strict"] == pytest.approx(5 / 9)
    assert "9, of which 0 differ" in capsys.readouterr().out
    official = scored(LMMS_VIDEO_MME, root, tmp_path / "official")
    assert (official["official"], official["strict"]) == (pytest.approx(4 / 6), pytest.approx(4 / 9))  # one refuses
    assert "9, of which 3 differ" in capsys.readouterr().out


def test_a_question_without_a_prediction_is_wrong_in_strict_and_left_out_of_official(tmp_path) -> None:
    root = layouts.lvbench(tmp_path / "lvbench")
    some = tmp_path / "samples.jsonl"
    some.write_text(LMMS_LVBENCH.read_text().splitlines()[0] + "\n")
    entry = scored(some, root, tmp_path / "out", benchmark="lvbench")
    assert (entry["n"], entry["missing"]) == (3, 2)
    assert (entry["official"], entry["strict"]) == (1.0, pytest.approx(1 / 3))
    assert entry["no_answer"] == pytest.approx(2 / 3)


def test_two_scored_arms_are_compared_question_by_question(root, tmp_path) -> None:
    better = tmp_path / "better.jsonl"
    lines = [json.loads(line) for line in LMMS_VIDEO_MME.read_text().splitlines()]
    layouts.write_lines(better, [line | {"filtered_resps": line["target"]} for line in lines])
    scored(LMMS_VIDEO_MME, root, tmp_path / "before", "--set", "rules=lmms_eval")
    scored(better, root, tmp_path / "after", "--set", "rules=lmms_eval")
    compare.main([str(tmp_path / "before"), str(tmp_path / "after"), "--out", str(tmp_path / "cmp"), "--draws", "100"])
    group = json.loads((tmp_path / "cmp" / "summary.json").read_text())["benchmarks"]["video_mme_lmms_eval"]
    strict = {arm: numbers["strict"] for arm, numbers in group["arms"].items()}
    assert strict == {"before": pytest.approx(5 / 9, abs=1e-4), "after": 1.0}
    assert (group["n"], group["clusters"]) == (9, 3)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["gone.jsonl"], "gone.jsonl: no such file; give the predictions that lmms-eval or VLMEvalKit wrote"),
        ([str(LMMS_VIDEO_MME), "--root", "elsewhere"], "missing: elsewhere/videomme/test-00000-of-00001.parquet; get"),
        ([str(LMMS_VIDEO_MME), "--set", "rules=kit"], "expected 'official', 'lmms_eval' or 'vlmevalkit', got 'kit'"),
        ([str(LMMS_LVBENCH)], ":1: belongs to none of the questions; give the benchmark that was evaluated"),
    ],
)
def test_a_wrong_input_exits_with_2_and_names_the_fix(arguments, problem, root, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--benchmark", "video_mme", "--root", str(root), "--out", "out", *arguments]
    monkeypatch.setattr(sys, "argv", ["score.py", *given])
    with pytest.raises(SystemExit) as left:
        run_command(score.main)
    assert left.value.code == 2
    assert problem in capsys.readouterr().err.splitlines()[0]
    assert not (tmp_path / "out").exists()


def test_accuracies_follow_their_definitions() -> None:
    keys: tuple[str, ...] = ("correct", "parsed", "counted", "bare")
    rows = [(1, 1, 1, 1), (0, 1, 1, 0), (0, 0, 1, 0), (0, 0, 0, 0)]
    lines: list[dict[str, bool]] = [dict(zip(keys, map(bool, row), strict=True)) for row in rows]
    assert accuracy(lines) == {"n": 4, "official": 1 / 3, "strict": 0.25, "no_answer": 0.5, "format": 0.25}
    assert accuracy([])["strict"] == 0


def test_a_question_of_several_labels_counts_under_each() -> None:
    verdict = {"correct": True, "parsed": True, "counted": True, "bare": True}
    lines = [
        verdict | {"categories": {"kind": ["a", "b"]}},
        verdict | {"categories": {"kind": ["b"]}, "correct": False},
    ]
    assert {label: numbers["strict"] for label, numbers in breakdown(lines)["kind"].items()} == {"a": 1.0, "b": 0.5}


@pytest.mark.parametrize(
    ("seconds", "label"),
    [(120.0, "up to 2 min"), (121.0, "2 to 10 min"), (3600.0, "30 to 60 min"), (4e3, "over 60 min")],
)
def test_a_benchmark_that_names_no_durations_is_broken_down_by_seconds_of_stream(seconds, label) -> None:
    assert categories_of({"categories": {}, "stream_seconds": seconds}) == {"duration": [label]}
    assert categories_of({"categories": {"duration": ["long"]}, "stream_seconds": seconds}) == {"duration": ["long"]}
    assert categories_of({"categories": {}}) == {}
