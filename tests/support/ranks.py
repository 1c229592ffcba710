"""Runs the entry points in processes forked from one that has imported everything."""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest.mock import patch

from support.paths import ROOT

LIMIT = 120.0  # seconds
First = Callable[[], None] | None  # called in each process before the script
SERVER = multiprocessing.get_context("forkserver")
# What the commands and DeepSpeed's engine import, once for all ranks; the last one brings torch's compiler.
PRELOADED = [
    *(f"omnimem.commands.{name}" for name in ("finetune", "evaluate")),
    *("torch.utils.tensorboard", "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"),
]
ON_CPU = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


@dataclass(frozen=True, kw_only=True)
class Ended:
    """Exit codes and outputs of a command, one per rank."""

    codes: tuple[int | None, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Started:
    """A running command: one process per rank, each with its own process group and log."""

    processes: tuple[ForkServerProcess, ...]
    logs: tuple[Path, ...]

    @property
    def output(self) -> str:
        return self.logs[0].read_text() if self.logs[0].exists() else ""

    def until(self, words: str) -> None:
        """Wait until the first rank has printed the words."""
        limit = time.monotonic() + LIMIT
        while words not in self.output:
            assert self.processes[0].is_alive(), self.output
            assert time.monotonic() < limit, self.output
            time.sleep(0.01)

    def end(self) -> Ended:
        """Wait for all; when one fails or after the time limit, kill the others."""
        _wait(self.processes)
        outputs = tuple(log.read_text() for log in self.logs)
        return Ended(codes=tuple(process.exitcode for process in self.processes), outputs=outputs)


def command(
    script: str, arguments: Sequence[str], folder: Path, *, ranks: int = 0, fails: bool = False, first: First = None
) -> Ended:
    """`python SCRIPT ARGUMENTS` in `folder`; with ranks, as the launcher starts them; all must end with 0, or 2."""
    ended = start(script, arguments, folder, ranks=ranks, first=first).end()
    expected = 2 if fails else 0
    assert set(ended.codes) == {expected}, "\n".join((str(ended.codes), *ended.outputs))
    return ended


def start(script: str, arguments: Sequence[str], folder: Path, *, ranks: int = 0, first: First = None) -> Started:
    """`python SCRIPT ARGUMENTS` in `folder`, not waited for."""
    SERVER.set_forkserver_preload(PRELOADED)
    with patch.dict(os.environ, ON_CPU):
        forkserver.ensure_running()
    processes, logs = [], []
    port = free_port()
    for rank in range(max(1, ranks)):
        environment = dict(ON_CPU)
        if ranks:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": "1"}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CROSS_RANK": "0"}
        logs.append(folder / f".{Path(script).stem}.{rank}.log")
        logs[-1].unlink(missing_ok=True)
        given = (script, list(arguments), str(folder), environment, str(logs[-1]), first)
        processes.append(SERVER.Process(target=enter, args=given))
        processes[-1].start()
    return Started(processes=tuple(processes), logs=tuple(logs))


def enter(script: str, arguments: list[str], folder: str, environment: dict[str, str], log: str, first: First) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.update(environment)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [script, *arguments]
    if first is not None:
        first()
    runpy.run_path(str(ROOT / script), run_name="__main__")


def _wait(processes: Sequence[ForkServerProcess]) -> None:
    """Wait for all; when one fails or after the time limit, kill the others."""
    limit = time.monotonic() + LIMIT
    while any(process.is_alive() for process in processes):
        failed = any(process.exitcode not in (None, 0) for process in processes)
        if time.monotonic() > limit or failed:
            for process in processes:
                process.join(5 if failed else 0)
                if process.is_alive():
                    os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.05)
    for process in processes:
        process.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
