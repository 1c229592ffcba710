"""Checkpoints run no code: each file of a pickle format is examined before it is read, and read under weights_only."""

import copyreg
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.planted import FORMS, zipped

from omnimem.run import RunError
from omnimem.training.pickles import FORBID, FORCE, refuse_code, weights_only, write_enums_by_value

STEP = "global_step2"
FILES = (
    f"{STEP}/mp_rank_00_model_states.pt",
    f"{STEP}/zero_pp_rank_0_mp_rank_00_model_states.pt",
    f"{STEP}/zero_pp_rank_1_mp_rank_00_optim_states.pt",
    f"{STEP}/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "global_step9/mp_rank_00_model_states.pt",
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
    "rng_state_1.pth",
    "pytorch_model.bin",
    "adapter_model.bin",
    "default/adapter_model.bin",
    "optimizer.bin",
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """One as the Trainer and DeepSpeed write it."""
    folder = tmp_path / "checkpoint-2"
    (folder / STEP).mkdir(parents=True)
    states = {"module": {"w": torch.ones(2, dtype=torch.bfloat16)}, "dp_world_size": 1, "lr": None}
    torch.save(states, folder / FILES[0])
    torch.save({"python": (3, (1, 2), None), "numpy": np.random.get_state(), "cpu": torch.ones(2)}, folder / FILES[8])
    torch.save({"last_epoch": 2}, folder / "scheduler.pt")
    (folder / "training_args.bin").write_bytes(b"not read")
    (folder / "latest").write_text(STEP)
    return folder


def test_what_a_run_writes_is_accepted(checkpoint) -> None:
    refuse_code(checkpoint)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FILES)
def test_a_file_with_other_objects_is_refused_by_name_and_not_read(name, form, checkpoint, tmp_path) -> None:
    (checkpoint / name).parent.mkdir(exist_ok=True)
    form(checkpoint / name, tmp_path / "ran")
    with pytest.raises(RunError) as error:
        refuse_code(checkpoint)
    assert f"{checkpoint}: {name} " in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "ran").exists()


def elsewhere(checkpoint: Path) -> None:
    (checkpoint.parent / STEP).mkdir()
    (checkpoint / "latest").write_text(f"../{STEP}")


def absolute(checkpoint: Path) -> None:
    (checkpoint.parent / STEP).mkdir()
    (checkpoint / "latest").write_text(str(checkpoint.parent / STEP))


def not_there(checkpoint: Path) -> None:
    (checkpoint / "latest").write_text("global_step7")


def binary(checkpoint: Path) -> None:
    (checkpoint / "latest").write_bytes(b"\xff\x00")


def universal(checkpoint: Path) -> None:
    (checkpoint / "latest_universal").write_text("..")


def linked_folder(checkpoint: Path) -> None:
    (checkpoint / STEP).rename(checkpoint.parent / "real")
    (checkpoint / STEP).symlink_to(checkpoint.parent / "real")


def linked_file(checkpoint: Path) -> None:
    (checkpoint / "optimizer.pt").symlink_to(checkpoint / "scheduler.pt")


@pytest.mark.parametrize(
    "change", [elsewhere, absolute, not_there, binary, universal, linked_folder, linked_file], ids=lambda f: f.__name__
)
def test_a_checkpoint_that_leads_to_another_folder_is_refused(change: Callable[[Path], None], checkpoint) -> None:
    change(checkpoint)
    with pytest.raises(RunError, match=r"latest|is a link"):
        refuse_code(checkpoint)


def test_within_weights_only_no_library_can_ask_for_more(tmp_path, monkeypatch) -> None:
    """As DeepSpeed does, also for a file that was changed after it was examined; the environment is as before."""
    zipped(tmp_path / "x.pt", tmp_path / "ran")
    monkeypatch.setenv(FORBID, "1")
    with pytest.raises(RunError, match=r"could run code.*GLOBAL .*system"), weights_only():
        torch.load(tmp_path / "x.pt", weights_only=False)
    assert not (tmp_path / "ran").exists()
    assert os.environ[FORBID] == "1"
    assert FORCE not in os.environ


def test_the_stage_of_zero_is_written_by_value_on_every_python(monkeypatch) -> None:
    """Python before 3.11.4 pickles a member of an enum as a call of getattr, which a resumed run refuses."""
    stage = pytest.importorskip("deepspeed.runtime.zero.config").ZeroStageEnum
    monkeypatch.setattr(stage, "__reduce_ex__", lambda member, _: (getattr, (stage, member.name)))
    monkeypatch.delitem(copyreg.dispatch_table, stage, raising=False)
    assert b"getattr" in pickle.dumps(stage.gradients, 2)
    write_enums_by_value()
    written = pickle.dumps(stage.gradients, 2)
    assert b"getattr" not in written
    assert pickle.loads(written) is stage.gradients
