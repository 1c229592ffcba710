"""The budget options of a config."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, final

from omnimem.budget.allocation import BudgetError, Rounding, Shares, require
from omnimem.budget.apportion import apportion
from omnimem.budget.signals import Form, Signals, positive
from omnimem.budget.table import Budget
from omnimem.errors import counted

WITHIN = 0.1  # tolerated deviation of a released table from slots_per_layer; the table of r = 2 is off by 8.7 %


@final
@dataclass(frozen=True, kw_only=True)
class SharedBudget:
    """One pool of audio and visual tokens per layer, of equal size in all layers."""

    name: Literal["shared"] = "shared"
    needs_signals: ClassVar[bool] = False  # whether `build` needs a calibration

    def build(self, layers: int, slots_per_layer: int, signals: Signals | None = None) -> Budget:
        """The budget of a model of `layers` layers."""
        return Budget.shared(layers, slots_per_layer)


@final
@dataclass(frozen=True, kw_only=True)
class SplitBudget:
    """A fixed audio share, equal in all layers; by default 1 / (1 + r), the result of AVBA when C_v = C_a."""

    name: Literal["split"] = "split"
    audio_share: float | None = None  # of the slots; null: 1 / (1 + visual_audio_ratio)
    visual_audio_ratio: float = 5.0  # r
    lend: bool = True  # free slots of a modality go to the other one
    needs_signals: ClassVar[bool] = False  # whether `build` needs a calibration

    def __post_init__(self) -> None:
        positive("visual_audio_ratio", self.visual_audio_ratio)
        if self.audio_share is not None and not 0 < self.audio_share < 1:
            raise BudgetError(f"budget.audio_share is {self.audio_share}; give a number between 0 and 1 (exclusive)")

    def build(self, layers: int, slots_per_layer: int, signals: Signals | None = None) -> Budget:
        """The budget of a model of `layers` layers."""
        share = 1 / (1 + self.visual_audio_ratio) if self.audio_share is None else self.audio_share
        slots = Shares.uniform(1, share).slots(slots_per_layer) * layers
        return Budget(slots=slots, lend=self.lend, shares=Shares.uniform(layers, share))


@final
@dataclass(frozen=True, kw_only=True)
class AudioVisualBudget:
    """AVBA: slots per layer and modality from calibration signals, or from a table in a file."""

    name: Literal["audio_visual"] = "audio_visual"
    visual_audio_ratio: float = 5.0  # r of eq. 12
    layer_temperature: float = 0.2  # T of eq. 14; .inf gives all layers the same number of slots
    form: Form = "released"  # capacity: printed H (1 - s), or released H sqrt(1 - s)
    clip: tuple[float, float] | None = None  # bounds of visual slots per layer, in slots_per_layer; audio: divided by r
    rounding: Rounding = "exact"  # exact sums, or truncated as in the release
    lend: bool = True  # False as in the release
    table: str = "calibrate"  # or a budget file: ours (its signals are reused) or a released table

    def __post_init__(self) -> None:
        positive("visual_audio_ratio", self.visual_audio_ratio)
        positive("layer_temperature", self.layer_temperature)
        if self.clip is not None and not 0 <= self.clip[0] <= self.clip[1]:
            raise BudgetError(f"budget.clip is {list(self.clip)}; give [lowest, highest] with 0 <= lowest <= highest")

    @property
    def needs_signals(self) -> bool:
        """Whether `build` needs a calibration."""
        return self.table == "calibrate"

    def build(self, layers: int, slots_per_layer: int, signals: Signals | None = None) -> Budget:
        """The budget of a model of `layers` layers; signals of a file are combined with r, T and form of this config.

        Raises BudgetError when signals are missing, or the file is of a model with another number of layers.
        """
        read = None if self.needs_signals else Budget.read(Path(self.table))
        signals = signals if read is None else read.signals
        if signals is not None:
            _same_layers(signals.layers, layers, self.table)
            return self._allocate(signals, slots_per_layer)
        if read is None:
            raise BudgetError(
                "budget.table: calibrate needs measured signals; run `omnimem calibrate --config X.yaml`, "
                "or name a budget file in budget.table"
            )
        return self._scale(read, layers, slots_per_layer)

    def _allocate(self, signals: Signals, slots_per_layer: int) -> Budget:
        shares = signals.shares(
            visual_audio_ratio=self.visual_audio_ratio,
            layer_temperature=self.layer_temperature,
            form=self.form,
            clip=self.clip,
        )
        return Budget(
            slots=shares.slots(slots_per_layer, self.rounding),
            lend=self.lend,
            shares=shares,
            signals=signals,
            provenance={"slots_per_layer": slots_per_layer, "rounding": self.rounding, "table": self.table},
        )

    def _scale(self, read: Budget, layers: int, slots_per_layer: int) -> Budget:
        """Budget of a table without signals: scaled to slots_per_layer exactly, or unchanged when truncated."""
        if self.rounding == "exact":
            _require_table(read, layers, self.table)
            return replace(scaled(read, slots_per_layer), lend=self.lend, provenance={})
        cure = "set budget.rounding: exact to scale the table, or change slots_per_layer"
        return replace(_unchanged(read, layers, slots_per_layer, self.table, cure), lend=self.lend)


@final
@dataclass(frozen=True, kw_only=True)
class ReleasedBudget:
    """A table exactly as it stands, without lending: [audio, visual] of each layer, or one pool per layer."""

    name: Literal["as_released"] = "as_released"
    table: str  # a budget file of the release, whose mean over the layers is about slots_per_layer
    needs_signals: ClassVar[bool] = False  # whether `build` needs a calibration

    def build(self, layers: int, slots_per_layer: int, signals: Signals | None = None) -> Budget:
        """The table, for a model of `layers` layers.

        Raises BudgetError when it is of another number of layers, or its mean differs from slots_per_layer by a tenth.
        """
        cure = "set slots_per_layer to that, or budget: {name: audio_visual, table: ...}, which scales the table"
        read = Budget.read(Path(self.table))
        return replace(_unchanged(read, layers, slots_per_layer, self.table, cure), lend=False)


BudgetOptions = SharedBudget | SplitBudget | AudioVisualBudget | ReleasedBudget


def scaled(table: Budget, slots_per_layer: int) -> Budget:
    """A table of shares or pools at another size, exact to the slot."""
    if table.shares is not None:
        return replace(table, slots=table.shares.slots(slots_per_layer))
    require(slots_per_layer, modalities=1)
    total = slots_per_layer * table.layers
    pools = apportion([float(sum(pair)) for pair in table.slots], total, [1] * table.layers, [total] * table.layers)
    return replace(table, slots=tuple((0, pool) for pool in pools))


def _unchanged(table: Budget, layers: int, slots_per_layer: int, source: str, cure: str) -> Budget:
    """The slots of a table as they are."""
    _require_table(table, layers, source)
    mean = table.total / layers
    if abs(mean / slots_per_layer - 1) > WITHIN:
        raise BudgetError(
            f"{source}: holds {counted(round(mean), 'slot')} per layer, slots_per_layer is {slots_per_layer}; {cure}"
        )
    return replace(table, signals=None, provenance={})


def _require_table(table: Budget, layers: int, source: str) -> None:
    _same_layers(table.layers, layers, source)
    if table.unlimited or (table.split and table.shares is None):
        raise BudgetError(f"{source}: holds no shares of a memory; set budget: {{name: shared}} instead")


def _same_layers(found: int, layers: int, source: str) -> None:
    if found != layers:
        raise BudgetError(
            f"budget.table {source}: measured on {counted(found, 'layer')}, the model has {layers}; "
            "calibrate this model with `omnimem calibrate --config X.yaml`"
        )
