"""Validation by the entry point: a killed run keeps its best checkpoint and its early stopping, on any engine."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.ranks import start
from support.tiny_run import SCRIPT, Run, given, tune

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

# Accuracy stays 0: step 2 is the best, and the validations of steps 4 and 6 find nothing better.
SETTINGS = (
    "data.validation=0.34",
    "train.eval_steps=2",
    "train.save_steps=5",
    "train.save_total_limit=1",
    "train.metric_for_best_model=accuracy",
    "train.early_stopping_patience=2",
    "train.load_best_model_at_end=true",
    "--skip-preflight",
)


def killed_after(folder: Path, name: str, checkpoint: int) -> None:
    running = start(SCRIPT, given(folder, name, *SETTINGS), folder)
    limit = time.monotonic() + 100
    while not (folder / "runs" / name / f"checkpoint-{checkpoint}").is_dir():
        assert running.processes[0].is_alive(), running.output
        assert time.monotonic() < limit
        time.sleep(0.01)
    os.kill(running.processes[0].pid or 0, signal.SIGKILL)
    running.processes[0].join()


def stopping(run: Run) -> dict[str, object]:
    """What the last checkpoint knows of the best one, and of early stopping."""
    state = json.loads((run.path / "checkpoint-6" / "trainer_state.json").read_text())
    return {
        "best": [state[key] for key in ("best_metric", "best_global_step")],
        "place": Path(state["best_model_checkpoint"]).name,
        "counter": state["stateful_callbacks"]["EarlyStopping"]["attributes"],
        "validations": [line for line in run.lines if "validation" in line],
    }


def test_a_killed_run_keeps_its_best_checkpoint_and_its_early_stopping(folder) -> None:
    whole = tune(folder, "whole", *SETTINGS)
    killed_after(folder, "killed", 5)
    resumed = tune(folder, "killed", *SETTINGS, "--resume", "auto")
    assert "step 6 of 10" in resumed.ended.outputs[0]
    assert "step 5 of 10" not in resumed.ended.outputs[0]
    assert resumed.lines == whole.lines
    assert [line["step"] for line in whole.lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert stopping(resumed) == stopping(whole)
    assert stopping(whole)["best"] == [0.0, 2]
    assert stopping(whole)["place"] == "checkpoint-2"
    for run in (whole, resumed):
        assert sorted(path.name for path in run.path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]
        assert run.record["best_checkpoint"] == {"step": 2, "value": 0.0, "metric": "accuracy"}
        assert run.record["adapter_step"] == 2
        best = load_file(run.path / "checkpoint-2" / "adapter_model.safetensors")
        assert torch.equal(run.adapter, torch.cat([best[name].reshape(-1) for name in sorted(best)]))
    # a run that was stopped early takes no further step; with more patience it goes on
    shutil.rmtree(resumed.path / "adapter")
    again = tune(folder, "killed", *SETTINGS, "--resume", "auto")
    assert again.lines == whole.lines
    assert torch.equal(again.adapter, whole.adapter)
    longer = tune(folder, "killed", *SETTINGS, "train.early_stopping_patience=3", "--resume", "auto")
    assert [line["step"] for line in longer.lines if "loss" in line] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_ranks_share_the_validation_and_zero3_sets_the_best_weights(folder) -> None:
    engine = ("train.deepspeed=deepspeed/zero3.json",)
    alone = tune(folder, "alone", *SETTINGS, "train.gradient_accumulation_steps=2")
    shared = tune(folder, "shared", *SETTINGS, *engine, ranks=2)
    values = [[line["validation"] for line in run.lines if "validation" in line] for run in (alone, shared)]
    assert len(values[0]) == len(values[1]) == 3
    for one, other in zip(*values, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert shared.record["adapter_step"] == 2
    assert torch.allclose(shared.adapter, alone.adapter, atol=1e-5)
    # every logged step says how large, fast and heavy it was, at both stages
    steps = [[line for line in run.logged if "loss" in line] for run in (alone, shared)]
    for one, other in zip(*steps, strict=True):
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        for line in (one, other):
            assert 0 < line["speed"]["decoding"] < 1
            assert line["speed"]["tokens_per_second"] > line["speed"]["samples_per_second"] > 0
            assert line["memory"]["host_bytes"] > 1e6
            assert {"learning_rate", "loss_at"} <= set(line)
    assert re.search(r"step 6 of 10: loss [\d.]+, mean [\d.]+, .*rate [\d.e-]+, \d\d:\d\d left", alone.ended.outputs[0])
