"""What is counted over a whole run goes on in a resumed one."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from omnimem.data import Failure, Failures, TooManyFailures
from omnimem.streaming.trained_range import TrainedRange
from omnimem.training.failures import FailedSamples, OneTrackSamples
from omnimem.training.logging import StepMetrics
from omnimem.training.nonfinite import NonFiniteGuard, NonFiniteStep
from omnimem.tuning import Pass

UNUSED: Any = None
ONE_RANK: Any = SimpleNamespace(world_size=1, process_index=0, device="cpu")


def metrics() -> StepMetrics:
    failed = FailedSamples(Failures(samples=4, max_failures=0.5))
    feeder: Any = SimpleNamespace(cache=SimpleNamespace(counts={"hits": 1, "misses": 2}))
    return StepMetrics(Path("m"), UNUSED, 2, NonFiniteGuard(3), failed, OneTrackSamples(), TrainedRange(10), feeder)


def counts(of: StepMetrics) -> dict[str, Any]:
    return {
        "failed": of.failed.found,
        "read_later": of.failed.read_later,
        "one_track": of.one_track.found,
        "positions": of.trained.reached,
        "skipped": of.nonfinite.found,
    }


def test_a_resumed_run_counts_on() -> None:
    before, after = metrics(), metrics()
    before.failed.record(Failure(id="a", reason="missing", message="a.mp4: is not a file"))
    before.failed.record(Failure(id="c", reason="missing"))
    before.failed.read("c")
    before.one_track.record("b", "video")
    before.trained.note(12)
    before.nonfinite.found.append(NonFiniteStep(step=2, samples=("c", "d")))
    before.share(ONE_RANK)
    state: Any = SimpleNamespace(global_step=3, stateful_callbacks={"StepMetrics": before.state()})
    after.on_train_begin(UNUSED, state, UNUSED)
    assert counts(after) == counts(before)
    assert all(counts(after).values())
    assert after.cache_counts(1)["misses"] == 4  # 2 up to the checkpoint, 2 since
    after.share(ONE_RANK)
    assert after.cache_counts(2)["hits"] == after.state()["attributes"]["encoder_cache"]["hits"] == 2
    # a sample that fails again is counted once, and the limit is that of the whole run
    after.failed.record(Failure(id="a", reason="missing"))
    after.failed.record(Failure(id="e", reason="missing"))
    with pytest.raises(TooManyFailures):
        after.failed.record(Failure(id="f", reason="missing"))


def outcome(id: str, failed: bool) -> Callable[[FailedSamples], None]:
    return lambda samples: samples.record(Failure(id=id, reason="missing")) if failed else samples.read(id)


@pytest.mark.parametrize(
    ("by_rank", "failed", "read_later"),
    [
        ([[("a", False)], []], [], ["a"]),  # repaired and read
        ([[], [("a", False)]], [], ["a"]),  # by another rank
        ([[("a", False)], [("a", True)]], ["a"], []),  # one rank still cannot read it
        ([[("a", False), ("a", True)], []], ["a"], []),  # read once, then not
        ([[("a", True)], [("b", True), ("c", False)]], ["a", "b"], []),
        ([[("b", True)], [("b", False)]], ["a", "b"], []),
        ([[], []], ["a"], []),  # not due yet
    ],
)
def test_what_fails_is_what_failed_when_it_was_last_read(monkeypatch, by_rank, failed, read_later) -> None:
    """Failures of a checkpoint, then what two ranks read, then their exchange."""
    ranks = [FailedSamples(Failures(samples=9, max_failures=0.5)) for _ in by_rank]
    for rank, reads in zip(ranks, by_rank, strict=True):
        rank.restore([Failure(id="a", reason="truncated")])
        for id, fails in reads:
            outcome(id, fails)(rank)
    news = [item for rank in ranks for item in rank._latest._news.items()]
    monkeypatch.setattr("omnimem.training.failures.gather_lists", lambda mine, ranks: news)
    for place, rank in enumerate(ranks):
        rank.share(SimpleNamespace(world_size=2, process_index=place))  # pyright: ignore[reportArgumentType]
        assert sorted(each.id for each in rank.found) == failed
        assert list(rank.read_later) == read_later


def test_failures_of_other_ranks_count_for_the_limit_of_the_first(monkeypatch) -> None:
    first = FailedSamples(Failures(samples=4, max_failures=0.25))
    first.record(Failure(id="a", reason="missing"))
    news = [("b", Failure(id="b", reason="missing"))]
    monkeypatch.setattr("omnimem.training.failures.gather_lists", lambda mine, ranks: news)
    with pytest.raises(TooManyFailures):
        first.share(SimpleNamespace(world_size=2, process_index=0))  # pyright: ignore[reportArgumentType]
    assert [each.id for each in first.found] == ["a", "b"]


def test_a_sample_that_has_both_tracks_again_is_no_sample_of_one_track() -> None:
    samples = OneTrackSamples()
    samples.restore({"a": "video", "b": "audio"})
    samples.record("a", "both")
    samples.record("c", "audio")
    assert samples.found == {"b": "audio", "c": "audio"}


@pytest.mark.parametrize(
    ("samples", "read", "skipped", "expected"),
    [
        (4, {5: [(4, 2.0)]}, (), 1.25),  # all were read: what the Trainer has
        (10, {5: [(1, 3.0)]}, (), 3.0),  # one of ten was read
        (8, {5: [(2, 3.0), (1, 6.0)], 6: [(1, 1.0)]}, (), 2.5),  # of two steps
        (4, {}, (), math.nan),  # none was read
        (8, {5: [(1, 3.0)], 6: [(2, 9.0)]}, (7,), 3.0),  # the second step was not finite
        (8, {5: [(4, 3.0)], 6: [(4, 9.0)]}, (7,), 2.5),  # all were read, one step was not finite
    ],
)
def test_the_logged_loss_is_of_the_streams_that_were_read(monkeypatch, samples, read, skipped, expected) -> None:
    log = metrics()
    log.logged, log.samples = 5, ["x"] * samples
    passes = [
        Pass(step=step, budget="18", streams=streams, loss=loss, losses={"answer": loss}, rows={"answer": streams})
        for step, batches in read.items()
        for streams, loss in batches
    ]
    monkeypatch.setattr(StepMetrics, "_passes", lambda _: passes)
    monkeypatch.setattr(StepMetrics, "_speed", lambda *_: {})
    log.nonfinite.found = [NonFiniteStep(step=step, samples=("x",)) for step in skipped]
    state = SimpleNamespace(global_step=7, max_steps=9, log_history=[])
    trainer: Any = SimpleNamespace(state=state, args=ONE_RANK)
    found = log.complete({"loss": 1.25}, trainer)
    assert found["loss"] == pytest.approx(expected, nan_ok=True)
    assert log.names["samples"] == ["x"] * samples
    assert log.names["left_out"] == ["x"] * len(skipped)
