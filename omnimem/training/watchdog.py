"""A step that does not end: which rank, step and samples it was, said on stderr; then the process ends, with 1.

A launcher ends the other ranks when one has ended. Nothing is asked of the thread that is stuck, be it in a decoder or
waiting for other ranks; where it does not even let go of the interpreter, faulthandler's own clock ends the process.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, final

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

GRACE = 10.0  # seconds in which the other ranks, which wait for this one, can say where they are
LOCKED = 30.0  # seconds after which a thread that keeps the interpreter is given up


@final
class Watchdog(TrainerCallback):
    """Within its `with`, what is noted as begun must be followed by something else in so many seconds (0: no limit)."""

    def __init__(self, seconds: float, rank: int) -> None:
        self.seconds, self.rank = seconds, rank
        self._step, self._what, self._samples = 0, "", ""
        self._deadline: float | None = None
        self._over = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self.seconds:
            threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        faulthandler.cancel_dump_traceback_later()

    def begin(self, step: int, samples: Sequence[str]) -> None:
        """A micro-step begins: from now its time counts."""
        self._step, self._samples = step, f"{', '.join(samples) or 'no sample'}, "
        self._restart("reading its files")

    def doing(self, what: str) -> None:
        """What the micro-step is at."""
        self._what = what

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """What follows, logging and saving, has its own time."""
        self._step, self._samples = state.global_step, ""
        self._restart("after the step: logging or saving")

    def _restart(self, what: str) -> None:
        self._what = what
        if self.seconds:
            self._deadline = time.monotonic() + self.seconds
            faulthandler.dump_traceback_later(self.seconds + LOCKED, exit=True)

    def _look(self) -> None:
        while not self._over.wait(min(1.0, self.seconds / 10)):
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._give_up()

    def _give_up(self) -> None:
        said = (
            f"rank {self.rank}, step {self._step}: {self._samples}{self._what} for more than {self.seconds:g} s; look "
            "at the sample, or raise train.step_timeout_seconds; go on with --resume auto\n"
        )
        os.write(sys.stderr.fileno(), said.encode())  # at once and whole, whatever the main thread holds
        time.sleep(GRACE)
        os._exit(1)
