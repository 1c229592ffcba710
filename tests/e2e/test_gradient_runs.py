"""Gradient modes by the entry point: runs resume and share out among ranks as ever, and say what their policy was."""

import pytest
import torch
from support.tiny_run import tune

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

MODES = {
    "horizon": ("tuning.horizon=1",),
    "states": ("tuning.gradient=states",),
    "released": ("tuning.gradient=released", "tuning.selection.softening=hard"),
    "paper": ("tuning.gradient=paper", "tuning.stop_layer=1", "tuning.selection.softening=hard"),
}
SGD = ("train.optim=sgd", "train.max_steps=3", "train.max_grad_norm=0", "train.deepspeed=deepspeed/zero2.json")


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_equal_one_that_accumulates_and_the_run_says_its_policy(folder, mode) -> None:
    """Every adapter has a gradient in every step, or the ranks would wait for each other; dropout is on."""
    two = tune(folder, f"{mode}-2", *SGD, *MODES[mode], ranks=2)
    one = tune(folder, f"{mode}-1", *SGD, *MODES[mode], "train.gradient_accumulation_steps=2")
    torch.testing.assert_close(two.losses, one.losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(two.adapter, one.adapter, rtol=1e-5, atol=1e-7)
    same = mode in ("horizon", "states")
    assert (one.record["policy_in_training"] == "the one used in evaluation") == same
    if not same:
        assert "chunks run layers 0 to 0" in one.record["policy_in_training"]
