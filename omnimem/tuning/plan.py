"""Budget, chunk size and temperature of each step, as functions of (seed, step) alone."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, final

from omnimem.backbones import Encoded, LayoutError
from omnimem.errors import counted
from omnimem.selection import SelectionOptions, Softness
from omnimem.tuning.curriculum import BudgetRange, ChunkRange, shuffled_cycle, uniform
from omnimem.tuning.gradient.options import NOT_THE_INPUT, Horizon, Mode, Recompute, check_settings
from omnimem.tuning.lora import LoraOptions
from omnimem.tuning.losses import LossOptions

LARGEST_SHARE = 4.0  # of memory.slots_per_layer: 8192.0 is a number of slots that was written with a point


@final
@dataclass(frozen=True, kw_only=True)
class TuningOptions:
    """Options of fine-tuning under a budget."""

    lora: LoraOptions = field(default_factory=LoraOptions)
    gradient: Mode = "full"  # backpropagation through the stream (docs/tuning.md)
    horizon: Horizon = "all"  # gradient: full only; number of chunks before a loss that get its gradient
    stop_layer: int | None = None  # released, paper: number of layers that process chunks; None: half of them
    recompute: Recompute = "chunk"  # granularity of activation recomputation
    offload: bool = False  # keep memories on the host between forward and backward
    selection: SelectionOptions = field(default_factory=SelectionOptions)
    # slots per layer, drawn for every step: a number, self (memory.slots_per_layer), a share of that (0.5), or full;
    # empty: self
    budgets: tuple[int | float | Literal["full", "self"], ...] | BudgetRange = ()
    # maximum chunk size, drawn for every step; empty: stream.chunk_tokens
    chunk_tokens: tuple[int, ...] | ChunkRange = ()
    loss: LossOptions = field(default_factory=LossOptions)
    overlap_every: int = 50  # steps between two measurements of `selection_overlap`; 0: none

    def __post_init__(self) -> None:
        check_settings(self.gradient, self.horizon, self.stop_layer, self.selection.softening)
        if self.lora.modules_to_save and self.gradient in NOT_THE_INPUT:
            raise ValueError(
                f"lora.modules_to_save learns nothing with gradient: {self.gradient}, which passes no gradient to the "
                "embeddings of a chunk; set gradient: full, or paper to learn from the last chunk alone"
            )
        if self.overlap_every < 0:
            raise ValueError(f"tuning.overlap_every = {self.overlap_every} must be at least 1 step, or 0 for never")
        for slots in () if isinstance(self.budgets, BudgetRange) else self.budgets:
            if isinstance(slots, float) and not 0 < slots <= LARGEST_SHARE:
                raise ValueError(
                    f"tuning.budgets holds {slots}; a number with a point is a share of memory.slots_per_layer, "
                    f"above 0 and at most {LARGEST_SHARE:g}; write slots as a whole number"
                )
            if isinstance(slots, int) and slots < 1:
                raise ValueError(f"tuning.budgets holds {slots}; a budget is at least 1 slot per layer, self or full")
        for tokens in () if isinstance(self.chunk_tokens, ChunkRange) else self.chunk_tokens:
            if tokens < 1:
                raise ValueError(f"tuning.chunk_tokens holds {tokens}; a chunk has at least 1 token")

    def slots(self, slots_per_layer: int) -> tuple[int | None, ...]:
        """The budgets that steps may use, or the ends of a range; None: full memory."""
        budgets = self.budgets
        if isinstance(budgets, BudgetRange):
            return (budgets.low, budgets.high, None) if budgets.full else (budgets.low, budgets.high)
        sizes = {"full": None, "self": slots_per_layer}
        return tuple(
            round(slots * slots_per_layer) if isinstance(slots, float) else sizes.get(f"{slots}", slots)
            for slots in budgets or ("self",)
        )

    def at(self, slots_per_layer: int) -> "TuningOptions":
        """The same options with the slots of this budget in place of self and of shares."""
        if isinstance(self.budgets, BudgetRange) or not self.budgets:
            return self
        return replace(self, budgets=tuple("full" if slots is None else slots for slots in self.slots(slots_per_layer)))

    def trains(self, slots_per_layer: int) -> bool:
        """Whether steps may draw this budget; a list of `full` alone is a control, which is for no budget."""
        budgets, drawn = self.budgets, self.slots(slots_per_layer)
        if isinstance(budgets, BudgetRange):
            return budgets.low <= slots_per_layer <= budgets.high and budgets.full < 1
        return slots_per_layer in drawn or set(drawn) == {None}

    def chunks(self, chunk_tokens: int) -> tuple[int, int]:
        """The smallest and largest maximum chunk size that steps may use."""
        sizes = self.chunk_tokens
        if isinstance(sizes, ChunkRange):
            return sizes.low, sizes.high
        return min(sizes, default=chunk_tokens), max(sizes, default=chunk_tokens)

    def check_segments(self, segments: Iterable[Encoded]) -> None:
        """Raise LayoutError if a step may draw a chunk size that is too small for one of the segments."""
        smallest, largest = self.chunks(0)[0], max((segment.count for segment in segments), default=0)
        if self.chunk_tokens and largest > smallest:
            raise LayoutError(
                f"tuning.chunk_tokens: a segment has {counted(largest, 'token')}, more than a chunk of {smallest}; "
                "raise tuning.chunk_tokens, or lower stream.max_pixels or stream.fps"
            )


@final
@dataclass(frozen=True, kw_only=True)
class Step:
    """The settings of one optimizer step."""

    slots: int | None  # per layer; None: full memory
    softness: Softness | None  # None: hard selection
    chunk_tokens: int  # longest chunk


@final
@dataclass(frozen=True, kw_only=True)
class Plan:
    """Draws the settings of every step, equal on all ranks and without state to resume."""

    options: TuningOptions
    slots_per_layer: int
    chunk_tokens: int  # of evaluation
    seed: int

    def __call__(self, step: int, steps: int) -> Step:
        """The settings of step number `step` (from 0) of `steps`."""
        slots = self._slots(step)
        softness = None if slots is None else self.options.selection.at(step / max(1, steps - 1))
        return Step(slots=slots, softness=softness, chunk_tokens=self._chunk_tokens(step))

    def untrained(self, steps: int) -> list[str]:
        """A warning if none of so few steps draws the budget of evaluation, or any budget of a range."""
        wanted, ranged = self.slots_per_layer, isinstance(self.options.budgets, BudgetRange)
        drawn = (self._slots(step) for step in range(steps))
        control = set(self.options.slots(wanted)) == {None}
        if control or any(slots == wanted or (ranged and slots is not None) for slots in drawn):
            return []
        what = (
            f"none of the {counted(steps, 'step')} trains at memory.slots_per_layer = {wanted}, at which the run "
            "is evaluated"
        )
        return [f"tuning.budgets: {what}; raise train.max_steps, or set tuning.budgets=[self]"]

    def budget(self, step: int) -> str:
        """The name of a step's curve in the metrics: its slots, the interval of a range, or full."""
        budgets, slots = self.options.budgets, self._slots(step)
        if slots is None:
            return "full"
        return budgets.band(slots) if isinstance(budgets, BudgetRange) else f"{slots}"

    def _slots(self, step: int) -> int | None:
        budgets = self.options.budgets
        if isinstance(budgets, BudgetRange):
            return budgets.at(uniform(self.seed, step, "budgets"))
        return shuffled_cycle(self.options.slots(self.slots_per_layer), step, self.seed)

    def _chunk_tokens(self, step: int) -> int:
        sizes = self.options.chunk_tokens
        if isinstance(sizes, ChunkRange):
            return sizes.at(uniform(self.seed, step, "chunk_tokens"))
        return shuffled_cycle(sizes or (self.chunk_tokens,), step, self.seed, "chunk_tokens")
