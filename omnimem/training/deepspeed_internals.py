"""Every attribute of DeepSpeed outside its documented interface that this package uses, one small function each.

Tested with DeepSpeed 0.19.2 and 0.19.8; before 0.19.2 the engine casts the frequencies of RoPE to half precision. Each
function raises RunError when the installed version is outside the range that `pyproject.toml` allows, or when an
attribute is missing, instead of reading the wrong tensor.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from typing import Any

from torch import Tensor, distributed, nn

from omnimem.run import RunError

TESTED = ("0.19.2", "0.19.8")
FIRST, BELOW = (0, 19, 2), (0, 20)  # range of versions, as in pyproject.toml


def inner_optimizer(engine: Any) -> Any:
    """The torch optimizer inside the engine."""
    return _get(engine, "basic_optimizer")


def float32_copies(optimizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """ZeRO-0 in half precision: pairs of a weight and its float32 copy, which the optimizer updates."""
    for weights, copies in zip(_get(optimizer, "fp16_groups"), _get(optimizer, "fp32_groups"), strict=True):
        yield from zip(weights, copies, strict=True)


def slice_of_group(optimizer: Any, weight: Any) -> tuple[Tensor, int, int, int] | None:
    """ZeRO-1 and 2: the slice of a weight in this rank's part of the flattened parameter group; None: no element.

    Returns (float32 store, start in the store, number of elements, start in the flattened weight).
    """
    mapping = _get(weight, "_hp_mapping")
    if mapping is None:
        return None
    stores = _get(optimizer, "single_partition_of_fp32_groups")
    kept, low = _get(mapping, "hp_fragment_address"), _get(mapping, "lp_fragment_address")
    return stores[_get(mapping, "param_group_index")], kept.start, kept.numel, low.start


def slice_of_weight(optimizer: Any, weight: Any) -> tuple[Tensor, int, int, int] | None:
    """ZeRO-3: this rank's slice of a weight, whose last slices may be padded; None: padding only.

    Returns the same as `slice_of_group`.
    """
    group, start, count = _get(optimizer, "grad_position")[_get(optimizer, "get_param_id")(weight)]
    at = count * distributed.get_rank()
    count = min(count, _get(weight, "ds_numel") - at)
    return (_get(optimizer, "fp32_partitioned_groups_flat")[group], start, count, at) if count > 0 else None


def full_shape(weight: Any) -> Sequence[int]:
    """ZeRO-3: the shape of a weight before it was partitioned."""
    return _get(weight, "ds_shape")


def keep_gradient_norm(engine: Any) -> None:
    """ZeRO-0 in float32: the engine then knows the norm of its gradients before clipping, as at the other stages."""
    step, known, norm = engine.step, engine.get_global_grad_norm, 0.0

    def measured(*args: Any, **settings: Any) -> Any:
        nonlocal norm
        norm = float(nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]))
        return step(*args, **settings)

    engine.step = measured
    engine.get_global_grad_norm = lambda: norm if (found := known()) is None else found


def remove_gathering_hooks(engine: Any) -> None:
    """ZeRO-3: remove the module hooks that gather and partition weights."""
    _get(_get(_get(engine, "optimizer"), "parameter_offload"), "destroy")()


def gather(parameters: Sequence[Any]) -> None:
    """ZeRO-3: all-gather the parameters; collective."""
    if parameters:
        _get(parameters[0], "all_gather")(param_list=list(parameters))


def release(parameters: Sequence[Any], *, changed: bool = False) -> None:
    """ZeRO-3: partition the parameters again; `changed` writes their new values into the partitions."""
    if parameters:
        _get(parameters[0], "partition")(param_list=list(parameters), has_been_updated=changed)


@contextmanager
def same_buffer_types(model: nn.Module) -> Iterator[None]:
    """Raises RunError if a buffer has another type after the block, in which an engine is built.

    In bfloat16 a frequency of RoPE is off by up to 2^-9 of itself, and an angle at position 32,768 by many turns.
    """
    before = {name: buffer.dtype for name, buffer in model.named_buffers()}
    yield
    for name, buffer in model.named_buffers():
        if (was := before.get(name, buffer.dtype)) != buffer.dtype:
            raise RunError(
                f"DeepSpeed {_installed()} has cast {name} from {was} to {buffer.dtype}, which changes every position; "
                f"install DeepSpeed {_allowed()}, or train without train.deepspeed"
            )


def _allowed() -> str:
    return f">={'.'.join(map(str, FIRST))},<{'.'.join(map(str, BELOW))}"


def _get(owner: Any, name: str) -> Any:
    """An attribute of a DeepSpeed object. Raises RunError when it is missing or the version is not supported."""
    found = _installed()
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:3])
    what = None if hasattr(owner, name) else f"{type(owner).__name__} has no attribute {name}"
    if not FIRST <= numbers < BELOW:
        what = "this version is not supported"
    if what is not None:
        raise RunError(
            f"DeepSpeed {found}: {what}; tested with {', '.join(TESTED)}; install a version {_allowed()}, or train "
            "without train.deepspeed"
        )
    return getattr(owner, name)


@cache
def _installed() -> str:
    return version("deepspeed")
