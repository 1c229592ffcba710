"""What is counted over a whole run goes on in a resumed one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from omnimem.data import Failure, Failures, TooManyFailures
from omnimem.streaming.trained_range import TrainedRange
from omnimem.training.failures import FailedSamples, OneTrackSamples
from omnimem.training.logging import StepMetrics
from omnimem.training.nonfinite import NonFiniteGuard, NonFiniteStep

UNUSED: Any = None


def metrics() -> StepMetrics:
    failed = FailedSamples(Failures(samples=4, max_failures=0.5))
    return StepMetrics(
        Path("m"), UNUSED, 2, NonFiniteGuard(3), failed, OneTrackSamples(), TrainedRange(10), feeder=UNUSED
    )


def counts(of: StepMetrics) -> dict[str, Any]:
    return {
        "failed": of.failed.found,
        "one_track": of.one_track.found,
        "positions": of.trained.reached,
        "skipped": of.nonfinite.found,
    }


def test_a_resumed_run_counts_on() -> None:
    before, after = metrics(), metrics()
    before.failed.record(Failure(id="a", reason="missing", message="a.mp4: is not a file"))
    before.one_track.record("b", "video")
    before.trained.note(12)
    before.nonfinite.found.append(NonFiniteStep(step=2, samples=("c", "d")))
    state: Any = SimpleNamespace(global_step=3, stateful_callbacks={"StepMetrics": before.state()})
    after.on_train_begin(UNUSED, state, UNUSED)
    assert counts(after) == counts(before)
    assert all(counts(after).values())
    # a sample that fails again is counted once, and the limit is that of the whole run
    after.failed.record(Failure(id="a", reason="missing"))
    after.failed.record(Failure(id="e", reason="missing"))
    with pytest.raises(TooManyFailures):
        after.failed.record(Failure(id="f", reason="missing"))
