"""A command planted into a checkpoint, sealed again, never runs when the run resumes or is exported."""

import shutil
from pathlib import Path

import pytest
import torch
from support.planted import zipped
from support.ranks import command
from support.tiny_run import SCRIPT, given, tune

from omnimem.checksums import SEAL, seal

STEPS = ("train.max_steps=4", "train.save_steps=2", "--skip-preflight")
ENGINES = {
    "plain": ((), "optimizer.pt"),
    "zero2": (("train.deepspeed=deepspeed/zero2.json",), "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    "zero3": (("train.deepspeed=deepspeed/zero3.json",), "global_step2/zero_pp_rank_0_mp_rank_00_model_states.pt"),
}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_planted_command_is_refused_on_resume_and_what_is_not_read_does_not_matter(engine, folder, tmp_path) -> None:
    """The file restored, the run continues as the unbroken one, bit for bit."""
    settings, name = ENGINES[engine]
    # 1. plant
    run, mark = tune(folder, engine, *settings, *STEPS), tmp_path / "ran"
    expected, checkpoint = run.adapter, run.path / "checkpoint-2"
    for later in (run.path / "checkpoint-4", run.path / "adapter"):
        shutil.rmtree(later)
    own = (checkpoint / name).read_bytes()
    for planted in (name, "training_args.bin"):
        zipped(checkpoint / planted, mark)
    _seal(checkpoint)
    # 2. resume
    again = (*settings, *STEPS, "--resume", "auto")
    refused = command(SCRIPT, given(folder, engine, *again), folder, fails=True)
    assert f"{name} holds posix.system, which could run code" in refused.outputs[0]
    assert "Traceback" not in refused.outputs[0]
    # 3. resume from the restored file
    (checkpoint / name).write_bytes(own)
    _seal(checkpoint)
    assert torch.equal(tune(folder, engine, *again).adapter, expected)
    assert not mark.exists()


def _seal(checkpoint: Path) -> None:
    (checkpoint / SEAL).unlink()
    seal(checkpoint, ranks=1)
