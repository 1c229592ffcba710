"""What each step of a run uses: budget and temperature, as functions of (seed, step) alone."""

import hashlib
from dataclasses import dataclass, field
from typing import Literal, final

from omnimem.selection import SelectionOptions, Softness
from omnimem.tuning.lora import LoraOptions
from omnimem.tuning.losses import LossOptions


@final
@dataclass(frozen=True, kw_only=True)
class TuningOptions:
    """How the model is tuned under its budget."""

    lora: LoraOptions = field(default_factory=LoraOptions)
    gradient: Literal["full"] = "full"
    recompute: Literal["none", "chunk", "layer"] = "chunk"  # what of the activations lives: all, a chunk, a layer of it
    offload: bool = False  # memories wait on the host between forward and backward
    selection: SelectionOptions = field(default_factory=SelectionOptions)
    budgets: tuple[int | Literal["full"], ...] = ()  # slots per layer, one drawn a step; empty: memory.slots_per_layer
    loss: LossOptions = field(default_factory=LossOptions)

    def __post_init__(self) -> None:
        for slots in self.budgets:
            if slots != "full" and slots < 1:
                raise ValueError(f"tuning.budgets holds {slots}; a budget is at least 1 slot per layer, or full")


@final
@dataclass(frozen=True, kw_only=True)
class Step:
    """The budget and softness of one optimizer step; slots None: full memory; softness None: hard selection."""

    slots: int | None
    softness: Softness | None


@final
@dataclass(frozen=True, kw_only=True)
class Plan:
    """Draws for every step; resuming needs no state."""

    options: TuningOptions
    slots_per_layer: int
    seed: int

    def __call__(self, step: int, steps: int) -> Step:
        """What step number `step` (from 0) of `steps` uses; each lap through the list of budgets is a permutation."""
        budgets = self.options.budgets or (self.slots_per_layer,)
        lap, place = divmod(step, len(budgets))
        order = sorted(range(len(budgets)), key=lambda number: _hash(self.seed, lap, number))
        drawn = budgets[order[place]]
        slots = None if drawn == "full" else int(drawn)
        softness = None if slots is None else self.options.selection.at(step / max(1, steps - 1))
        return Step(slots=slots, softness=softness)


def _hash(*numbers: int) -> bytes:
    return hashlib.sha256(repr(numbers).encode()).digest()
