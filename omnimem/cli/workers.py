"""The processes of one evaluation: ranks of the launcher, or shards (started by `evaluate.processes` or by the user).

Each answers its shard of the questions and appends to its own files. The leading process prepares the folders before,
and folds and summarises the results after all have finished (`omnimem.evaluation.results`).
"""

import os
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from typing import Any, final

import torch
from torch import distributed

from omnimem.evaluation import EvaluationError, Shard

LONGEST = timedelta(days=30)  # time-out of the wait for the slowest rank
OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "CROSS_SIZE")
SHOWN = 15  # lines of a failed helper

Prepare = Callable[[bool], None]  # True: results of other settings may be moved away


class Workers(ABC):
    """How the processes of an evaluation cooperate."""

    leads: bool  # whether this process summarises the results

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
            joins = [stack.enter_context(_helper(shard, self._arguments)) for shard in others]
            yield own
            for join in joins:
                join()


@contextmanager
def _helper(shard: Shard, arguments: Sequence[str]) -> Iterator[Callable[[], None]]:
    """Another process of `omnimem evaluate`, killed at the end of the block; yields a function that waits for it.

    The function raises EvaluationError with the last lines of the process if it failed.
    """
    environment = {name: value for name, value in os.environ.items() if name not in OF_RANKS}
    environment |= {"LOCAL_RANK": str(shard.index), "OMNIMEM_LAUNCHER": str(os.getpid())}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    command = [sys.executable, "-m", "omnimem", "evaluate", *arguments, "--shard", str(shard)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)

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
