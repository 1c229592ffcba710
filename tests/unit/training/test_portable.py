"""Learning rate and weight decay of a run that is resumed with other settings."""

import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from omnimem.training.portable import Recipe

TAKEN = 2
BEFORE = {"kind": "linear", "steps": 4, "rate": 0.01, "warmup": 1, "decay": 0.0}


def made(kind: str, steps: int, rate: float, warmup: int, decay: float) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """Two groups, as LoRA+ has them."""
    weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    groups = [{"params": weights[:1]}, {"params": weights[1:], "lr": 16 * rate, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=decay)
    return optimizer, get_scheduler(kind, optimizer, warmup, steps)


def advanced(optimizer: torch.optim.Optimizer, schedule: LRScheduler) -> None:
    for _ in range(TAKEN):
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"steps": 6},
        {"rate": 0.5},
        {"warmup": 3},
        {"kind": "cosine", "rate": 0.001},
        {"kind": "constant"},
        {"kind": "polynomial", "steps": 9},
        {"decay": 0.3},
    ],
    ids=str,
)
def test_the_next_step_of_a_resumed_run_is_that_of_a_run_with_the_new_settings(changed) -> None:
    former, old = made(**BEFORE)
    advanced(former, old)
    now = {**BEFORE, **changed}
    optimizer, schedule = made(**now)
    recipe = Recipe.of(optimizer)
    optimizer.load_state_dict(former.state_dict())
    schedule.load_state_dict(old.state_dict())
    recipe.restore(optimizer, schedule)
    expected, unbroken = made(**now)
    advanced(expected, unbroken)
    for _ in range(2):
        found = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
        assert found == [{k: v for k, v in group.items() if k != "params"} for group in expected.param_groups]
        assert schedule.get_last_lr() == unbroken.get_last_lr()
        schedule.step()
        unbroken.step()


def test_a_schedule_with_a_state_of_its_own_keeps_it() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    recipe = Recipe.of(optimizer)
    optimizer.param_groups[0]["lr"] = 0.001
    recipe.restore(optimizer, schedule)
    assert optimizer.param_groups[0]["lr"] == 0.001
