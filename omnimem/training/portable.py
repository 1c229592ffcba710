"""What a run needs to go on with another number of ranks or another ZeRO stage: whole weights and optimizer state.

It lies in every checkpoint beside DeepSpeed's own files, which the same ranks go on from bit for bit and others cannot
read. `portable.safetensors`: each trained weight in float32 by its name, and each quantity that the optimizer keeps per
weight as NAME::QUANTITY. `portable.json`: layout, steps and samples taken, schedule, and the optimizer's counters.
"""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch import distributed as dist
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainingArguments

from omnimem.run import RunError, read_json, write_json
from omnimem.training.zero3 import whole

WEIGHTS, FACTS = "portable.safetensors", "portable.json"
JOINT = "::"


@final
@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run is dealt out; only the global batch must stay when it goes on."""

    ranks: int
    stage: int | None  # of ZeRO; None: without DeepSpeed
    batch: int  # samples of a rank and micro-step
    accumulated: int
    optimizer: str
    precision: str

    @property
    def global_batch(self) -> int:
        """Samples of a step."""
        return self.ranks * self.batch * self.accumulated

    def same_files(self, other: "Layout") -> bool:
        """Whether DeepSpeed's own files of one serve the other."""
        mine, theirs = ((one.ranks, one.stage, one.optimizer, one.precision) for one in (self, other))
        return mine == theirs


@final
@dataclass(frozen=True, kw_only=True)
class Piece:
    """The part of a weight that this rank's optimizer keeps: `count` numbers of `store` from `start`, in float32."""

    store: Tensor
    start: int
    count: int
    at: int  # place in the whole weight, flattened

    def of(self, stored: Tensor) -> Tensor:
        """The piece of something that the optimizer keeps in the same shape."""
        return stored.detach().view(-1).narrow(0, self.start, self.count)


@final
class State:
    """Trained weights and optimizer state of a run, wherever they are kept."""

    def __init__(self, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, engine: Any = None) -> None:
        """`engine` is DeepSpeed's, where there is one."""
        self.weights, self.optimizer = weights, optimizer
        self.stage: int = 0 if engine is None else engine.zero_optimization_stage()
        self._wrapper: Any = None if engine is None else engine.optimizer
        half = engine is not None and not self.stage and (engine.bfloat16_enabled() or engine.fp16_enabled())
        masters = dict(self._masters()) if half else {}
        kinds = {1: self._sliced, 2: self._sliced, 3: self._dealt}
        whole_weight = partial(_undivided, masters)
        self.pieces = {name: kinds.get(self.stage, whole_weight)(weight) for name, weight in weights.items()}

    def _masters(self) -> Iterator[tuple[int, Tensor]]:
        """Float32 copies of half-precision weights, under ZeRO-0."""
        for weights, copies in zip(self._wrapper.fp16_groups, self._wrapper.fp32_groups, strict=True):
            yield from zip(map(id, weights), copies, strict=True)

    def _sliced(self, weight: Any) -> Piece | None:
        """ZeRO-1 and 2: the ranks share all weights of a group, laid end to end; this one may keep nothing of it."""
        found = weight._hp_mapping
        if found is None:
            return None
        store = self._wrapper.single_partition_of_fp32_groups[found.param_group_index]
        kept = found.hp_fragment_address
        return Piece(store=store, start=kept.start, count=kept.numel, at=found.lp_fragment_address.start)

    def _dealt(self, weight: Any) -> Piece | None:
        """ZeRO-3: the ranks share each weight, the last of them with padding."""
        group, start, count = self._wrapper.grad_position[self._wrapper.get_param_id(weight)]
        at = count * dist.get_rank()
        count = min(count, weight.ds_numel - at)
        store = self._wrapper.fp32_partitioned_groups_flat[group]
        return Piece(store=store, start=start, count=count, at=at) if count > 0 else None

    @property
    def quantities(self) -> tuple[str, ...]:
        """What the optimizer keeps for every weight, such as its moments."""
        kept = self._kept()
        return tuple(name for name, value in kept.items() if isinstance(value, Tensor) and value.dim())

    @property
    def counters(self) -> dict[str, float]:
        """What it keeps once, such as the number of its steps."""
        return {name: float(value) for name, value in self._kept().items() if name not in self.quantities}

    def _kept(self) -> dict[str, Any]:
        kept = next(iter(self.optimizer.state.values()), {})
        return {name: value for name, value in kept.items() if value is not None}

    @property
    def portable(self) -> bool:
        """Whether all that the optimizer keeps is a number per weight, or one in all."""
        return all(
            isinstance(value, int | float) or (isinstance(value, Tensor) and value.shape in (store.shape, ()))
            for store, kept in self.optimizer.state.items()
            for value in kept.values()
            if value is not None
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight and quantity, whole, on every rank; every rank asks."""
        for name, piece in self.pieces.items():
            yield name, self._whole(name, None if piece is None else piece.of(piece.store))
            for quantity in self.quantities:
                part = None if piece is None else piece.of(self.optimizer.state[piece.store][quantity])
                yield f"{name}{JOINT}{quantity}", self._whole(name, part)

    def _whole(self, name: str, part: Tensor | None) -> Tensor:
        weight: Any = self.weights[name]
        shape = weight.ds_shape if self.stage == 3 else weight.shape
        full = torch.zeros(shape, dtype=torch.float32, device=weight.device)
        piece = self.pieces[name]
        if piece is not None and part is not None:
            full.view(-1).narrow(0, piece.at, piece.count).copy_(part)
        if self.stage:
            dist.all_reduce(full)
        return full

    @torch.no_grad()
    def restore(self, found: Any, counters: Mapping[str, float]) -> None:
        """Take everything from an open file of `tensors`; every rank does."""
        names = set(found.keys())
        for name, piece in self.pieces.items():
            full = found.get_tensor(name)
            self._set_weight(self.weights[name], full)
            if piece is not None:
                piece.of(piece.store).copy_(self._mine(piece, full))
        for name, piece in self.pieces.items():
            if piece is None:
                continue
            kept = self.optimizer.state[piece.store]
            kept.update({counter: self._counter(piece.store, value) for counter, value in counters.items()})
            for key in (key for key in names if key.startswith(f"{name}{JOINT}")):
                quantity = key.rpartition(JOINT)[2]
                if not isinstance(kept.get(quantity), Tensor):
                    kept[quantity] = torch.zeros_like(piece.store)
                piece.of(kept[quantity]).copy_(self._mine(piece, found.get_tensor(key)))

    def _set_weight(self, weight: Any, full: Tensor) -> None:
        if self.stage != 3:
            weight.data.copy_(full)
            return
        with whole([weight], changed=True):
            weight.data.copy_(full)

    def _mine(self, piece: Piece, full: Tensor) -> Tensor:
        return full.reshape(-1).narrow(0, piece.at, piece.count)

    def _counter(self, store: Tensor, value: float) -> Tensor:
        fused = any(group.get("fused") or group.get("capturable") for group in self.optimizer.param_groups)
        return torch.tensor(value, dtype=torch.float32, device=store.device if fused else "cpu")


def _undivided(masters: Mapping[int, Tensor], weight: Tensor) -> Piece:
    return Piece(store=masters.get(id(weight), weight), start=0, count=weight.numel(), at=0)


def write_portable(folder: Path, state: State, layout: Layout, step: int, schedule: Any) -> None:
    """Into the folder of a checkpoint; every rank takes part and the first one writes."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    facts: dict[str, Any] = {"layout": asdict(layout), "step": step, "samples": step * layout.global_batch}
    if state.portable and isinstance(schedule, LRScheduler):  # else only the same layout can go on
        tensors = {name: tensor.cpu() for name, tensor in state.tensors() if first}
        facts |= {"counters": state.counters, "schedule": {"steps": schedule.last_epoch}}
        if first:
            save_file(tensors, folder / WEIGHTS)
    if first:
        write_json(folder / FACTS, facts)


def restore_portable(folder: Path, state: State, schedule: LRScheduler) -> None:
    """From the folder of a checkpoint, on every rank; the schedule of the learning rate is a new one."""
    facts = read_json(folder / FACTS)
    with safe_open(folder / WEIGHTS, framework="pt") as found:
        state.restore(found, facts["counters"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")  # before any optimizer step
        for _ in range(facts["schedule"]["steps"]):  # its own state is as long as the list of parameter groups
            schedule.step()


def layout_of(folder: Path) -> Layout | None:
    """How a checkpoint's run was dealt out; None where that was not noted."""
    path = folder / FACTS
    return Layout(**read_json(path)["layout"]) if path.is_file() else None


def needs_portable(folder: Path, now: Layout) -> bool:
    """Whether DeepSpeed's own files of the checkpoint are of no use in this layout.

    Raises RunError when there is nothing else.
    """
    before = layout_of(folder)
    if before is None or before.same_files(now):
        return False
    if not (folder / WEIGHTS).is_file():
        raise RunError(
            f"{folder}: what {before.optimizer} or its schedule keeps cannot be dealt out anew; go on with "
            f"{before.ranks} ranks, ZeRO stage {before.stage} and {before.precision} (now {now.ranks}, {now.stage}, "
            f"{now.precision}), and set train.optim=adamw_torch in runs that should move"
        )
    return True


def refuse_other_batch(folder: Path, section: Mapping[str, Any], ranks: int) -> None:
    """Raises RunError when a step would take another number of samples than before: some would be lost or repeated."""
    before = layout_of(folder)
    usual: dict[str, Any] = {each.name: each.default for each in fields(TrainingArguments)}
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    batch, accumulated = (int(section.get(name) or usual[name]) for name in names)
    now = ranks * batch * accumulated
    if before is None or before.global_batch == now:
        return
    fits, rest = divmod(before.global_batch, ranks * batch)
    cure = (
        f"ranks and train.per_device_train_batch_size whose product divides {before.global_batch}"
        if rest
        else f"train.gradient_accumulation_steps={fits}"
    )
    raise RunError(
        f"{folder} was made with {before.global_batch} samples a step ({before.ranks} ranks x {before.batch} x "
        f"{before.accumulated} accumulated), now it would be {now} ({ranks} x {batch} x {accumulated}): samples would "
        f"be lost or taken twice; set {cure}"
    )
