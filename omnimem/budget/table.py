"""Budget: the slots of each layer and modality, read and written as our JSON or the release's list."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NotRequired, final

from typing_extensions import TypedDict

from omnimem.budget.allocation import BudgetError, Shares, Slots, require
from omnimem.budget.signals import Signals
from omnimem.limits import exceeds
from omnimem.run import write_text
from omnimem.textfile import StoredFileError, of_shape, read_stored

FORMAT = "omnimem budget 1"
UNLIMITED = 1 << 40  # more slots than any stream fills


class SharesFile(TypedDict):
    """`Shares` in a budget file."""

    fractions: list[list[float]]
    low: list[float]
    high: list[float | None]
    provenance: dict[str, Any]


class ReadingsFile(TypedDict):
    """Entropies or similarities in a budget file."""

    all: list[float]
    audio: list[float]
    visual: list[float]


class SignalsFile(TypedDict):
    """`Signals` in a budget file."""

    entropy: ReadingsFile
    similarity: ReadingsFile
    streams: int
    chunks: int


class BudgetFile(TypedDict):
    """Our format of a budget file."""

    layers: int
    slots: list[Any] | Literal["full"]
    split: NotRequired[bool]
    lend: NotRequired[bool]
    shares: NotRequired[SharesFile | None]
    signals: NotRequired[SignalsFile | None]
    provenance: NotRequired[dict[str, Any]]


@final
@dataclass(frozen=True, kw_only=True)
class Budget:
    """The audio and visual slots of each layer, and how selection treats them.

    With `split=False` a layer has one pool of audio + visual slots. With `lend=True` slots that a modality cannot fill
    go to the other one in the same layer. The sum over layers and modalities is exact, except in released tables.
    Raises BudgetError when a layer has too few slots.
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
                    f"layer {layer} would have slots for {slots[0]} audio and {slots[1]} visual, and needs at least "
                    f"{'one of each' if self.split else 'one'}; raise slots_per_layer"
                )

    @classmethod
    def full(cls, layers: int) -> "Budget":
        """A budget without limit: no token is evicted."""
        return cls(slots=((UNLIMITED, UNLIMITED),) * layers)

    @classmethod
    def shared(cls, layers: int, slots_per_layer: int) -> "Budget":
        """One pool of `slots_per_layer` audio and visual tokens in every layer, ranked by score alone."""
        require(slots_per_layer, modalities=1)
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
        """Whether this is a full memory."""
        return all(slots == (UNLIMITED, UNLIMITED) for slots in self.slots)

    def layer(self, layer: int) -> Slots:
        """The audio and visual slots of one layer; only their sum matters in a shared pool."""
        return self.slots[layer]

    def write(self, path: Path, *, released: bool = False) -> None:
        """Write our JSON (with signals, shares and provenance), or the release's list.

        The release lists [audio, visual] of each layer, or one number where a layer has one pool. Raises BudgetError
        for a full budget in the released format.
        """
        if released and self.unlimited:
            raise BudgetError("the released format holds numbers of slots only; write a full budget in ours")
        rows = [list(slots) if self.split else sum(slots) for slots in self.slots]
        table = rows if released else self.json()
        write_text(path, json.dumps(table, indent=None if released else 1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Budget":
        """Read our JSON or the release's list (pairs: split, without lending; whole numbers: one pool per layer).

        Raises BudgetError when that fails.
        """
        try:
            table = read_stored(path, dict[str, Any] | list[Any], "make it with `omnimem calibrate --config X.yaml`")
        except StoredFileError as error:
            raise BudgetError(str(error)) from error
        return cls.of(table, path)

    @classmethod
    def of(cls, table: Any, place: Path | str = "budget") -> "Budget":
        """The budget of parsed JSON, ours or the release's; `place` names the source in errors."""
        try:
            if isinstance(table, list) and (what := exceeds("budget_layers", len(table))):
                raise BudgetError(f"layers = {what}")
            return cls._released(table) if isinstance(table, list) else cls._own(table)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            reason = f"no key {error}" if isinstance(error, KeyError) else str(error)
            raise BudgetError(
                f"{place}: not a budget ({reason}); "
                "expected a list of [audio, visual] or of whole numbers, or a file written by omnimem calibrate"
            ) from error

    def json(self) -> dict[str, Any]:
        """The budget as stored in a file of our format."""
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
        of_shape(table, BudgetFile, "it", "restore the file")
        if what := exceeds("budget_layers", int(table["layers"])):
            raise BudgetError(f"layers = {what}")
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
        if table and all(type(row) is int for row in table):
            return cls(slots=tuple((0, row) for row in table), split=False)
        budget = cls(slots=_slots(table), split=True, lend=False)
        total = budget.total
        fractions = tuple((audio / total, visual / total) for audio, visual in budget.slots)
        return replace(budget, shares=Shares(fractions=fractions))


def _slots(table: Sequence[Any]) -> tuple[Slots, ...]:
    """Rows of two whole numbers, as read from JSON."""
    if not table:
        raise BudgetError("it holds no layers")
    for layer, row in enumerate(table):
        if not (isinstance(row, list) and len(row) == 2 and all(type(count) is int for count in row)):
            raise BudgetError(f"layer {layer} is {row!r}, not two whole numbers [audio, visual]")
    return tuple((audio, visual) for audio, visual in table)
