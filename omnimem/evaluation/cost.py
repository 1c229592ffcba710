"""Cost of answering: time by kind of work, time to the first token, and peak memory."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from omnimem.tokens import Chunk

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@final
class Clock:
    """Wall seconds since construction: `media` (waiting for decoding and encoding), `answering`, and the rest.

    `before`: seconds that media took earlier.
    """

    def __init__(self, before: float = 0.0) -> None:
        self._started, self.media, self.answering = time.perf_counter() - before, before, 0.0

    def chunks(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """The chunks; the time spent waiting for them counts as media."""
        rest = iter(chunks)
        while True:
            asked = time.perf_counter()
            chunk = next(rest, None)
            synchronize()
            self.media += time.perf_counter() - asked
            if chunk is None:
                return
            yield chunk

    @contextmanager
    def answer(self) -> Iterator[None]:
        """The time inside of the block counts as answering."""
        synchronize()
        asked = time.perf_counter()
        yield
        self.answering += time.perf_counter() - asked

    @property
    def reading(self) -> float:
        """Seconds of the text model on the stream."""
        synchronize()
        return time.perf_counter() - self._started - self.media - self.answering


@final
class FirstToken:
    """A head that measures the time from its construction to the first logits."""

    def __init__(self, head: Callable[[Tensor], Tensor]) -> None:
        self._head, self._asked = head, time.perf_counter()
        self.seconds: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self._head(hidden)
        if self.seconds is None:
            synchronize()
            self.seconds = time.perf_counter() - self._asked
        return logits


def synchronize() -> None:
    """Wait until the device has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@final
class PeakMemory:
    """Peak bytes since construction: on the GPU, or resident in this process without one.

    Resident memory includes the model and memory that the allocator keeps from earlier streams: compare it between
    separate processes (`benchmarks/cost.py`). None if the system does not report it.
    """

    def __init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        elif RESET.exists():
            with suppress(PermissionError):  # the peak is then that of the whole process
                RESET.write_text("5")  # sets the high-water mark to what is resident now (man 5 proc)

    @property
    def bytes(self) -> int | None:
        """Bytes so far."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        if not STATUS.exists():
            return None
        found = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
        return 1024 * int(found[0].split()[1]) if found else None
