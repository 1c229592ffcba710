"""The pretraining continues after its last finished stage, to the bit."""

from pathlib import Path

import pytest
import torch
from torch import nn

from omnimem.commands.pretrain_tiny import Stage, Trainee, create, train_recall
from omnimem.tiny.progress import Progress, ProgressError

STAGES = tuple(Stage(name=name, seconds=4, batch=2, steps=2, cells=4) for name in ("a", "b", "c"))


def started(folder: Path, seed: int = 0) -> tuple[Trainee, Progress]:
    trainee = create("tiny", seed, folder)
    return trainee, Progress(folder, nn.ModuleList([trainee.base.model, trainee.namers]), seed)


def test_a_stopped_pretraining_equals_an_unbroken_one(tmp_path) -> None:
    whole, progress = started(tmp_path / "whole")
    train_recall(whole, STAGES, progress)
    train_recall(started(tmp_path / "x")[0], STAGES[:1], started(tmp_path / "x")[1])  # ends without a checkpoint of b
    first, progress = started(tmp_path / "y")
    train_recall(first, STAGES[:2], progress)
    second, progress = started(tmp_path / "y")
    assert progress.done == ["a", "b"]
    train_recall(second, STAGES, progress)
    for name, tensor in whole.base.model.state_dict().items():
        assert torch.equal(tensor, second.base.model.state_dict()[name]), name
    progress.remove()
    assert started(tmp_path / "y")[1].done == []


@pytest.mark.parametrize("content", [b"", b"x" * 100, bytes(50)])
def test_damaged_or_foreign_progress_is_refused(content, tmp_path) -> None:
    trainee, progress = started(tmp_path)
    progress.save("a")
    with pytest.raises(ProgressError, match="of --seed 0, not 1"):
        started(tmp_path, seed=1)
    progress.path.write_bytes(content)
    with pytest.raises(ProgressError, match=r"cannot be read .*remove it"):
        started(tmp_path)
    assert trainee
