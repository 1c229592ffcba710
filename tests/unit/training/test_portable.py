"""The schedule of a run that is resumed with another number of steps."""

import pytest
import torch
from transformers import get_scheduler

from omnimem.training.portable import follow_schedule

RATE, TAKEN = 0.01, 2


def advanced(kind: str, steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=RATE)
    schedule = get_scheduler(kind, optimizer, 1, steps)
    for _ in range(TAKEN):
        optimizer.step()
        schedule.step()
    return optimizer, schedule


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "polynomial"])
@pytest.mark.parametrize("steps", [4, 6])
def test_the_next_step_of_a_resumed_run_has_the_rate_of_the_new_length(kind, steps) -> None:
    former, old = advanced(kind, 4)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=RATE)
    schedule = get_scheduler(kind, optimizer, 1, steps)
    optimizer.load_state_dict(former.state_dict())
    schedule.load_state_dict(old.state_dict())
    follow_schedule(schedule)
    _, expected = advanced(kind, steps)
    assert [optimizer.param_groups[0]["lr"]] == schedule.get_last_lr() == expected.get_last_lr()
