"""The processes of one evaluation: ranks of the launcher, or shards (started by `evaluate.processes` or by the user).

Each answers its shard of the questions and appends to its own files. The leading process prepares the folders before,
and folds and summarises the results after all have finished (`omnimem.evaluation.results`). Another evaluation that is
started meanwhile is refused: it would move, fold or truncate their files.
"""

import fcntl
import os
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, final

import torch
from torch import distributed

from omnimem.evaluation import EvaluationError, Shard

LONGEST = timedelta(days=30)  # time-out of the wait for the slowest rank
OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "CROSS_SIZE")
SHOWN = 15  # lines of a failed helper
LOCK = ".eval.lock"  # in the run folder
PATIENCE = 10.0  # seconds for helpers whose evaluation was killed to end
HELPER = "OMNIMEM_HELPER"  # set in the processes that an evaluation starts: they write under its lock

Prepare = Callable[[bool], None]  # True: results of other settings may be moved away


class Workers(ABC):
    """How the processes of an evaluation cooperate."""

    leads: bool  # whether this process summarises the results

    @abstractmethod
    def claim(self, run: Path) -> AbstractContextManager[None]:
        """Lock the results of a run folder against other evaluations; raises EvaluationError if one is going on."""

    @abstractmethod
    def prepare(self, action: Prepare) -> None:
        """Prepare the folders before any process works in them."""

    @abstractmethod
    def work(self) -> AbstractContextManager[Shard]:
        """The shard of this process; when the block ends, all processes have finished."""


@final
class LocalWorkers(Workers):
    """This process as shard 0, and helpers that it starts with the same arguments and `--shard i/N`."""

    leads = True

    def __init__(self, processes: int, arguments: Sequence[str]) -> None:
        self._processes, self._arguments = processes, arguments
        self._lock: int | None = None

    @contextmanager
    def claim(self, run: Path) -> Iterator[None]:
        with _locked(run, fcntl.LOCK_EX) as self._lock:
            yield

    def prepare(self, action: Prepare) -> None:
        action(True)

    @contextmanager
    def work(self) -> Iterator[Shard]:
        own, *others = (Shard(index=index, count=self._processes) for index in range(self._processes))
        if others:
            cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
            threads = max(1, cores // self._processes)
            torch.set_num_threads(min(threads, torch.get_num_threads()))
        with ExitStack() as stack:
            joins = [stack.enter_context(_helper(shard, self._arguments, self._lock)) for shard in others]
            yield own
            for join in joins:
                join()


@contextmanager
def _locked(run: Path, kind: int) -> Iterator[int]:
    """A lock on the results of a run, until the end of the block and of every process that has its descriptor."""
    run.mkdir(parents=True, exist_ok=True)
    lock, until = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o644), time.monotonic() + PATIENCE
    try:
        while True:
            try:
                fcntl.flock(lock, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > until:
                    raise EvaluationError(
                        f"{run}: another evaluation is writing its results; wait until it has ended, or give the run "
                        "another name with name=..."
                    ) from error
                time.sleep(0.1)
        yield lock
    finally:
        os.close(lock)


@contextmanager
def _helper(shard: Shard, arguments: Sequence[str], lock: int | None) -> Iterator[Callable[[], None]]:
    """Another process of `omnimem evaluate`, killed at the end of the block; yields a function that waits for it.

    It holds `lock` too, so that no evaluation begins before it has ended, whatever becomes of this process.

    The function raises EvaluationError with the last lines of the process if it failed.
    """
    environment = {name: value for name, value in os.environ.items() if name not in OF_RANKS}
    environment |= {"LOCAL_RANK": str(shard.index), "OMNIMEM_LAUNCHER": str(os.getpid()), HELPER: "1"}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    command = [sys.executable, "-m", "omnimem", "evaluate", *arguments, "--shard", str(shard)]
    with tempfile.TemporaryFile("w+") as log:
        given = () if lock is None else (lock,)
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, pass_fds=given
        )

        def join() -> None:
            if code := process.wait():
                log.seek(0)
                last = log.read().splitlines()[-SHOWN:]
                raise EvaluationError("\n".join([f"a helper process ended with exit code {code}:", *last]))

        try:
            yield join
        finally:
            process.kill()
            process.wait()


@final
class RankWorkers(Workers):
    """The ranks of the launcher, one shard each."""

    def __init__(self) -> None:
        self._group: Any = None
        if distributed.is_initialized():  # its time-outs are those of training steps
            self._group = distributed.new_group(backend="gloo", timeout=LONGEST)
        else:
            distributed.init_process_group("gloo", timeout=LONGEST)
        self._rank, self._count = distributed.get_rank(), distributed.get_world_size()
        self.leads = self._rank == 0

    @contextmanager
    def claim(self, run: Path) -> Iterator[None]:
        with _locked(run, fcntl.LOCK_EX) if self.leads else nullcontext():
            yield

    def prepare(self, action: Prepare) -> None:
        if self.leads:
            action(True)
        distributed.barrier(self._group)

    @contextmanager
    def work(self) -> Iterator[Shard]:
        yield Shard(index=self._rank, count=self._count)
        distributed.barrier(self._group)


@final
class ShardWorker(Workers):
    """A process with --shard, independent of the others: the command without --shard summarises the results."""

    leads = False

    def __init__(self, shard: Shard) -> None:
        self._shard = shard

    @contextmanager
    def claim(self, run: Path) -> Iterator[None]:
        with nullcontext() if HELPER in os.environ else _locked(run, fcntl.LOCK_SH):
            yield

    def prepare(self, action: Prepare) -> None:
        action(False)

    @contextmanager
    def work(self) -> Iterator[Shard]:
        yield self._shard


def workers_of(given: Namespace, processes: int, arguments: Sequence[str]) -> Workers:
    """From `--shard`, the environment of the launcher, or `evaluate.processes`.

    Raises EvaluationError if --shard is wrong.
    """
    if given.shard is not None:
        return ShardWorker(Shard.parse(given.shard))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return RankWorkers()
    return LocalWorkers(processes, arguments)


def device() -> str:
    """Device of this process: a GPU by its local rank, in turn, or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
