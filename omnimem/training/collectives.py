"""What the ranks of a run must know of each other to do the same."""

import torch


def highest(number: int, device: torch.device) -> int:
    """The highest of the numbers that the ranks bring; every rank must ask."""
    group = torch.distributed
    if not group.is_available() or not group.is_initialized() or group.get_world_size() == 1:
        return number
    shared = torch.tensor(number, device=device)
    group.all_reduce(shared, op=group.ReduceOp.MAX)
    return int(shared)
