"""Time and memory on a device: CUDA events around whole passes, medians, arms in turn so that drift affects all."""

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import median
from typing import Any, final

import torch

Work = Callable[[], object]
Arm = Callable[[], AbstractContextManager[Work]]  # the yielded work is timed, set-up and clean-up are not
GIB = 1 << 30


@final
@dataclass(frozen=True, kw_only=True)
class Clock:
    """Number of repeats and time limit of measurements; on a CPU by wall clock and without memory."""

    device: torch.device
    repeats: int
    seconds: float  # no further round is begun after this time

    def side_by_side(self, arms: Mapping[str, Arm]) -> dict[str, dict[str, Any]]:
        """A row for each arm: one untimed pass of each, then rounds in which every arm has its turn.

        An arm that runs out of memory or has no kernel gets a row with its error and no further turn.
        """
        passes: dict[str, list[tuple[float, ...]]] = {name: [] for name in arms}
        failed: dict[str, dict[str, Any]] = {}
        started = time.perf_counter()
        for number in range(self.repeats + 1):
            for name in [name for name in arms if name not in failed]:
                try:
                    taken = self._pass(arms[name])
                except RuntimeError as error:  # torch.OutOfMemoryError included
                    lacking = isinstance(error, torch.OutOfMemoryError)
                    failed[name] = {"error": str(error).splitlines()[0], "out_of_memory": lacking}
                else:
                    passes[name] += [taken] if number else []
                if name in failed:
                    release()  # only now: the error holds references to the arm's tensors
            if number and time.perf_counter() - started > self.seconds:
                break
        return {name: failed.get(name) or _timing(passes[name]) for name in arms}

    def _pass(self, arm: Arm) -> tuple[float, ...]:
        """Milliseconds; on a GPU also GiB beyond the memory in use before, and the peak in GiB."""
        with arm() as work:
            if self.device.type != "cuda":
                started = time.perf_counter()
                work()
                return (1e3 * (time.perf_counter() - started),)
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            work()
            last.record()
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
            return first.elapsed_time(last), (peak - before) / GIB, peak / GIB


def _timing(passes: list[tuple[float, ...]]) -> dict[str, Any]:
    times, *memory = zip(*passes, strict=True)
    transient, peak = map(max, memory) if memory else (None, None)  # None: not counted on a CPU
    row = {"median_ms": median(times), "fastest_ms": min(times), "slowest_ms": max(times), "repeats": len(times)}
    return {**row, "transient_gib": transient, "peak_gib": peak}


def release() -> None:
    """Return unused memory to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
