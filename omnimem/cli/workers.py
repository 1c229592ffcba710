"""Processes that share one evaluation: helpers of this one, ranks of the launcher, or shards that a user starts.

Each answers its share of the questions and appends to files of its own; the first one prepares the folders before, and
draws up the results after, when nobody else is at work (`omnimem.evaluation.results`).
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
from pathlib import Path
from typing import Any, final

import torch
from torch import distributed

from omnimem.evaluation import EvaluationError, Share

LONGEST = timedelta(days=30)  # that the first rank waits for the last one
OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "CROSS_SIZE")
SHOWN = 15  # lines of a helper that failed

Prepare = Callable[[bool], None]  # told whether results of other settings may be set aside


class Workers(ABC):
    """How the processes of an evaluation keep together."""

    leads: bool  # whether this one draws up the results

    @abstractmethod
    def prepare(self, action: Prepare) -> None:
        """Have the folders made ready before anybody works in them."""

    @abstractmethod
    def work(self) -> AbstractContextManager[Share]:
        """What this process does; the end of the block is reached when all have done theirs."""


@final
class LocalWorkers(Workers):
    """This process, and helpers that it starts with the same arguments; they claim their work item by item."""

    leads = True

    def __init__(self, processes: int, arguments: Sequence[str]) -> None:
        self._processes, self._arguments = processes, arguments

    def prepare(self, action: Prepare) -> None:
        action(True)

    @contextmanager
    def work(self) -> Iterator[Share]:
        if self._processes == 1:
            yield Share()
            return
        threads = max(1, _cores() // self._processes)
        torch.set_num_threads(min(threads, torch.get_num_threads()))
        with ExitStack() as stack:
            claims = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            helpers = [_Helper(number, self._processes, claims, self._arguments) for number in self._numbers()]
            for helper in helpers:
                stack.callback(helper.end)
            yield Share(index=0, count=self._processes, claims=claims)
            for helper in helpers:
                helper.join()

    def _numbers(self) -> range:
        return range(1, self._processes)


@final
class _Helper:
    """Another process of `train/evaluate.py`; it ends when this one does."""

    def __init__(self, number: int, count: int, claims: Path, arguments: Sequence[str]) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `end`
        environment = {name: value for name, value in os.environ.items() if name not in OF_RANKS}
        environment |= {"LOCAL_RANK": str(number), "OMNIMEM_LAUNCHER": str(os.getpid())}
        environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
        share = ["--shard", f"{number}/{count}", "--claims", str(claims)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "omnimem", "evaluate", *arguments, *share],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=environment,
        )

    def join(self) -> None:
        """Wait for its end; EvaluationError says what went wrong."""
        code = self._process.wait()
        if code:
            self._log.seek(0)
            said = self._log.read().splitlines()[-SHOWN:]
            raise EvaluationError("\n".join([f"a helper process ended with exit code {code}:", *said]))

    def end(self) -> None:
        """End it if it still runs."""
        self._process.kill()
        self._process.wait()
        self._log.close()


@final
class RankWorkers(Workers):
    """The processes of the launcher: every world-size-th item."""

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
    def work(self) -> Iterator[Share]:
        yield Share(index=self._rank, count=self._count)
        distributed.barrier(self._group)


@final
class ShardWorker(Workers):
    """One of several processes that know nothing of each other, or a helper: somebody else draws up the results."""

    leads = False

    def __init__(self, share: Share) -> None:
        self._share = share

    def prepare(self, action: Prepare) -> None:
        if self._share.claims is None:
            action(False)

    @contextmanager
    def work(self) -> Iterator[Share]:
        yield self._share


def workers_of(given: Namespace, processes: int, arguments: Sequence[str]) -> Workers:
    """By `--shard`, by the launcher's environment, or as many processes as the config says.

    Raises EvaluationError when --shard names none.
    """
    if given.shard is not None:
        share = Share.parse(given.shard)
        return ShardWorker(Share(index=share.index, count=share.count, claims=given.claims))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return RankWorkers()
    return LocalWorkers(processes, arguments)


def device() -> str:
    """Where this process computes: the GPU of its number on this machine, in turn, or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def _cores() -> int:
    """Of those that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
