"""Four benchmarks in their official layouts, with real videos, through a tiny model: three arms and the report."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import finished_run, thinkers
from support import task_layouts as layouts

from omnimem.commands import compare, evaluate
from omnimem.evaluation import EvaluateOptions
from omnimem.tasks import LVBenchOptions, LVOmniBenchOptions, OwnOptions, StreamingBenchOptions, VideoMMEOptions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ARMS = ("full_memory", "training_free", "tuned")
QUESTIONS = {
    "video_mme_subtitles": 9,
    "lvbench_lmms_eval": 3,
    "lvomnibench": 3,
    "streamingbench": 8,
    "streamingbench_sqa_60s": 2,
    "mine": 3,
}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a tiny run has been evaluated and compared."""
    folder = tmp_path_factory.mktemp("evaluated")
    base = thinkers.write_folder(folder / "model", rates="tiny")
    benchmarks = (
        VideoMMEOptions(root=str(layouts.video_mme(folder / "video_mme")), subtitles=True),
        LVBenchOptions(root=str(layouts.lvbench(folder / "lvbench")), rules="lmms_eval"),
        LVOmniBenchOptions(root=str(layouts.lvomnibench(folder / "lvomnibench"))),
        StreamingBenchOptions(root=str(layouts.streamingbench(folder / "streamingbench"))),
        StreamingBenchOptions(root=str(folder / "streamingbench"), parts=("sqa",), context="60s"),
        OwnOptions(root=str(layouts.own(folder / "own")), title="mine"),
    )
    asked = EvaluateOptions(benchmarks=benchmarks, max_new_tokens=2, probes=False)
    run = finished_run.write_run(folder / "runs" / "x", base, replace(finished_run.config_of(base), evaluate=asked))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        evaluate.main(["--config", str(run.config), *(word for arm in ARMS for word in ("--arm", arm))])
        compare.main([str(run.path), "--out", "compare", "--draws", "100"])
    return folder


def lines(folder: Path, arm: str, label: str) -> list[dict[str, Any]]:
    path = folder / "runs" / "x" / "eval" / arm / f"{label}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def summary(folder: Path, arm: str) -> dict[str, Any]:
    return json.loads((folder / "runs" / "x" / "eval" / arm / "summary.json").read_text())["benchmarks"]


@pytest.mark.parametrize("arm", ARMS)
def test_every_question_of_every_benchmark_is_answered_by_every_arm(arm, evaluated) -> None:
    assert {label: entry["n"] for label, entry in summary(evaluated, arm).items()} == QUESTIONS
    for label, count in QUESTIONS.items():
        answered = lines(evaluated, arm, label)
        assert len({line["id"] for line in answered}) == count
        assert not any(line.get("failed") for line in answered)


def test_a_question_at_a_time_stamp_has_seen_and_heard_nothing_later(evaluated) -> None:
    stamped = lines(evaluated, "full_memory", "streamingbench")
    assert {line["at"] for line in stamped} == {3.0, 4.0, 5.0, 6.0, 7.0, 8.0}
    for line in stamped:
        assert line["frames"] <= line["at"] + 1
        assert line["audio_seconds"] <= line["at"]
        assert line["stream_seconds"] <= line["at"]


def test_questions_cut_from_one_video_count_as_one_cluster(evaluated) -> None:
    minute = lines(evaluated, "tuned", "streamingbench_sqa_60s")
    assert [line["stream"] for line in minute] == ["sample_4_sqa@3", "sample_4_sqa@7"]
    assert {line["video"] for line in minute} == {"sample_4_sqa"}
    compared = json.loads((evaluated / "compare" / "summary.json").read_text())["benchmarks"]
    assert compared["streamingbench_sqa_60s"]["clusters"] == 1
    assert compared["streamingbench"]["clusters"] == 4


def test_the_arms_are_compared_on_all_benchmarks(evaluated) -> None:
    compared = json.loads((evaluated / "compare" / "summary.json").read_text())["benchmarks"]
    assert {label: group["n"] for label, group in compared.items()} == QUESTIONS
    assert all({"training_free", "tuned", "full_memory"} <= set(group["arms"]) for group in compared.values())
    assert (evaluated / "compare" / "report.html").stat().st_size > 10_000
