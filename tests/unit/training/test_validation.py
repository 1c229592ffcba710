"""Validation during training: what is held out, what is read, and which checkpoint is kept."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from omnimem.data import ManifestError, Sample
from omnimem.run import RunFolder
from omnimem.training.checkpoints import rotate
from omnimem.training.logging import Finished
from omnimem.training.sampler import held_out, recording
from omnimem.training.validation import EarlyStopping


def clips(*names: str, folder: str = "data") -> list[Sample]:
    return [
        Sample(id=f"{name}.{part}", video=Path(folder) / f"{name}.mp4", audio=None, messages=(), start=4.0 * part)
        for name in names
        for part in range(3)
    ]


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.99])
def test_whole_recordings_are_held_out_wherever_the_data_lie(share) -> None:
    names = [f"film{number}" for number in range(8)]
    train, held = held_out(clips(*names), share)
    assert {recording(sample) for sample in train} & {recording(sample) for sample in held} == set()
    assert len(train) + len(held) == 24
    assert len({recording(sample) for sample in held}) == min(7, max(1, round(8 * share)))
    moved = held_out(clips(*reversed(names), folder="/elsewhere"), share)[1]
    assert {sample.id for sample in moved} == {sample.id for sample in held}


def test_a_single_recording_cannot_be_shared() -> None:
    with pytest.raises(ManifestError, match=r"data\.validation: 0\.5 of 1 recording leaves nothing"):
        held_out(clips("film"), 0.5)
    one, other = replace(clips("film")[0], video=Path("data/./film.mp4")), clips("film")[1]
    assert recording(one) == recording(other)


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path) -> None:
    folder = RunFolder(path=tmp_path)
    for step in (2, 4, 6, 10):
        folder.checkpoint(step).mkdir()
    rotate(folder, 1, 4)
    assert [path.name for path in folder.checkpoints()] == ["checkpoint-4", "checkpoint-10"]
    rotate(folder, 1)
    assert [path.name for path in folder.checkpoints()] == ["checkpoint-10"]


def state_of(step: int, counter: int) -> Any:
    stored = {"args": {}, "attributes": {"early_stopping_patience_counter": counter}}
    return SimpleNamespace(global_step=step, stateful_callbacks={"EarlyStopping": stored} if step else {})


@pytest.mark.parametrize(("threshold", "said"), [(0.0, "loss has not improved in 1"), (0.5, "by more than 0.5 in 1")])
def test_early_stopping_says_what_it_waited_for(threshold, said, capsys) -> None:
    args: Any = SimpleNamespace(metric_for_best_model="eval_loss", greater_is_better=False)
    state: Any = SimpleNamespace(global_step=4, best_metric=2.0, best_global_step=2, is_world_process_zero=True)
    control: Any = SimpleNamespace(should_training_stop=False, should_save=False)
    EarlyStopping(1, threshold).on_evaluate(args, state, control, {"eval_loss": 2.0 - threshold / 2})
    assert control.should_training_stop
    assert control.should_save
    assert said in capsys.readouterr().out


def test_early_stopping_continues_from_its_counter_and_does_not_go_on_after_it() -> None:
    unused: Any = None
    callback = EarlyStopping(3, 0.0)
    callback.on_train_begin(unused, state_of(4, 2), unused)
    assert callback.early_stopping_patience_counter == 2
    with pytest.raises(Finished):
        callback.on_train_begin(unused, state_of(6, 3), unused)
    EarlyStopping(4, 0.0).on_train_begin(unused, state_of(6, 3), unused)
    EarlyStopping(1, 0.0).on_train_begin(unused, state_of(0, 0), unused)
