"""Time limit of a step: prints rank, step and samples to stderr, then ends the process with exit code 1.

The launcher ends the other ranks. The check runs in its own thread and needs nothing from the thread that is stuck, be
it in a decoder or in a collective; when that thread holds the interpreter lock, the timer of faulthandler ends the
process.
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

GRACE = 10.0  # seconds for the other ranks, which wait for this one, to report as well
LOCKED = 30.0  # further seconds until faulthandler ends the process


@final
class Watchdog(TrainerCallback):
    """Inside its `with`, each micro-step and each pause between two steps may take `seconds` (0: no limit)."""

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
        """Start the clock of a micro-step."""
        self._step, self._samples = step, f"{', '.join(samples) or 'no sample'}, "
        self._restart("reading its files")

    def doing(self, what: str) -> None:
        """Note the current stage of the micro-step, without a new time limit."""
        self._what = what

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock of logging and saving."""
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
        report = (
            f"rank {self.rank}, step {self._step}: {self._samples}{self._what} for more than {self.seconds:g} s; check "
            "the sample, or raise train.step_timeout_seconds; continue with --resume auto\n"
        )
        os.write(sys.stderr.fileno(), report.encode())  # one write, without the locks of sys.stderr
        time.sleep(GRACE)
        os._exit(1)
