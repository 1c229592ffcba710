"""Collective helpers, so that all ranks take the same branch and know the same samples."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from accelerate.utils import gather_object
from torch import distributed

T = TypeVar("T")


def highest(number: int, device: torch.device) -> int:
    """All-reduce (max) of an integer; collective."""
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return number
    shared = torch.tensor(number, device=device)
    distributed.all_reduce(shared, op=distributed.ReduceOp.MAX)
    return int(shared)


def gather_lists(mine: Sequence[T], ranks: int) -> list[T]:
    """The lists of all ranks, concatenated in the order of the ranks; collective when there are several."""
    return list(mine) if ranks == 1 else gather_object(list(mine))
