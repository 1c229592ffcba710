"""Arms that need little memory come first."""

from itertools import permutations

import pytest

from omnimem.cli.arms import ARMS, BY_COST, by_cost

WITHOUT_BUDGET = ("full_memory", "tuned_full_memory", "vision_only", "audio_only")


@pytest.mark.parametrize("names", [*permutations(("full_memory", "training_free", "blind")), ARMS], ids=str)
def test_arms_that_keep_everything_come_last(names) -> None:
    ordered = by_cost(names)
    assert sorted(ordered) == sorted(names)
    kept = [name in WITHOUT_BUDGET for name in ordered]
    assert kept == sorted(kept)
    assert ordered[-1].endswith("full_memory")


def test_every_arm_has_a_place() -> None:
    assert sorted(BY_COST) == sorted(ARMS)
