"""Collective helpers, so that all ranks take the same branch and know the same samples."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from torch import distributed

T = TypeVar("T")
LIMIT = timedelta(days=30)  # of work that one rank does alone


def highest(number: int, device: torch.device) -> int:
    """All-reduce (max) of an integer; collective."""
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return number
    shared = torch.tensor(number, device=device)
    distributed.all_reduce(shared, op=distributed.ReduceOp.MAX)
    return int(shared)


@contextmanager
def first_rank_first(*, first: bool) -> Iterator[None]:
    """The first rank runs the block, then the others, however long it takes; collective.

    They wait in a group of their own: in the group of the run they would give up after train.ddp_timeout. When the
    first rank ends, its connection closes, and they end too.
    """
    many = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    group: Any = distributed.new_group(backend="gloo", timeout=LIMIT) if many else None
    if group is not None and not first:
        distributed.barrier(group)
    yield
    if group is not None and first:
        distributed.barrier(group)


def gather_lists(mine: Sequence[T], ranks: int) -> list[T]:
    """The lists of all ranks, concatenated in the order of the ranks; collective when there are several."""
    return list(mine) if ranks == 1 else gather_object(list(mine))
