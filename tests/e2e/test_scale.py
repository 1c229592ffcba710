"""One run on any number of ranks: long and short streams at every ZeRO stage, other ranks, two nodes, bf16.

A random thinker; three videos of 5 chunks, one of 2, one with audio only, and one that cannot be read.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.ranks import ROOT, free_port, start
from support.tiny_run import SCRIPT, Run, given, tune, write_manifest

import omnimem.training.trainer
from omnimem.recall.renderer import write_mp4
from omnimem.recall.worlds import draw_world
from omnimem.run import RunError, write_json
from omnimem.training.portable import FACTS, Layout, refuse_other_batch

MIXED = ("data.train=mixed.jsonl", "data.max_failures=0.2")
SGD = ("train.optim=sgd", "train.max_grad_norm=0.5", "train.max_steps=3")
PROJECTORS = "tuning.lora.modules_to_save=[visual_projector, audio_projector]"
SIX = ("train.max_steps=6", "train.save_steps=3", PROJECTORS)
ACCUMULATED = "train.gradient_accumulation_steps=2"


@pytest.fixture(scope="module")
def folder(folder: Path) -> Path:
    """Longer videos, and a manifest of streams of different kinds."""
    for number in (0, 2, 4):
        write_mp4(draw_world(number, 20), folder / f"{number}.mp4")
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    rows[3] |= {"video": None, "audio": "3.mp4"}
    rows[5] |= {"video": "silent.mp4"}
    write_manifest(folder / "mixed.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def accumulated(folder: Path) -> Run:
    """The same global batches on one process, without DeepSpeed."""
    return tune(folder, "accumulated", *MIXED, *SGD, ACCUMULATED)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("stage", [None, "zero0", "zero1", "zero2", "zero3"])
def test_ranks_with_unequal_streams_equal_one_rank_at_every_stage(folder, accumulated, stage) -> None:
    """Clipped, and plain SGD, so that a norm or a gradient of another size would show."""
    engine = () if stage is None else (f"train.deepspeed=deepspeed/{stage}.json",)
    two = tune(folder, f"ranks-{stage}", *MIXED, *SGD, *engine, ranks=2)
    assert [line["samples"] for line in two.lines] == [line["samples"] for line in accumulated.lines]
    torch.testing.assert_close(two.losses, accumulated.losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(two.adapter, accumulated.adapter, rtol=1e-5, atol=1e-7)
    assert two.record["failed_samples"] == []
    assert two.record["one_track_samples"]["film5"] == "video"


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_ranks_choose_by_the_untuned_model_as_one_rank_does(folder, stage) -> None:
    """Ranks need the layers at different times in the second pass too, and all of them measure the drift together.

    Projectors are trained too, though a stream of some step has no audio, and one no frames.
    """
    hard = ("memory.selection_from=base", "tuning.selection.softening=hard", "tuning.overlap_every=1")
    base = (*MIXED, *SGD, PROJECTORS, *hard)
    one = tune(folder, f"chosen-one-{stage}", *base, ACCUMULATED)
    two = tune(folder, f"chosen-{stage}", *base, f"train.deepspeed=deepspeed/{stage}.json", ranks=2)
    torch.testing.assert_close(two.losses, one.losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(two.adapter, one.adapter, rtol=1e-5, atol=1e-7)
    overlaps = [[line["selection_overlap"] for line in run.lines] for run in (one, two)]
    assert overlaps[0] == overlaps[1]
    assert two.record["selection_overlap"] == list(overlaps[1][-1].values())[1:]


def engine(ranks: int, stage: str | None) -> tuple[str, ...]:
    """Settings for two samples per step."""
    zero = () if stage is None else (f"train.deepspeed=deepspeed/{stage}.json",)
    return (*zero, *(() if ranks == 2 else (ACCUMULATED,)))


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> Run:
    """Six steps of AdamW on one process."""
    return tune(folder, "unbroken", *SIX, *engine(0, None))


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("before", "after"),
    [((2, "zero2"), (0, None)), ((0, None), (2, "zero3")), ((2, "zero3"), (2, "zero0")), ((0, "zero0"), (2, None))],
    ids=str,
)
def test_a_run_resumes_with_another_number_of_ranks_or_another_stage(folder, unbroken, before, after) -> None:
    name = "moved-" + "-".join(map(str, (*before, *after)))
    tune(folder, name, *SIX, *engine(*before), ranks=before[0])
    checkpoint = f"runs/{name}/checkpoint-3"
    moved = tune(folder, name, *SIX, *engine(*after), "--resume", checkpoint, ranks=after[0])
    assert "step 3 of 6" not in moved.ended.outputs[0]
    assert [line["samples"] for line in moved.lines] == [line["samples"] for line in unbroken.lines]
    torch.testing.assert_close(moved.losses, unbroken.losses, rtol=1e-5, atol=0)


@pytest.fixture(scope="module")
def zero1_optimizer(folder: Path) -> None:
    """ZeRO-1 with an optimizer that DeepSpeed makes."""
    settings = json.loads((ROOT / "configs/deepspeed/zero1.json").read_text())
    auto = dict.fromkeys(("lr", "weight_decay", "betas", "eps"), "auto")
    settings["optimizer"] = {"type": "AdamW", "params": {**auto, "torch_adam": True}}
    (folder / "deepspeed").mkdir(exist_ok=True)
    (folder / "deepspeed" / "zero1_optimizer.json").write_text(json.dumps(settings))


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("zero1_optimizer")
@pytest.mark.parametrize(("ranks", "stage"), [(0, None), (0, "zero1_optimizer"), (2, "zero2"), (2, "zero3")], ids=str)
def test_a_resumed_run_with_another_learning_rate_has_it_from_its_next_step_on(folder, ranks, stage) -> None:
    """A rate of nearly 0 shows that the optimizer follows too: the weights stay those of the checkpoint.

    The logged rate is that of the step, also where an engine moves the schedule before the step is logged.
    """
    shares = [0, 1 / 3, 2 / 3]  # of the warm-up
    name, settings = f"rate-{ranks}-{stage}", (*engine(ranks, stage), "train.max_steps=3", "train.save_steps=2")
    warming = ("train.lr_scheduler_type=cosine", "train.warmup_steps=3")
    trained = tune(folder, name, *settings, *warming, ranks=ranks)
    assert [line["learning_rate"] for line in trained.lines] == pytest.approx([0.01 * share for share in shares])
    tensors = load_file(trained.path / "checkpoint-2" / "adapter_model.safetensors")
    begun = torch.cat([tensors[key].reshape(-1) for key in sorted(tensors)])
    assert (trained.adapter - begun).abs().max() > 1e-3
    changed = ("train.learning_rate=1e-12", "--resume", f"runs/{name}/checkpoint-2")
    slow = tune(folder, name, *settings, *warming, *changed, ranks=ranks)
    assert "train.learning_rate: 1e-12 from step 3 on, 0.01 until then" in slow.ended.outputs[0]
    rates = [0.01 * shares[0], 0.01 * shares[1], 1e-12 * shares[2]]
    assert [line["learning_rate"] for line in slow.lines] == pytest.approx(rates, rel=1e-6, abs=0)
    torch.testing.assert_close(slow.adapter, begun, rtol=0, atol=1e-9)
    assert slow.record["changed_settings"] == {"after_step": 2, "train": {"learning_rate": [0.01, 1e-12]}}


def test_another_number_of_samples_per_step_is_refused_with_the_accumulation_that_fits(tmp_path) -> None:
    layout = Layout(ranks=2, stage=2, batch=1, accumulated=2, optimizer="adamw_torch", precision="fp32")
    write_json(tmp_path / FACTS, {"layout": asdict(layout), "step": 1})
    refuse_other_batch(tmp_path, {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}, ranks=1)
    with pytest.raises(RunError, match=r"2 ranks x 1 x 2 .* set train\.gradient_accumulation_steps=4$"):
        refuse_other_batch(tmp_path, {"per_device_train_batch_size": 1}, ranks=1)
    with pytest.raises(RunError, match=r"whose product divides 4$"):
        refuse_other_batch(tmp_path, {"per_device_train_batch_size": 1}, ranks=3)


def stick_on_the_second_rank() -> None:
    """The second rank hangs in its second stream, in the process that calls this."""
    original, streams = omnimem.training.trainer.streamed_loss, []

    def stuck(*given: Any, **options: Any) -> Any:
        streams.append(None)
        if os.environ["RANK"] == "1" and len(streams) == 2:
            time.sleep(600)
        return original(*given, **options)

    omnimem.training.trainer.streamed_loss = stuck


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_step_that_takes_too_long_ends_every_rank_with_1_and_names_their_places(folder) -> None:
    settings = ("train.max_steps=3", "train.step_timeout_seconds=12", "train.deepspeed=deepspeed/zero2.json")
    ended = start(SCRIPT, given(folder, "stuck", *settings), folder, ranks=2, first=stick_on_the_second_rank).end()
    assert ended.codes == (1, 1), ended.outputs
    line = json.loads((folder / "runs" / "stuck" / "metrics.jsonl").read_text().splitlines()[0])
    known = {f"film{number}" for number in range(6)} - set(line["samples"])
    cure = "for more than 12 s; check the sample, or raise train.step_timeout_seconds"
    places = ("in backward, the update, or waiting for other ranks", "in its streams")
    found = ([row for row in output.splitlines() if cure in row] for output in ended.outputs)
    for number, (rows, place) in enumerate(zip(found, places, strict=True)):
        (row,) = rows  # more lines may follow once a peer has ended
        rank, sample, where = row.split(", ", 2)
        assert rank == f"rank {number}"
        assert sample.removeprefix("step 2: ") in known
        assert where.startswith(f"{place} {cure}")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_nodes_of_a_hostfile_equal_two_ranks_of_one(folder) -> None:
    """A launch.sh and a `deepspeed` for each node, on loopback, over one folder."""
    settings = ("train.max_steps=2", "train.deepspeed=deepspeed/zero2.json")
    shutil.copy(ROOT / "launch.sh", folder)
    (folder / "train").symlink_to(ROOT / "train")
    (folder / "nodes").write_text("first slots=1\nsecond slots=1\n")
    given(folder, "nodes")
    join = ("--hostfile", "nodes", "--no_ssh", "--master_addr", "127.0.0.1", "--master_port", str(free_port()))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    nodes = [
        subprocess.Popen(
            ["./launch.sh", "finetune", "nodes.yaml", *settings, *join, "--node_rank", str(number)],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    try:
        outputs = [node.communicate(timeout=300)[0] for node in nodes]
    finally:
        for node in nodes:
            node.send_signal(signal.SIGTERM)
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    assert ["step 2 of 2" in each for each in outputs] == [True, False]  # only rank 0 reports
    forked = tune(folder, "one-node", *settings, ranks=2)
    run = replace(forked, path=folder / "runs" / "nodes")
    assert run.lines == forked.lines
    assert torch.equal(run.adapter, forked.adapter)
    assert run.record["world_size"] == 2


HALF = ("train.bf16=true", "model.dtype=bfloat16")


@pytest.fixture(scope="module")
def half(folder: Path) -> Run:
    """As `accumulated`, in bf16."""
    return tune(folder, "half", *MIXED, *SGD, ACCUMULATED, *HALF)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("stage", ["zero0", "zero2", "zero3"])
def test_bf16_on_two_ranks_learns_the_same_as_on_one(folder, half, accumulated, stage) -> None:
    """The difference is far smaller (160 times, measured) than that of bf16 to float32."""
    two = tune(folder, f"half-{stage}", *MIXED, *SGD, *HALF, f"train.deepspeed=deepspeed/{stage}.json", ranks=2)
    torch.testing.assert_close(two.losses, half.losses, rtol=1e-3, atol=0)
    rounding = (half.adapter - accumulated.adapter).norm()
    assert 0 < 20 * float((two.adapter - half.adapter).norm()) < float(rounding)


MODES = {
    "horizon": ("tuning.horizon=1",),
    "states": ("tuning.gradient=states",),
    "released": ("tuning.gradient=released", "tuning.selection.softening=hard"),
    "paper": ("tuning.gradient=paper", "tuning.stop_layer=1", "tuning.selection.softening=hard"),
}
MODES_SGD = ("train.optim=sgd", "train.max_steps=3", "train.max_grad_norm=0", "train.deepspeed=deepspeed/zero2.json")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_equal_one_that_accumulates_and_the_run_records_its_policy(folder, mode) -> None:
    """Every adapter has a gradient in every step, or the ranks would wait for each other; dropout is on."""
    two = tune(folder, f"{mode}-2", *MODES_SGD, *MODES[mode], ranks=2)
    one = tune(folder, f"{mode}-1", *MODES_SGD, *MODES[mode], "train.gradient_accumulation_steps=2")
    torch.testing.assert_close(two.losses, one.losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(two.adapter, one.adapter, rtol=1e-5, atol=1e-7)
    same = mode in ("horizon", "states")
    assert (one.record["policy_in_training"] == "the one used in evaluation") == same
    if not same:
        assert "chunks run layers 0 to 0" in one.record["policy_in_training"]
