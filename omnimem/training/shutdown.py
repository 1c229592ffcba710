"""A run is asked to stop by SIGTERM, SIGINT, SIGHUP (a closed terminal), or by the end of its launcher's process.

It finishes the current step, writes a checkpoint and exits with 128 + the signal number (143, 130, 129). All ranks stop
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

from omnimem.errors import Stopped
from omnimem.training.collectives import highest

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ALONE = 60.0  # seconds for a rank whose launcher has ended to finish its step and its checkpoint


@final
class ShutdownSignal(TrainerCallback):
    """Inside its `with` a signal is a request to stop, on which all ranks agree at the end of the step."""

    def __init__(self) -> None:
        self.asked = 0  # the signal that this rank received
        self.agreed = 0  # the signal that all ranks stop for

    def __enter__(self) -> "ShutdownSignal":
        wanted = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
        self.former = {number: signal.signal(number, self._ask) for number in wanted}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Restores the former handlers, except on the way out: the launcher then signals all remaining ranks.

        A request that came too late for the ranks to agree on it is raised again, so that it is never lost.
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
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the process at once

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save and stop when a rank was asked to; collective."""
        if self.agree(args.device):
            control.should_save = control.should_training_stop = True

    def agree(self, device: torch.device) -> int:
        """The signal that all ranks stop for; 0: none; collective."""
        self.agreed = highest(self.asked, device)
        return self.agreed


def follow_launcher() -> None:
    """From now on the end of a launcher raises SIGTERM here, so that no rank outlives a launcher that was killed.

    Linux only, which alone has file descriptors for processes.
    """
    if sys.platform != "linux":
        return
    try:
        ends = [os.pidfd_open(number) for number in launchers()]
    except (ProcessLookupError, FileNotFoundError):  # the launcher ended before this process was ready
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
    os._exit(1)  # a rank whose peers are gone would wait for ever


def launchers() -> Iterator[int]:
    """Process ids of the launchers of this rank: `launch.sh`, the `deepspeed` command, its launch.py."""
    if script := os.environ.get("OMNIMEM_LAUNCHER"):
        yield int(script)
    if "LOCAL_RANK" in os.environ:
        parent = os.getppid()
        yield parent
        above = _parent(parent)
        if above > 1 and b"deepspeed" in Path(f"/proc/{above}/cmdline").read_bytes():
            yield above


def _parent(number: int) -> int:
    """The parent of a process; 0 when it has no parent."""
    return int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1])
