"""How a run is asked to stop: by SIGTERM, by SIGINT, or by the end of the process that launched it.

It finishes the step it is in, writes a checkpoint and ends with 128 + the signal's number (143, 130). All ranks stop
after the same step.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, final

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from omnimem.training.collectives import highest

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ALONE = 60.0  # seconds that a rank without a launcher has to finish its step and its checkpoint


@final
class Stopped(Exception):
    """A run that ended before its last step, on purpose; `code` is the process's exit code."""

    def __init__(self, what: str, code: int) -> None:
        super().__init__(what)
        self.code = code


@final
class ShutdownSignal(TrainerCallback):
    """Within its `with` a signal is a request; every rank learns of it at the end of the step."""

    def __init__(self) -> None:
        self.asked = 0  # number of the signal that this rank got
        self.agreed = 0  # of the one that the ranks stop for

    def __enter__(self) -> "ShutdownSignal":
        self.former = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """A process on its way out stays deaf to signals: a launcher signals all ranks once the first has gone.

        A request that came too late for all ranks to hear of it goes to whoever was asked before: it is never lost.
        """
        if kind is Stopped:
            return
        for number, handler in self.former.items():
            signal.signal(number, handler)
        if kind is None and self.asked and not self.agreed:
            os.kill(os.getpid(), self.asked)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = self.asked or number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # who asks twice does not want to wait

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Every rank comes here."""
        if self.agree(args.device):
            control.should_save = control.should_training_stop = True

    def agree(self, device: torch.device) -> int:
        """The signal that the ranks stop for, 0: none; every rank must ask."""
        self.agreed = highest(self.asked, device)
        return self.agreed


def follow_launcher() -> None:
    """From now on the end of a launcher is a SIGTERM, so that no rank is left behind by one that was killed.

    Linux only: elsewhere nothing tells a process that another one has ended.
    """
    if sys.platform != "linux":
        return
    try:
        ends = [os.pidfd_open(number) for number in launchers()]
    except (ProcessLookupError, FileNotFoundError):  # it ended before this process was ready
        os.kill(os.getpid(), signal.SIGTERM)
        return
    if ends:
        threading.Thread(target=_follow, args=(ends,), daemon=True).start()


def _follow(ends: Sequence[int]) -> None:
    waiting = select.poll()
    for end in ends:
        waiting.register(end, select.POLLIN)
    waiting.poll()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ALONE)
    os._exit(1)  # a rank whose peers are gone waits for them for ever


def launchers() -> Iterator[int]:
    """Processes without which a rank has no reason to go on: `launch.sh`, the `deepspeed` command, its launch.py."""
    if script := os.environ.get("OMNIMEM_LAUNCHER"):
        yield int(script)
    if "LOCAL_RANK" in os.environ:
        parent = os.getppid()
        yield parent
        above = _parent(parent)
        if above > 1 and b"deepspeed" in Path(f"/proc/{above}/cmdline").read_bytes():
            yield above


def _parent(number: int) -> int:
    """The parent of a process; 0: none."""
    return int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1])
