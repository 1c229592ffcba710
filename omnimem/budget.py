"""How many audio and visual tokens each layer may keep: audio-visual budget allocation (AVBA), exact to the slot.

Tables are [audio, visual] a layer, as released. Signals are measured once per model (`omnimem.calibration`); from them
come shares of the whole memory, and from the shares a budget for any number of slots per layer.
"""

import json
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, final

from omnimem.run import write_text

FORMAT = "omnimem budget 1"
UNLIMITED = 1 << 40  # slots that no stream fills
WITHIN = 0.1  # a released table used as it is may miss slots_per_layer by so much: that of r = 2 does, by 8.7 %

Pair = tuple[float, float]  # one number a modality, in the order of every table: audio, visual
Slots = tuple[int, int]  # of one layer: audio, visual
NO_LEAST, NO_MOST = (0.0, 0.0), (math.inf, math.inf)  # bounds that bind nothing

Form = Literal["printed", "released"]
Rounding = Literal["exact", "truncated"]


class BudgetError(ValueError):
    """A budget that cannot be given; the message says what was asked and how to repair it."""


@final
@dataclass(frozen=True, kw_only=True)
class Readings:
    """One measurement by layer: over all audio and visual tokens together, and over each modality alone."""

    whole: tuple[float, ...]
    audio: tuple[float, ...]
    visual: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.whole) == len(self.audio) == len(self.visual) >= 1:
            counts = f"{len(self.whole)}, {len(self.audio)} and {len(self.visual)}"
            raise BudgetError(
                f"signals list {counts} layers for all, audio and visual; give each layer one number in each"
            )
        if not all(math.isfinite(value) for row in (self.whole, self.audio, self.visual) for value in row):
            raise BudgetError("signals hold a number that is not finite; calibrate again")

    def json(self) -> dict[str, list[float]]:
        """The readings as they stand in a budget file."""
        return {"all": list(self.whole), "audio": list(self.audio), "visual": list(self.visual)}

    @classmethod
    def of(cls, table: Mapping[str, Sequence[float]]) -> "Readings":
        """The inverse of `json`."""
        whole, audio, visual = (tuple(float(value) for value in table[key]) for key in ("all", "audio", "visual"))
        return cls(whole=whole, audio=audio, visual=visual)


@final
@dataclass(frozen=True, kw_only=True)
class Signals:
    """What calibration measured: normalised entropy of attention mass (0 to 1) and mean similarity of neighbours."""

    entropy: Readings
    similarity: Readings
    streams: int = 0
    chunks: int = 0  # measured ones, over all streams

    def __post_init__(self) -> None:
        if len(self.entropy.whole) != len(self.similarity.whole):
            raise BudgetError(
                f"signals hold entropy for {len(self.entropy.whole)} layers and similarity for "
                f"{len(self.similarity.whole)}; calibrate again"
            )

    @property
    def layers(self) -> int:
        """Number of layers measured."""
        return len(self.entropy.whole)

    def capacity(self, form: Form) -> tuple[float, ...]:
        """C of each layer: H (1 − s) as printed (eq. 13), H √(((1 − s_v) + (1 − s_a)) / 2) as released.

        H is divided by log K in both: T = 0.2 makes no sense for an entropy in nats.
        """
        if form == "printed":
            return tuple(h * _novelty(s) for h, s in zip(self.entropy.whole, self.similarity.whole, strict=True))
        rows = zip(self.entropy.whole, self.similarity.audio, self.similarity.visual, strict=True)
        return tuple(h * math.sqrt((_novelty(s_a) + _novelty(s_v)) / 2) for h, s_a, s_v in rows)

    def capacities(self, form: Form) -> tuple[Pair, ...]:
        """C_m of each layer and modality: H_m (1 − s_m) as printed (eq. 12), H_m √(1 − s_m) as released."""
        power = 1.0 if form == "printed" else 0.5
        audio = zip(self.entropy.audio, self.similarity.audio, strict=True)
        visual = zip(self.entropy.visual, self.similarity.visual, strict=True)
        return tuple(
            (h_a * _novelty(s_a) ** power, h_v * _novelty(s_v) ** power)
            for (h_a, s_a), (h_v, s_v) in zip(audio, visual, strict=True)
        )

    def shares(
        self,
        *,
        visual_audio_ratio: float = 5.0,
        layer_temperature: float = 0.2,
        form: Form = "released",
        clip: tuple[float, float] | None = None,
    ) -> "Shares":
        """AVBA (eqs. 12-14; release `get_config.py`): layers by softmax(C / T), w_v = r C_v / (r C_v + C_a).

        `clip` bounds the visual slots of a layer in units of slots_per_layer, and the audio slots by the same over r.
        """
        _positive("visual_audio_ratio", visual_audio_ratio)
        _positive("layer_temperature", layer_temperature)
        layers = _softmax([c / layer_temperature for c in self.capacity(form)])
        fractions = tuple(
            (layer * audio, layer * visual)
            for layer, (audio, visual) in zip(layers, self._split(visual_audio_ratio, form), strict=True)
        )
        low, high = clip if clip else (0.0, math.inf)
        return Shares(
            fractions=fractions,
            low=(low / visual_audio_ratio, low),
            high=(high / visual_audio_ratio, high),
            provenance={
                "form": form,
                "visual_audio_ratio": visual_audio_ratio,
                "layer_temperature": layer_temperature if math.isfinite(layer_temperature) else "inf",
                "clip": list(clip) if clip else None,
                "streams": self.streams,
                "chunks": self.chunks,
            },
        )

    def _split(self, ratio: float, form: Form) -> tuple[Pair, ...]:
        """w_a and w_v of each layer."""
        pairs = []
        for layer, (audio, visual) in enumerate(self.capacities(form)):
            weight = ratio * visual + audio
            if weight <= 0:
                raise BudgetError(
                    f"layer {layer} shows no compressible content (C_v = C_a = 0: entropy 0 or similarity 1); "
                    "calibrate on longer streams or set budget: {name: split}"
                )
            pairs.append((audio / weight, ratio * visual / weight))
        return tuple(pairs)

    def json(self) -> dict[str, Any]:
        """The signals as they stand in a budget file."""
        return {
            "entropy": self.entropy.json(),
            "similarity": self.similarity.json(),
            "streams": self.streams,
            "chunks": self.chunks,
        }

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> "Signals":
        """The inverse of `json`."""
        entropy, similarity = Readings.of(table["entropy"]), Readings.of(table["similarity"])
        return cls(entropy=entropy, similarity=similarity, streams=int(table["streams"]), chunks=int(table["chunks"]))


@final
@dataclass(frozen=True, kw_only=True)
class Shares:
    """The part of the whole memory that each layer and modality gets, for any number of slots per layer.

    `low` and `high` bound the slots of a layer and modality, in units of slots_per_layer.
    """

    fractions: tuple[Pair, ...]
    low: Pair = NO_LEAST
    high: Pair = NO_MOST
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        flat = [value for pair in self.fractions for value in pair]
        if not flat or min(flat) < 0 or not math.isclose(math.fsum(flat), 1.0, rel_tol=1e-9):
            raise BudgetError(
                f"shares must be >= 0 and sum to 1, got {math.fsum(flat)} over {len(self.fractions)} layers"
            )

    @classmethod
    def uniform(cls, layers: int, audio_share: float) -> "Shares":
        """Every layer alike, `audio_share` of it for audio."""
        return cls(
            fractions=((audio_share / layers, (1 - audio_share) / layers),) * layers,
            provenance={"audio_share": audio_share},
        )

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.fractions)

    def budget(self, slots_per_layer: int, *, rounding: Rounding = "exact", lend: bool = True) -> "Budget":
        """The slots of each layer and modality.

        `exact` (ours): shares are scaled until, clipped, they fill the memory; then largest remainder. The sum is
        slots_per_layer × layers, every bound holds, nothing gets less than one slot.
        `truncated` (release): clip, then int(), and what that loses or adds is lost or added.
        """
        _enough(slots_per_layer, modalities=2)
        slots = self._exact(slots_per_layer) if rounding == "exact" else self._truncated(slots_per_layer)
        return Budget(slots=slots, split=True, lend=lend, shares=self)

    def _exact(self, slots_per_layer: int) -> tuple[Slots, ...]:
        total = slots_per_layer * self.layers
        low = [max(1, math.ceil(bound * slots_per_layer)) for bound in self.low]
        high = [total if math.isinf(bound) else math.floor(bound * slots_per_layer) for bound in self.high]
        for name, least, most in zip(("audio", "visual"), low, high, strict=True):
            if least > most:
                raise BudgetError(
                    f"clip leaves no whole number of {name} slots between {least} and {most} a layer at "
                    f"slots_per_layer: {slots_per_layer}; widen budget.clip or raise slots_per_layer"
                )
        if not sum(low) <= slots_per_layer <= sum(high):
            raise BudgetError(
                f"clip asks for {sum(low)} to {sum(high)} slots a layer, slots_per_layer is {slots_per_layer}; "
                "widen budget.clip so that slots_per_layer lies between"
            )
        flat = [value for pair in self.fractions for value in pair]
        counts = apportion(flat, total, low * self.layers, high * self.layers)
        return tuple(zip(counts[::2], counts[1::2], strict=True))

    def _truncated(self, slots_per_layer: int) -> tuple[Slots, ...]:
        total = slots_per_layer * self.layers
        bounds = [
            (low * slots_per_layer, high * slots_per_layer) for low, high in zip(self.low, self.high, strict=True)
        ]
        (low_a, high_a), (low_v, high_v) = bounds
        return tuple(
            (int(min(max(audio * total, low_a), high_a)), int(min(max(visual * total, low_v), high_v)))
            for audio, visual in self.fractions
        )

    def json(self) -> dict[str, Any]:
        """The shares as they stand in a budget file; an absent upper bound is null."""
        return {
            "fractions": [list(pair) for pair in self.fractions],
            "low": list(self.low),
            "high": [None if math.isinf(bound) else bound for bound in self.high],
            "provenance": dict(self.provenance),
        }

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> "Shares":
        """The inverse of `json`."""
        return cls(
            fractions=tuple((float(audio), float(visual)) for audio, visual in table["fractions"]),
            low=_bounds(table["low"]),
            high=_bounds(table["high"]),
            provenance=table["provenance"],
        )


@final
@dataclass(frozen=True, kw_only=True)
class Budget:
    """The audio and visual slots of each layer, and how selection treats them.

    `split` False: one pool of audio + visual slots a layer. `lend`: slots that a modality has no tokens for go to the
    other one in the same layer. The sum over layers and modalities is exact unless a released table says otherwise.
    """

    slots: tuple[Slots, ...]
    split: bool = True
    lend: bool = True
    shares: Shares | None = None
    signals: Signals | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.slots:
            raise BudgetError("a budget needs at least one layer")
        for layer, slots in enumerate(self.slots):
            if min(slots) < 0 or sum(slots) < 1 or (self.split and min(slots) < 1):
                raise BudgetError(
                    f"layer {layer} would keep {slots[0]} audio and {slots[1]} visual tokens, and each layer needs at "
                    f"least one {'of both' if self.split else 'slot'}; raise slots_per_layer"
                )

    @classmethod
    def full(cls, layers: int) -> "Budget":
        """No limit: nothing is ever evicted."""
        return cls(slots=((UNLIMITED, UNLIMITED),) * layers)

    @classmethod
    def shared(cls, layers: int, slots_per_layer: int) -> "Budget":
        """One pool of `slots_per_layer` audio and visual tokens in every layer, whichever score highest."""
        _enough(slots_per_layer, modalities=1)
        return cls(slots=((0, slots_per_layer),) * layers, split=False)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.slots)

    @property
    def total(self) -> int:
        """Slots over all layers and both modalities."""
        return sum(sum(slots) for slots in self.slots)

    @property
    def unlimited(self) -> bool:
        """Whether this is the full memory."""
        return all(slots == (UNLIMITED, UNLIMITED) for slots in self.slots)

    def layer(self, layer: int) -> Slots:
        """The audio and visual slots of one layer; of a shared pool only their sum counts."""
        return self.slots[layer]

    def write(self, path: Path, *, released: bool = False) -> None:
        """Write our JSON (with signals, shares and provenance), or the release's list of [audio, visual]."""
        if released and (not self.split or self.unlimited):
            raise BudgetError(
                "the released format holds [audio, visual] slots only; write a shared or full budget in ours"
            )
        table = [list(slots) for slots in self.slots] if released else self.json()
        write_text(path, json.dumps(table, indent=None if released else 1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Budget":
        """Read our JSON or the release's list; a released table splits and lends nothing."""
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise BudgetError(
                f"{path}: cannot read the budget ({error.strerror}); "
                "make it with `python train/calibrate.py --config X.yaml`"
            ) from error
        except ValueError as error:
            raise BudgetError(f"{path}: not JSON ({error}); make it again with `python train/calibrate.py`") from error
        try:
            return cls._released(table) if isinstance(table, list) else cls._own(table)
        except (BudgetError, KeyError, TypeError, ValueError) as error:
            reason = f"no key {error}" if isinstance(error, KeyError) else str(error)
            raise BudgetError(
                f"{path}: not a budget ({reason}); "
                "expected a list of [audio, visual] or a file written by train/calibrate.py"
            ) from error

    def json(self) -> dict[str, Any]:
        """The budget as it stands in its own file."""
        return {
            "format": FORMAT,
            "layers": self.layers,
            "slots": "full" if self.unlimited else [list(slots) for slots in self.slots],
            "split": self.split,
            "lend": self.lend,
            "shares": self.shares.json() if self.shares else None,
            "signals": self.signals.json() if self.signals else None,
            "provenance": dict(self.provenance),
        }

    @classmethod
    def _own(cls, table: Any) -> "Budget":
        if not isinstance(table, dict):
            raise BudgetError(f"it holds {table!r}")
        if table["format"] != FORMAT:
            raise BudgetError(f"format is {table['format']!r}, this version reads {FORMAT!r}")
        if table["slots"] == "full":
            return cls.full(int(table["layers"]))
        return cls(
            slots=_slots(table["slots"]),
            split=bool(table["split"]),
            lend=bool(table["lend"]),
            shares=Shares.of(table["shares"]) if table["shares"] else None,
            signals=Signals.of(table["signals"]) if table["signals"] else None,
            provenance=table["provenance"],
        )

    @classmethod
    def _released(cls, table: Sequence[Any]) -> "Budget":
        slots = _slots(table)
        total = sum(sum(pair) for pair in slots)
        fractions = tuple((audio / total, visual / total) for audio, visual in slots)
        return cls(slots=slots, split=True, lend=False, shares=Shares(fractions=fractions))


@final
@dataclass(frozen=True, kw_only=True)
class SharedBudget:
    """One pool of audio and visual tokens a layer, every layer alike."""

    name: Literal["shared"] = "shared"

    @property
    def needs_signals(self) -> bool:
        """Whether `build` needs a calibration."""
        return False

    def build(self, layers: int, slots_per_layer: int, signals: Signals | None = None) -> Budget:
        """The budget of a model of `layers` layers."""
        return Budget.shared(layers, slots_per_layer)


@final
@dataclass(frozen=True, kw_only=True)
class SplitBudget:
    """A fixed audio share, every layer alike; without one, 1 / (1 + r): what AVBA gives when C_v = C_a."""

    name: Literal["split"] = "split"
    audio_share: float | None = None
    visual_audio_ratio: float = 5.0  # r
    lend: bool = True

    def __post_init__(self) -> None:
        _positive("visual_audio_ratio", self.visual_audio_ratio)
        if self.audio_share is not None and not 0 < self.audio_share < 1:
            raise BudgetError(f"budget.audio_share is {self.audio_share}; give a number between 0 and 1, both excluded")

    @property
    def needs_signals(self) -> bool:
        """Whether `build` needs a calibration."""
        return False

    def build(self, layers: int, slots_per_layer: int, signals: Signals | None = None) -> Budget:
        """The budget of a model of `layers` layers."""
        share = 1 / (1 + self.visual_audio_ratio) if self.audio_share is None else self.audio_share
        slots = Shares.uniform(1, share).budget(slots_per_layer).slots * layers
        return Budget(slots=slots, split=True, lend=self.lend, shares=Shares.uniform(layers, share))


@final
@dataclass(frozen=True, kw_only=True)
class AudioVisualBudget:
    """AVBA: layers and modalities by what calibration measured, or by a table from a file."""

    name: Literal["audio_visual"] = "audio_visual"
    visual_audio_ratio: float = 5.0  # r of eq. 12
    layer_temperature: float = 0.2  # T of eq. 14; .inf gives every layer the same
    form: Form = "released"  # the score: printed H (1 - s), or released H sqrt(1 - s)
    clip: tuple[float, float] | None = (
        None  # bounds of a layer's visual slots in slots_per_layer; audio: the same over r
    )
    rounding: Rounding = "exact"  # exact sums, or truncated as released
    lend: bool = True  # the release lends nothing
    table: str = "calibrate"  # or a budget file: ours (its signals are used again) or a released table

    def __post_init__(self) -> None:
        _positive("visual_audio_ratio", self.visual_audio_ratio)
        _positive("layer_temperature", self.layer_temperature)
        if self.clip is not None and not 0 <= self.clip[0] <= self.clip[1]:
            raise BudgetError(f"budget.clip is {list(self.clip)}; give [lowest, highest] with 0 <= lowest <= highest")

    @property
    def needs_signals(self) -> bool:
        """Whether `build` needs a calibration."""
        return self.table == "calibrate"

    def build(self, layers: int, slots_per_layer: int, signals: Signals | None = None) -> Budget:
        """The budget of a model of `layers` layers; of a file with signals, r, T and form are those of this config."""
        read = None if self.needs_signals else Budget.read(Path(self.table))
        signals = signals if read is None else read.signals
        if signals is not None:
            _same_layers(signals.layers, layers, self.table)
            return self._allocate(signals, slots_per_layer)
        if read is None:
            raise BudgetError(
                "budget.table: calibrate needs measured signals; run `python train/calibrate.py --config X.yaml`, "
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
        budget = shares.budget(slots_per_layer, rounding=self.rounding, lend=self.lend)
        provenance = {"slots_per_layer": slots_per_layer, "rounding": self.rounding, "table": self.table}
        return Budget(
            slots=budget.slots, split=True, lend=self.lend, shares=shares, signals=signals, provenance=provenance
        )

    def _scale(self, read: Budget, layers: int, slots_per_layer: int) -> Budget:
        """A table without signals: scaled to slots_per_layer exactly, or taken as it is when truncated."""
        _same_layers(read.layers, layers, self.table)
        if read.shares is None:
            raise BudgetError(f"{self.table}: holds no [audio, visual] shares; set budget: {{name: shared}} instead")
        if self.rounding == "exact":
            return read.shares.budget(slots_per_layer, lend=self.lend)
        if abs(read.total / layers / slots_per_layer - 1) > WITHIN:
            raise BudgetError(
                f"{self.table}: holds {read.total / layers:.0f} slots a layer, slots_per_layer is {slots_per_layer}; "
                "set budget.rounding: exact to scale the table, or change slots_per_layer"
            )
        return Budget(slots=read.slots, split=True, lend=self.lend, shares=read.shares)


BudgetOptions = SharedBudget | SplitBudget | AudioVisualBudget


def apportion(weights: Sequence[float], total: int, low: Sequence[int], high: Sequence[int]) -> list[int]:
    """Whole numbers that sum to `total` exactly, each between its `low` and `high`, in proportion to `weights`.

    One scale λ is found with Σ clip(λ w, low, high) = total, in exact fractions; then largest remainder, ties to the
    larger part, then to the earlier one. Zero weights stay at `low` until everything else is at `high`.
    """
    if not sum(low) <= total <= sum(high):
        raise BudgetError(f"{total} slots do not lie between the {sum(low)} and {sum(high)} that the bounds allow")
    exact = [Fraction(weight) for weight in weights]

    def clipped(scale: Fraction) -> list[Fraction]:
        return [min(max(scale * w, Fraction(a)), Fraction(b)) for w, a, b in zip(exact, low, high, strict=True)]

    def filled(scale: Fraction) -> Fraction:
        return sum(clipped(scale), Fraction(0))

    corners = sorted({bound / w for w, *pair in zip(exact, low, high, strict=True) if w for bound in pair})
    upper = bisect_left(corners, total, key=filled)
    if upper == len(corners):  # even with every weighted part full there is room: the zero weights share the rest alike
        rest = [0.0 if weight else 1.0 for weight in weights]
        return apportion(rest, total, [b if w else a for w, a, b in zip(exact, low, high, strict=True)], high)
    parts = clipped(_between(corners, upper, total, filled))
    counts = [math.floor(part) for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda i: (counts[i] - parts[i], -parts[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _between(corners: Sequence[Fraction], upper: int, total: int, filled: Callable[[Fraction], Fraction]) -> Fraction:
    """The scale at which `filled`, linear between corners, reaches `total` at or before `corners[upper]`."""
    if upper == 0:
        return corners[0]
    start, end = corners[upper - 1], corners[upper]
    return start + (end - start) * (total - filled(start)) / (filled(end) - filled(start))


def _softmax(values: Sequence[float]) -> list[float]:
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    whole = math.fsum(powers)
    return [power / whole for power in powers]


def _novelty(similarity: float) -> float:
    """1 − s, never negative: a mean of cosines may pass 1 by rounding."""
    return max(0.0, 1.0 - similarity)


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise BudgetError(f"budget.{name} is {value}; give a number above 0")


def _enough(slots_per_layer: int, *, modalities: int) -> None:
    if slots_per_layer < modalities:
        need = "one audio and one visual slot" if modalities == 2 else "one slot"
        other = "; or set budget: {name: shared}" if slots_per_layer >= 1 else ""
        raise BudgetError(
            f"slots_per_layer: {slots_per_layer} is too small, each layer needs {need}; "
            f"set slots_per_layer to {modalities} or more{other}"
        )


def _same_layers(found: int, layers: int, source: str) -> None:
    if found != layers:
        raise BudgetError(
            f"budget.table {source}: measured on {found} layers, the model has {layers}; "
            "calibrate this model with `python train/calibrate.py --config X.yaml`"
        )


def _slots(table: Sequence[Any]) -> tuple[Slots, ...]:
    """Rows of two whole numbers, as read from JSON."""
    if not table:
        raise BudgetError("it holds no layers")
    for layer, row in enumerate(table):
        if not (isinstance(row, list) and len(row) == 2 and all(type(count) is int for count in row)):
            raise BudgetError(f"layer {layer} is {row!r}, not two whole numbers [audio, visual]")
    return tuple((audio, visual) for audio, visual in table)


def _bounds(row: Sequence[float | None]) -> Pair:
    """Bounds as read from JSON, where null is none."""
    audio, visual = (math.inf if bound is None else float(bound) for bound in row)
    return audio, visual
