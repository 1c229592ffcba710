"""What the trainer adds to the Trainer of transformers, without a model: the logged rate, and checkpoints."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import Trainer, TrainerState

from omnimem.run import RunFolder
from omnimem.training.trainer import StreamTrainer

IGNORED: Any = SimpleNamespace(begin=lambda *_: None)


def bare(**parts: Any) -> Any:
    """A trainer with these parts alone."""
    trainer = object.__new__(StreamTrainer)
    for name, part in parts.items():
        setattr(trainer, name, part)
    return trainer


def test_the_logged_rate_is_that_of_the_step_and_of_the_first_group(monkeypatch) -> None:
    """DeepSpeed's schedule moves on before the Trainer logs; LoRA+ has a second group with a rate of its own."""
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}, {"lr": 1.6}])
    metrics, state = SimpleNamespace(samples=[]), TrainerState(global_step=3)
    trainer = bare(watchdog=IGNORED, nonfinite=IGNORED, metrics=metrics, state=state, optimizer=optimizer, _rate=None)
    monkeypatch.setattr(Trainer, "_get_learning_rate", lambda self: 7.0)
    assert trainer._get_learning_rate() == 7.0  # no step was taken
    trainer._begin(SimpleNamespace(train=lambda: None), ["a", "b"])
    optimizer.param_groups[0]["lr"] = 0.05
    assert trainer._get_learning_rate() == 0.1
    assert metrics.samples == ["a", "b"]


@pytest.mark.parametrize(("best", "writes"), [(2, True), (2, False), (0, True)])
def test_a_checkpoint_has_the_counts_of_all_ranks_and_names_the_best_one(best, writes, monkeypatch, tmp_path) -> None:
    calls: list[str] = []
    folder = RunFolder(path=tmp_path / "run")
    (tmp_path / "checkpoint-4").mkdir()

    def save(step: int, files: Any, state: Any, schedule: Any, *, best: int | None) -> None:
        calls.append(f"save {step}, best {best}")
        files()

    monkeypatch.setattr(Trainer, "_save_checkpoint", lambda self, model, trial: calls.append("stock"))
    state = TrainerState(global_step=4, best_global_step=best, best_model_checkpoint="partial/checkpoint-4")
    trainer = bare(
        state=state,
        adapted=None,
        lr_scheduler=None,
        args=SimpleNamespace(should_save=writes),
        metrics=SimpleNamespace(share=lambda args: calls.append("share")),
        checkpoints=SimpleNamespace(save=save, parent=str(tmp_path), folder=folder),
    )
    trainer._save_checkpoint(None, None)
    assert calls == ["share", f"save 4, best {best}", "stock"]
    assert state.best_model_checkpoint is None  # else the Trainer removes other checkpoints
    written = tmp_path / "checkpoint-4" / "trainer_state.json"
    assert written.exists() is (writes and best > 0)
    if written.exists():
        assert Path(json.loads(written.read_text())["best_model_checkpoint"]) == folder.checkpoint(best)
