"""train/evaluate.py: ranks, helpers and shards write what one process writes; results of two settings never mix."""

import json
import os
import random
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.evaluations import dying
from support.finished_run import config_of, write_adapter, write_run
from support.ranks import command, start
from support.thinkers import write_folder

from omnimem.cli.arms import named
from omnimem.cli.workers import LocalWorkers
from omnimem.evaluation import EvaluationError, results
from omnimem.evaluation.results import MEASURED
from omnimem.recall.renderer import write_mp4
from omnimem.recall.worlds import draw_world
from omnimem.run import RunFolder

SCRIPT = "train/evaluate.py"
ARMS = ("--arm", "training_free", "--arm", "tuned", "--arm", "blind")
CONFIG = ("--config", "runs/x/config.yaml", "train={}", "evaluate.decoders=0", "evaluate.batch_size=1")
VIDEOS, ASKED = 5, 2


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run and a small recall set."""
    folder = tmp_path_factory.mktemp("place")
    base = write_folder(folder / "model", rates="tiny")
    write_run(folder / "runs" / "x", base, config_of(base))
    lines = []
    for number in range(VIDEOS):
        write_mp4(draw_world(number, 8), folder / f"video{number}.mp4")
        turns = [{"role": "user", "content": f"what {n} ?"} for n in range(ASKED)]
        answers = [{"role": "assistant", "content": "red"}] * ASKED
        messages = [turn for pair in zip(turns, answers, strict=True) for turn in pair]
        lines.append({"id": f"s{number}", "video": f"video{number}.mp4", "audio": None, "messages": messages})
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def here(place: Path, tmp_path: Path) -> Path:
    """A copy for one test."""
    shutil.copytree(place / "runs", tmp_path / "runs")
    return tmp_path


@pytest.fixture(scope="module")
def alone(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of one process."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copytree(place / "runs", folder / "runs")
    command(SCRIPT, [*CONFIG, *ARMS, benchmark(place)], folder)
    return found(folder)


def benchmark(place: Path) -> str:
    return f"evaluate.benchmarks=[{{name: recall, root: {place}, split: test}}]"


def found(folder: Path) -> dict[str, Any]:
    """Lines and summaries of every arm, without times; no other files are allowed."""
    arms = {}
    for arm in sorted((folder / "runs" / "x" / "eval").iterdir()):
        lines = [json.loads(line) for line in (arm / "recall.jsonl").read_text().splitlines()]
        summary = json.loads((arm / "summary.json").read_text())["benchmarks"]["recall"]
        summary.pop("cost")
        expected = {"recall.jsonl", "summary.json", "setting.json"} | ({"trace.json"} if arm.name != "blind" else set())
        assert {path.name for path in arm.iterdir()} == expected
        kept = [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]
        trace = arm / "trace.json"
        arms[arm.name] = kept, summary, json.loads(trace.read_text()) if trace.is_file() else None
    return arms


def test_one_process_answers_every_question_of_every_arm(alone) -> None:
    assert set(alone) == {"training_free", "tuned", "blind"}
    for lines, summary, _ in alone.values():
        assert [line["id"] for line in lines] == [f"s{video}#{n}" for video in range(VIDEOS) for n in range(ASKED)]
        assert summary["n"] == VIDEOS * ASKED
    assert [a["prediction"] for a in alone["tuned"][0]] != [b["prediction"] for b in alone["training_free"][0]]


def test_ranks_of_the_launcher_share_the_work(place, here, alone) -> None:
    ended = command(SCRIPT, [*CONFIG, *ARMS, benchmark(place)], here, ranks=2)
    assert found(here) == alone
    assert "tuned: recall" in ended.outputs[0]
    assert "shard 1/2 is done; every question has been asked" in ended.outputs[1]


def test_shards_started_by_hand_are_merged_by_the_command_without_shard(place, here, alone) -> None:
    arguments = [*CONFIG, *ARMS, benchmark(place)]
    (first,) = command(SCRIPT, [*arguments, "--shard", "0/2"], here).outputs
    assert "shard 0/2 is done; 14 questions left for other shards" in first
    (second,) = command(SCRIPT, [*arguments, "--shard", "1/2"], here).outputs
    assert "shard 1/2 is done; every question has been asked" in second
    assert not list((here / "runs").rglob("summary.json"))
    command(SCRIPT, arguments, here)
    assert found(here) == alone


def test_helpers_of_a_process_share_the_work(place, here, alone) -> None:
    command(SCRIPT, [*CONFIG, *ARMS, benchmark(place), "evaluate.processes=2"], here)
    assert found(here) == alone


def test_the_output_of_a_failing_helper_is_reported() -> None:
    output = r"a helper process ended with exit code 2:\n.*nowhere.yaml: no such config"
    with pytest.raises(EvaluationError, match=output), LocalWorkers(2, ["--config", "nowhere.yaml"]).work() as shard:
        assert str(shard) == "0/2"


def kill_at(at: int, torn: bool) -> None:
    """Have this process end itself by SIGKILL at its n-th line."""
    results.append_line = dying(at, torn=torn, end=lambda: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.parametrize("trial", range(4))
def test_killed_at_a_random_question_and_started_again_the_results_are_the_same(place, here, alone, trial) -> None:
    drawn = random.Random(trial)
    arguments = [*CONFIG, *ARMS, benchmark(place)]
    at, torn = drawn.randrange(3 * VIDEOS * ASKED), drawn.random() < 0.5
    (code,) = start(SCRIPT, arguments, here, first=partial(kill_at, at, torn)).end().codes
    assert code == -signal.SIGKILL
    assert sum(path.read_bytes().count(b"\n") for path in (here / "runs").rglob("recall.jsonl")) == at
    command(SCRIPT, arguments, here)
    assert found(here) == alone


def test_results_of_other_settings_are_moved_away(place, here) -> None:
    arguments = [*CONFIG, "--arm", "tuned", "--arm", "training_free", benchmark(place)]
    command(SCRIPT, arguments, here)
    before = found(here)
    (here / "runs" / "x" / "adapter" / "sealed.json").unlink()
    write_adapter(place / "model", here / "runs" / "x" / "adapter", seed=5)
    (refused,) = command(SCRIPT, [*arguments, "--shard", "0/2"], here, fails=True).outputs
    assert "eval/tuned: made with another adapter; start the command without --shard once" in refused
    (output,) = command(SCRIPT, arguments, here).outputs
    assert "tuned: made with another adapter; moved to runs/x/eval_earlier/tuned.1" in output
    after = found(here)
    assert after["training_free"] == before["training_free"]
    assert after["tuned"][0] != before["tuned"][0]
    assert (here / "runs/x/eval_earlier/tuned.1/summary.json").is_file()
    (output,) = command(SCRIPT, [*arguments, "evaluate.max_new_tokens=2"], here).outputs
    assert output.count("made with another max_new_tokens; moved to") == 2


def test_a_checkpoint_is_evaluated_beside_the_final_adapter(place, here) -> None:
    arguments = [*CONFIG, "--arm", "tuned", benchmark(place)]
    command(SCRIPT, arguments, here)
    before = found(here)["tuned"]
    (output,) = command(SCRIPT, [*arguments, "--adapter", "runs/x/checkpoint-4"], here).outputs
    assert "moved" not in output
    after = found(here)
    assert after.pop("tuned") == before
    ((name, checkpoint),) = after.items()
    assert name == "tuned@checkpoint-4"
    assert checkpoint[0] != before[0]
    assert named("tuned", RunFolder(path=here / "runs" / "x"), here / "runs" / "x" / "adapter") == "tuned"
    write_adapter(place / "model", here / "other" / "adapter", seed=7)
    assert named("tuned", RunFolder(path=here / "runs" / "x"), here / "other" / "adapter").startswith("tuned@other-ada")
    assert named("training_free", RunFolder(path=here / "runs" / "x"), here / "other" / "adapter") == "training_free"


def test_another_benchmark_may_be_added_to_results(place, here) -> None:
    arguments = [*CONFIG, "--arm", "training_free"]
    command(SCRIPT, [*arguments, benchmark(place)], here)
    before = (here / "runs/x/eval/training_free/recall.jsonl").read_bytes()
    question = {"id": "q", "video": "video0.mp4", "question": "what ?", "options": ["a", "b"], "answer": "A"}
    (place / "questions.jsonl").write_text(json.dumps(question) + "\n")
    both = f"{benchmark(place)[:-1]}, {{name: own, root: {place}}}]"
    (output,) = command(SCRIPT, [*arguments, both], here).outputs
    assert "moved" not in output
    assert (here / "runs/x/eval/training_free/recall.jsonl").read_bytes() == before
    summary = json.loads((here / "runs/x/eval/training_free/summary.json").read_text())
    assert {label: entry["n"] for label, entry in summary["benchmarks"].items()} == {"recall": 10, "own": 1}


def test_shards_do_not_each_measure_a_budget(place, here) -> None:
    (here / "runs" / "x" / "budget.json").unlink()
    arguments = [*CONFIG, "--arm", "training_free", benchmark(place), "memory.budget={name: audio_visual}"]
    (refused,) = command(SCRIPT, [*arguments, "--shard", "1/2"], here, fails=True).outputs
    assert "runs/x/budget.json is missing, every shard would measure its own" in refused
    (refused,) = command(SCRIPT, [*arguments, "--shard", "2/2"], here, fails=True).outputs
    assert "shard 2 of 2 does not exist; they are numbered 0/2 to 1/2" in refused
