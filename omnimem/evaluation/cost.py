"""What answering costs: where the time goes, when the first token comes, and the most memory that was in use."""

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
    """Wall seconds since it was made: `media` waiting for what is decoded and encoded, `answering`, and the rest.

    `before` are seconds that the media took before.
    """

    def __init__(self, before: float = 0.0) -> None:
        self._started, self.media, self.answering = time.perf_counter() - before, before, 0.0

    def chunks(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """The chunks; the time until each is there is that of the media."""
        rest = iter(chunks)
        while True:
            asked = time.perf_counter()
            chunk = next(rest, None)
            settle()
            self.media += time.perf_counter() - asked
            if chunk is None:
                return
            yield chunk

    @contextmanager
    def answer(self) -> Iterator[None]:
        """Whatever happens inside is answering."""
        settle()
        asked = time.perf_counter()
        yield
        self.answering += time.perf_counter() - asked

    @property
    def reading(self) -> float:
        """Seconds that the text model has spent on the stream."""
        settle()
        return time.perf_counter() - self._started - self.media - self.answering


@final
class FirstToken:
    """A head that notes how long it took from its making until the first logits were there."""

    def __init__(self, head: Callable[[Tensor], Tensor]) -> None:
        self._head, self._asked = head, time.perf_counter()
        self.seconds: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self._head(hidden)
        if self.seconds is None:
            settle()
            self.seconds = time.perf_counter() - self._asked
        return logits


def settle() -> None:
    """Wait until the device has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@final
class PeakMemory:
    """The most bytes in use since it was made: on the GPU, or resident in this process where there is none.

    Resident memory includes the model and whatever the allocator keeps of earlier streams: compare it between
    processes that did one thing each (`benchmarks/cost.py`). None where the system does not tell.
    """

    def __init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        elif RESET.exists():
            with suppress(PermissionError):  # the mark then covers the whole life of the process
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
