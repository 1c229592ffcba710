"""Time and memory on a device: CUDA events around whole passes, medians, arms in turn so that drift hits all alike."""

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, final

import torch

Work = Callable[[], object]
Arm = Callable[[], AbstractContextManager[Work]]  # what it yields is timed; setting up and clearing away is not
GIB = 1 << 30


@final
@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of a pass, and the memory it took beyond what lay on the device before it."""

    median_ms: float
    fastest_ms: float
    slowest_ms: float
    repeats: int
    transient_gib: float | None  # None: the device keeps no such count
    peak_gib: float | None  # with weights and everything else that lay there


@final
@dataclass(frozen=True, kw_only=True)
class Clock:
    """How long and how often things are timed; on a CPU by wall clock and without memory."""

    device: torch.device
    repeats: int
    seconds: float  # no further round is begun after so long

    def side_by_side(self, arms: Mapping[str, Arm]) -> dict[str, dict[str, Any]]:
        """A row for each arm: one untimed pass of each, then rounds in which every arm has its turn.

        An arm that cannot run, for want of memory or of a kernel, gets a row that says so and no further turn.
        """
        passes: dict[str, list[_Pass]] = {name: [] for name in arms}
        failed: dict[str, dict[str, Any]] = {}
        started = time.perf_counter()
        for number in range(self.repeats + 1):
            for name in [name for name in arms if name not in failed]:
                try:
                    taken = self._pass(arms[name])
                except RuntimeError as error:  # of which running out of memory is a kind
                    lacking = isinstance(error, torch.OutOfMemoryError)
                    failed[name] = {"error": str(error).splitlines()[0], "out_of_memory": lacking}
                else:
                    passes[name] += [taken] if number else []
                if name in failed:
                    release()  # only now: the error held on to what the arm had made
            if number and time.perf_counter() - started > self.seconds:
                break
        return {name: failed.get(name) or asdict(_timing(passes[name])) for name in arms}

    def _pass(self, arm: Arm) -> "_Pass":
        with arm() as work:
            if self.device.type != "cuda":
                started = time.perf_counter()
                work()
                return _Pass(ms=1e3 * (time.perf_counter() - started))
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            work()
            last.record()
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
            return _Pass(ms=first.elapsed_time(last), transient=(peak - before) / GIB, peak=peak / GIB)


@final
@dataclass(frozen=True, kw_only=True)
class _Pass:
    ms: float
    transient: float | None = None
    peak: float | None = None


def _timing(passes: list[_Pass]) -> Timing:
    times = [one.ms for one in passes]
    return Timing(
        median_ms=median(times),
        fastest_ms=min(times),
        slowest_ms=max(times),
        repeats=len(times),
        transient_gib=max((one.transient for one in passes if one.transient is not None), default=None),
        peak_gib=max((one.peak for one in passes if one.peak is not None), default=None),
    )


def release() -> None:
    """Give memory that nothing refers to back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
