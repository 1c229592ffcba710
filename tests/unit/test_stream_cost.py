"""benchmarks/stream_cost.py: what is timed beside our policies is what it claims to be."""

from dataclasses import replace

import pytest
import torch

from benchmarks.release_scheme import ReleaseScheme
from benchmarks.stream_cost import DEFAULT, chunk_of, measure, model_of, slope
from omnimem.budget import Budget
from omnimem.policies import PerturbationOptions
from omnimem.streaming.attach import attach
from omnimem.streaming.stream import Stream


@pytest.mark.parametrize("budget", [Budget.shared(2, 60), Budget(slots=((15, 30), (20, 40)))])
def test_the_release_s_scheme_keeps_what_the_policy_released_keeps(budget) -> None:
    """Hidden states that are turned into keys again, with memory tokens as queries, or keys that stay: the same."""
    budget = replace(budget, lend=False)
    theirs = ReleaseScheme(model_of(2, 64, "cpu", "float32"), budget)
    with attach(model_of(2, 64, "cpu", "float32")) as attached, torch.no_grad():
        ours = Stream(attached, PerturbationOptions(name="released").build(budget))
        for number in range(4):
            chunk = chunk_of(50, 50 * number, 64, "cpu", torch.float32)
            ours.feed(chunk)
            theirs.feed(chunk)
            for mine, other in zip(ours.memory.layers, theirs.layers, strict=True):
                assert other is not None
                assert torch.equal(mine.order, other.order)
                torch.testing.assert_close(mine.importance, other.importance, rtol=1e-4, atol=1e-5)
    assert theirs.bytes == sum(sum(slots) for slots in budget.slots) * (64 * 4 + 2 * 8 * 4 + 1 + 1 + 4)


def test_every_arm_is_timed_on_the_same_chunks() -> None:
    found = measure(DEFAULT, 16, 3, 24, model_of(2, 64, "cpu", "float32"))
    assert set(found) == set(DEFAULT)
    assert all(arm["seconds"] > 0 and arm["bytes"] > 0 for arm in found.values())
    assert found["stock"]["bytes"] == 2 * 24 * 2 * 2 * 8 * 4
    assert found["one_shot"]["bytes"] == 2 * (16 * 7) * 2 * 2 * 8 * 4


def test_the_slope_is_that_of_a_line() -> None:
    low, middle, high = slope([1 + 0.001 * number for number in range(40)])
    assert low <= middle <= high
    assert middle == pytest.approx(100 * 0.001 / 1.0195 * 100, rel=1e-3)
