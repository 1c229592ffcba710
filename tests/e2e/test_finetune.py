"""Fine-tuning by its entry point: resumed bit for bit, the same on ranks, accumulated or in a batch, without noise.

A random thinker of two layers; six videos of eight seconds, so ten steps of two samples take more than three epochs.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.ranks import ROOT, command, free_port
from support.tiny_run import SCRIPT, Run, given, tune, write_manifest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def assert_same_run(first: Run, second: Run) -> None:
    """Bit for bit: what was measured at every step, and the adapter."""
    assert [line["step"] for line in first.lines] == list(range(1, 11))
    assert first.lines == second.lines
    assert torch.equal(first.adapter, second.adapter)


@pytest.mark.parametrize(
    ("stage", "ranks", "accumulation", "recompute"),
    [("zero0", 0, 2, "chunk"), ("zero2", 0, 2, "layer"), ("zero2", 2, 1, "chunk"), ("zero0", 0, 1, "by_base")],
    ids=str,
)
def test_a_resumed_run_equals_an_unbroken_run(folder, stage, ranks, accumulation, recompute) -> None:
    name = f"{stage}-{ranks}-{recompute}"
    base = recompute == "by_base"
    recompute = "chunk" if base else recompute
    settings = (
        *(("memory.selection_from=base", "tuning.selection.softening=hard", "tuning.overlap_every=3") if base else ()),
        *(("tuning.lora.modules_to_save=[visual_projector, audio_projector]",) if base or ranks else ()),
        f"train.deepspeed=deepspeed/{stage}.json",
        f"train.gradient_accumulation_steps={accumulation}",
        f"tuning.recompute={recompute}",
    )
    whole = tune(folder, name, *settings, ranks=ranks)
    assert {line["slots"] for line in whole.lines} == {8, 4, -1}
    assert len({line["learning_rate"] for line in whole.lines}) == 10
    kept = folder / "runs" / f"{name}.whole"
    shutil.move(whole.path, kept)
    shutil.copytree(kept, whole.path)  # as a crash after step 7 leaves it, in the middle of a line
    shutil.rmtree(whole.path / "checkpoint-10")
    shutil.rmtree(whole.path / "adapter")
    lines = (kept / "metrics.jsonl").read_text().splitlines(keepends=True)
    (whole.path / "metrics.jsonl").write_text("".join(lines[:7]) + lines[7][:20])
    resumed = tune(folder, name, *settings, "--resume", "auto", ranks=ranks)
    assert "step 6 of 10" in resumed.ended.outputs[0]
    assert "step 5 of 10" not in resumed.ended.outputs[0]
    unbroken = Run(path=kept, ended=whole.ended)
    measured = [line["step"] for line in unbroken.lines if "selection_overlap" in line]
    assert measured == ([3, 6, 9, 10] if base else [10])
    assert all(("selector" in line) == (base and line["slots"] > 0) for line in unbroken.lines)
    assert_same_run(resumed, unbroken)
    assert [earlier["steps"] for earlier in resumed.record["earlier"]] == [10]
    again = tune(folder, name, *settings, "--resume", "auto", ranks=ranks)  # nothing is left to do
    assert not re.search(r"^step \d", again.ended.outputs[0], re.MULTILINE)
    assert_same_run(again, unbroken)


ZERO2 = "train.deepspeed=deepspeed/zero2.json"
SGD = ("train.optim=sgd", "train.max_steps=6", "train.max_grad_norm=0", ZERO2)


def test_ranks_accumulation_and_batches_mean_the_same(folder) -> None:
    """Plain SGD, so that a gradient scaled twice or not at all would show; two epochs of three steps."""
    two = tune(folder, "ranks", *SGD, ranks=2)
    accumulated = tune(folder, "accumulated", *SGD, "train.gradient_accumulation_steps=2")
    still = (*SGD, "tuning.lora.dropout=0")
    small = tune(folder, "accumulated-still", *still, "train.gradient_accumulation_steps=2")
    batch = tune(folder, "batch", *still, "train.per_device_train_batch_size=2")
    for first, second in ((two, accumulated), (small, batch)):
        torch.testing.assert_close(first.losses, second.losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(first.adapter, second.adapter, rtol=1e-5, atol=1e-7)
    assert float((two.losses - small.losses).abs().max()) > 1e-4  # dropout is active, and the same on any rank


def test_the_evaluation_after_training_uses_all_ranks(folder) -> None:
    """Each rank answers its share of every arm; the first one summarises, with full memory last.

    ZeRO-3 alone, which must gather the weights before; the others evaluate what each rank holds.
    """
    rows = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "few.jsonl").write_text("".join(rows[:3]))  # two videos for one rank and one for the other
    benchmark = f"evaluate.benchmarks=[{{name: recall, root: {folder}, split: few}}]"
    steps = ("train.max_steps=1", "evaluate.after_training=true", "evaluate.max_new_tokens=4", benchmark)
    run = tune(folder, "evaluated", *steps, "train.deepspeed=deepspeed/zero3.json", ranks=2)
    first, second = run.ended.outputs
    assert "shard 1/2 is done" in second
    assert "report: " in first
    assert "report: " not in second
    arms = list(dict.fromkeys(line.partition(":")[0] for line in first.splitlines() if ": recall" in line))
    assert arms == ["blind", "training_free", "tuned", "audio_only", "vision_only", "full_memory", "tuned_full_memory"]
    summaries = [json.loads(path.read_text()) for path in sorted((run.path / "eval").glob("*/summary.json"))]
    assert len({entry["n"] for summary in summaries for entry in summary["benchmarks"].values()}) == 1


def test_the_launcher_starts_two_ranks_that_train_alike_without_noise(folder) -> None:
    forked = tune(folder, "forked", "train.max_steps=2", ZERO2, ranks=2)
    output = launched(folder, "launched", "train.max_steps=2", ZERO2, ranks=2)
    run = Run(path=folder / "runs" / "launched", ended=forked.ended)
    assert run.lines == forked.lines
    assert torch.equal(run.adapter, forked.adapter)
    assert_no_noise(output)
    assert output.count("step 1 of 2: loss ") == 1  # only rank 0 reports


def launched(folder: Path, name: str, *arguments: str, ranks: int) -> str:
    """Output of `deepspeed --num_gpus N train/finetune.py` without the lines of the launcher."""
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks)]
    ended = subprocess.run(
        [*launcher, "--master_port", str(free_port()), str(ROOT / SCRIPT), *given(folder, name, *arguments)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout
    own = ("[launch.py:", "[runner.py:", "[real_accelerator.py:")
    return "\n".join(line for line in ended.stdout.splitlines() if not any(mark in line for mark in own))


def assert_no_noise(output: str) -> None:
    """Nothing but progress and results: no warning, no logged dict, no progress bar."""
    for line in output.splitlines():
        assert line == "" or line.startswith(("preflight: ", "step ", "adapter: ")), output


def test_unreadable_videos_are_counted_and_named_on_any_rank(folder) -> None:
    for ranks in (0, 2):
        settings = ("data.train=broken.jsonl", "data.max_failures=0.2", "train.max_steps=3", f"train.seed={ranks}")
        run = tune(folder, f"broken-{ranks}", *settings, "train.gradient_accumulation_steps=2", ranks=ranks)
        assert_no_noise(run.ended.outputs[0])
        assert [line["failed_samples"] for line in run.lines][-1] == 1
        ((failed),) = run.record["failed_samples"]
        assert (failed["id"], failed["reason"]) == ("broken", "unreadable")


@pytest.mark.parametrize(("name", "reason"), [("broken", "unreadable"), ("silent", "no_audio")])
def test_too_many_unreadable_videos_end_the_run_with_2(folder, name, reason) -> None:
    run = folder / "runs" / f"failing-{name}"
    settings = (f"data.train={name}.jsonl", "data.max_failures=0.1", "train.max_steps=6", "--skip-preflight")
    settings += ("stream.tracks=require_both",)
    arguments = given(folder, run.name, *settings)
    (output,) = command(SCRIPT, arguments, folder, fails=True).outputs
    problem, verdict = [line for line in output.splitlines() if not line.startswith("step ")]
    assert problem.startswith(f"{name}: {reason}; ")
    assert verdict == (
        "1 of 6 samples failed, more than max_failures = 0.1; fix or remove them (omnimem check lists all), "
        "or raise data.max_failures"
    )
    record = json.loads((run / "run.json").read_text())
    assert [failed["id"] for failed in record["failed_samples"]] == [name]


def test_a_manifest_with_a_stream_without_answers_is_refused(folder) -> None:
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    rows[1]["messages"] = [message for message in rows[1]["messages"] if message["role"] == "user"]
    write_manifest(folder / "silent-row.jsonl", rows)
    arguments = given(folder, "nothing", "data.train=silent-row.jsonl")
    (output,) = command(SCRIPT, arguments, folder, fails=True).outputs
    assert output == (
        "silent-row.jsonl:2 messages: no answer to learn; add an assistant message (loss: true), or remove the line\n"
    )


def test_a_folder_in_use_is_refused_continued_or_moved_as_asked(folder) -> None:
    steps = ("train.max_steps=1", "train.save_steps=5")
    fresh = tune(folder, "used", *steps, "--resume", "auto")  # nothing to resume: from the first step
    assert [line["step"] for line in fresh.lines] == [1]
    (output,) = command(SCRIPT, given(folder, "used", *steps), folder, fails=True).outputs
    assert output == (
        "runs/used already exists; continue it with --resume auto, give the run another name with name=..., "
        "or start again with --overwrite, which moves it to runs/used.1\n"
    )
    shutil.rmtree(fresh.path / "checkpoint-1")
    again = tune(folder, "used", *steps, "--resume", "auto")  # no checkpoint left: from the first step, nothing twice
    assert [line["step"] for line in again.lines] == [1]
    assert len(again.record["earlier"]) == 1
    restarted = tune(folder, "used", *steps, "--overwrite")
    assert restarted.record["earlier"] == []
    assert (folder / "runs" / "used.1" / "adapter").is_dir()
    assert torch.equal(restarted.adapter, again.adapter)
