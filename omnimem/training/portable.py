"""Portable state of a checkpoint: whole weights and optimizer state, to resume on other ranks or at another ZeRO stage.

It is written beside DeepSpeed's own files, from which only the same layout can resume, but bit for bit.
`portable.safetensors`: each trained weight in float32 by its name, and each quantity that the optimizer keeps per
weight as NAME::QUANTITY. `portable.json`: layout, steps and samples taken, schedule, and the optimizer's counters.
"""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NotRequired, final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch import distributed as dist
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer, TrainingArguments
from typing_extensions import TypedDict

from omnimem.errors import counted
from omnimem.run import RunError, read_json, write_json
from omnimem.training.deepspeed_internals import (
    float32_copies,
    full_shape,
    inner_optimizer,
    slice_of_group,
    slice_of_weight,
)
from omnimem.training.zero3 import whole
from omnimem.tuning import StreamedModel

WEIGHTS, FACTS = "portable.safetensors", "portable.json"
JOINT = "::"
SET = ("initial_lr", "weight_decay")  # of a parameter group: set by the run, not by its checkpoint
CURE = "continue with --resume auto, which takes the newest intact checkpoint"


@final
@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run is distributed; a resumed run may change all of it but the global batch."""

    ranks: int
    stage: int | None  # ZeRO stage; None: without DeepSpeed
    batch: int  # samples per rank and micro-step
    accumulated: int
    optimizer: str
    precision: str

    @classmethod
    def of(cls, trainer: Trainer) -> "Layout":
        """The layout of a trainer."""
        args, plugin = trainer.args, trainer.accelerator.state.deepspeed_plugin
        return cls(
            ranks=args.world_size,
            stage=plugin.zero_stage if plugin is not None else None,
            batch=args.per_device_train_batch_size,
            accumulated=args.gradient_accumulation_steps,
            optimizer=str(args.optim),
            precision="bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        )

    @property
    def global_batch(self) -> int:
        """Samples per step."""
        return self.ranks * self.batch * self.accumulated

    def same_files(self, other: "Layout") -> bool:
        """Whether a run of one layout can read the DeepSpeed files of the other."""
        mine, theirs = ((one.ranks, one.stage, one.optimizer, one.precision) for one in (self, other))
        return mine == theirs


class StoredLayout(TypedDict):
    """The fields of `Layout` in portable.json."""

    ranks: int
    stage: int | None
    batch: int
    accumulated: int
    optimizer: str
    precision: str


class Schedule(TypedDict):
    """Steps of the learning rate schedule so far."""

    steps: int


class Facts(TypedDict):
    """portable.json; the last two only beside portable.safetensors."""

    layout: StoredLayout
    step: int
    counters: NotRequired[dict[str, float]]
    schedule: NotRequired[Schedule]


@final
@dataclass(frozen=True)
class Piece:
    """The part of a weight that this rank's optimizer updates: `count` elements of `store` from `start`, float32."""

    store: Tensor
    start: int
    count: int
    at: int  # start in the flattened whole weight

    def of(self, stored: Tensor) -> Tensor:
        """The piece of a tensor that has the shape of `store`."""
        return stored.detach().view(-1).narrow(0, self.start, self.count)


@final
class State:
    """Trained weights and optimizer state of a run, whole or partitioned."""

    def __init__(self, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, engine: Any = None) -> None:
        """`engine` is DeepSpeed's; None without DeepSpeed."""
        # 1. the ZeRO stage, and float32 copies of half-precision weights
        self.weights, self.optimizer = weights, optimizer
        self.stage: int = 0 if engine is None else engine.zero_optimization_stage()
        wrapper: Any = None if engine is None else engine.optimizer
        half = engine is not None and not self.stage and (engine.bfloat16_enabled() or engine.fp16_enabled())
        copies = {id(weight): copy for weight, copy in float32_copies(wrapper)} if half else {}

        # 2. where the optimizer keeps its part of each weight
        def piece(weight: Tensor) -> Piece | None:
            if not self.stage:
                return Piece(store=copies.get(id(weight), weight), start=0, count=weight.numel(), at=0)
            part = (slice_of_weight if self.stage == 3 else slice_of_group)(wrapper, weight)
            return Piece(*part) if part is not None else None

        self.pieces = {name: piece(weight) for name, weight in weights.items()}

    @classmethod
    def of(cls, trainer: Trainer, model: StreamedModel) -> "State":
        """The state of a trainer that has built its engine and optimizer."""
        weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        engine: Any = trainer.model_wrapped if trainer.is_deepspeed_enabled else None
        optimizer: Any = trainer.optimizer
        return cls(weights, inner_optimizer(engine) if engine else optimizer.optimizer, engine)

    @property
    def quantities(self) -> tuple[str, ...]:
        """Names of the tensors that the optimizer keeps per weight, such as its moments."""
        kept = self._kept()
        return tuple(name for name, value in kept.items() if isinstance(value, Tensor) and value.dim())

    @property
    def counters(self) -> dict[str, float]:
        """The numbers that it keeps once, such as its step count."""
        return {name: float(value) for name, value in self._kept().items() if name not in self.quantities}

    def _kept(self) -> dict[str, Any]:
        kept = next(iter(self.optimizer.state.values()), {})
        return {name: value for name, value in kept.items() if value is not None}

    @property
    def portable(self) -> bool:
        """Whether the optimizer state holds only scalars and tensors of the shape of the weights."""
        return all(
            isinstance(value, int | float) or (isinstance(value, Tensor) and value.shape in (store.shape, ()))
            for store, kept in self.optimizer.state.items()
            for value in kept.values()
            if value is not None
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight and quantity, whole, on every rank; collective."""
        for name, piece in self.pieces.items():
            yield name, self._whole(name, None if piece is None else piece.of(piece.store))
            for quantity in self.quantities:
                part = None if piece is None else piece.of(self.optimizer.state[piece.store][quantity])
                yield f"{name}{JOINT}{quantity}", self._whole(name, part)

    def _whole(self, name: str, part: Tensor | None) -> Tensor:
        weight: Any = self.weights[name]
        shape = full_shape(weight) if self.stage == 3 else weight.shape
        full = torch.zeros(shape, dtype=torch.float32, device=weight.device)
        piece = self.pieces[name]
        if piece is not None and part is not None:
            full.view(-1).narrow(0, piece.at, piece.count).copy_(part)
        if self.stage:
            dist.all_reduce(full)
        return full

    @torch.no_grad()
    def restore(self, found: Any, counters: Mapping[str, float]) -> None:
        """Read everything from an open file of `tensors`; collective."""
        names = set(found.keys())
        # 1. weights, and their float32 copies
        for name, piece in self.pieces.items():
            full = found.get_tensor(name)
            self._set_weight(self.weights[name], full)
            if piece is not None:
                piece.of(piece.store).copy_(_part(piece, full))
        # 2. optimizer state
        for name, piece in self.pieces.items():
            if piece is None:
                continue
            kept = self.optimizer.state[piece.store]
            kept.update({counter: self._counter(piece.store, value) for counter, value in counters.items()})
            for key in (key for key in names if key.startswith(f"{name}{JOINT}")):
                quantity = key.rpartition(JOINT)[2]
                if not isinstance(kept.get(quantity), Tensor):
                    kept[quantity] = torch.zeros_like(piece.store)
                piece.of(kept[quantity]).copy_(_part(piece, found.get_tensor(key)))

    def _set_weight(self, weight: Any, full: Tensor) -> None:
        if self.stage != 3:
            weight.data.copy_(full)
            return
        with whole([weight], changed=True):
            weight.data.copy_(full)

    def _counter(self, store: Tensor, value: float) -> Tensor:
        fused = any(group.get("fused") or group.get("capturable") for group in self.optimizer.param_groups)
        return torch.tensor(value, dtype=torch.float32, device=store.device if fused else "cpu")


def _part(piece: Piece, full: Tensor) -> Tensor:
    return full.reshape(-1).narrow(0, piece.at, piece.count)


def write_portable(folder: Path, state: State, layout: Layout, step: int, schedule: Any) -> None:
    """Write the portable state into the folder of a checkpoint; collective, the first rank writes."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    facts: dict[str, Any] = {"layout": asdict(layout), "step": step, "samples": step * layout.global_batch}
    if state.portable and isinstance(schedule, LRScheduler):  # else only the same layout can resume
        tensors = {name: tensor.cpu() for name, tensor in state.tensors() if first}
        facts |= {"counters": state.counters, "schedule": {"steps": schedule.last_epoch}}
        if first:
            save_file(tensors, folder / WEIGHTS)
    if first:
        write_json(folder / FACTS, facts)


def restore_portable(folder: Path, state: State, schedule: LRScheduler) -> None:
    """Restore the portable state of a checkpoint; collective. `schedule` is a new one, which is advanced."""
    facts = read_json(folder / FACTS, Facts, CURE)
    with safe_open(folder / WEIGHTS, framework="pt") as found:
        state.restore(found, facts["counters"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")  # before any optimizer step
        for _ in range(facts["schedule"]["steps"]):  # its state_dict depends on the number of parameter groups
            schedule.step()


@final
@dataclass(frozen=True)
class Recipe:
    """Peak learning rate and weight decay of each parameter group by the settings of this run."""

    groups: tuple[Mapping[str, Any], ...]

    @classmethod
    def of(cls, optimizer: Any) -> "Recipe":
        """That of an optimizer with a schedule, before a checkpoint is loaded into it."""
        return cls(tuple({name: group[name] for name in SET if name in group} for group in optimizer.param_groups))

    def restore(self, optimizer: Any, schedule: object) -> None:
        """Replace the values of the checkpoint, after it was loaded; the step that was reached stays."""
        if not isinstance(schedule, LambdaLR):  # has a state of its own; `train_changes` refuses changes
            return
        for group, values in zip(optimizer.param_groups, self.groups, strict=True):
            group.update(values)
        schedule.base_lrs = [values["initial_lr"] for values in self.groups]
        follow_schedule(schedule)


def follow_schedule(schedule: object) -> None:
    """Set the learning rate of the next step by the schedule, whose settings may differ from those of the checkpoint.

    The checkpoint's optimizer holds the rate by the former ones. Other schedules than functions of the step keep their
    state.
    """
    if isinstance(schedule, LambdaLR):
        rates = [
            base * factor(schedule.last_epoch)
            for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        schedule._last_lr = rates


def layout_of(folder: Path) -> Layout | None:
    """The layout of the run that wrote a checkpoint; None when it has no portable state."""
    path = folder / FACTS
    return Layout(**read_json(path, Facts, CURE)["layout"]) if path.is_file() else None


def needs_portable(folder: Path, now: Layout) -> bool:
    """Whether this layout can resume from the portable state of the checkpoint only.

    Raises RunError when the checkpoint has no such state.
    """
    before = layout_of(folder)
    if before is None or before.same_files(now):
        return False
    if not (folder / WEIGHTS).is_file():
        raise RunError(
            f"{folder}: the state of {before.optimizer} or of its schedule cannot be moved to another layout; resume "
            f"with {counted(before.ranks, 'rank')}, ZeRO stage {before.stage} and {before.precision} (now {now.ranks}, "
            f"{now.stage}, {now.precision}), or set train.optim=adamw_torch in a new run"
        )
    return True


def refuse_other_batch(folder: Path, section: Mapping[str, Any], ranks: int) -> None:
    """Raises RunError when the global batch differs from the checkpoint's: samples would be skipped or repeated."""
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
        f"{folder} was written with {counted(before.global_batch, 'sample')} per step "
        f"({counted(before.ranks, 'rank')} x {before.batch} x "
        f"{before.accumulated} accumulated), now it would be {now} ({ranks} x {batch} x {accumulated}): samples would "
        f"be skipped or repeated; set {cure}"
    )
