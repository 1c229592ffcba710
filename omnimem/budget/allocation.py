"""The share of the whole memory that each layer and modality gets, and the slots for a given memory size."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, final

from omnimem.budget.apportion import apportion
from omnimem.errors import UserError, counted

Pair = tuple[float, float]  # (audio, visual)
Slots = tuple[int, int]  # (audio, visual) of one layer
NO_LEAST, NO_MOST = (0.0, 0.0), (math.inf, math.inf)  # no bounds

Rounding = Literal["exact", "truncated"]


class BudgetError(UserError):
    """An invalid budget; the message names the setting and how to fix it."""


@final
@dataclass(frozen=True, kw_only=True)
class Shares:
    """The fraction of the whole memory that each layer and modality gets, for any number of slots per layer.

    `low` and `high` bound the slots of a layer and modality, in units of slots_per_layer.
    Raises BudgetError unless the fractions are >= 0 and sum to 1.
    """

    fractions: tuple[Pair, ...]
    low: Pair = NO_LEAST
    high: Pair = NO_MOST
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        flat = [value for pair in self.fractions for value in pair]
        if not flat or min(flat) < 0 or not math.isclose(math.fsum(flat), 1.0, rel_tol=1e-9):
            raise BudgetError(
                f"shares must be >= 0 and sum to 1, got {math.fsum(flat)} over {counted(len(self.fractions), 'layer')}"
            )

    @classmethod
    def uniform(cls, layers: int, audio_share: float) -> "Shares":
        """Equal layers, each with `audio_share` of its slots for audio."""
        return cls(
            fractions=((audio_share / layers, (1 - audio_share) / layers),) * layers,
            provenance={"audio_share": audio_share},
        )

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.fractions)

    def slots(self, slots_per_layer: int, rounding: Rounding = "exact") -> tuple[Slots, ...]:
        """The slots of each layer and modality in a memory of slots_per_layer × layers.

        `exact` (ours): shares are scaled until, after clipping, they fill the memory; then largest remainder. The sum
        is slots_per_layer × layers, all bounds hold, and each layer and modality gets at least one slot.
        `truncated` (release): clip, then int(); the sum may differ from slots_per_layer × layers.
        Raises BudgetError when the bounds cannot be met.
        """
        require(slots_per_layer, modalities=2)
        return self._exact(slots_per_layer) if rounding == "exact" else self._truncated(slots_per_layer)

    def _exact(self, slots_per_layer: int) -> tuple[Slots, ...]:
        total = slots_per_layer * self.layers
        low = [max(1, math.ceil(bound * slots_per_layer)) for bound in self.low]
        high = [total if math.isinf(bound) else math.floor(bound * slots_per_layer) for bound in self.high]
        for name, least, most in zip(("audio", "visual"), low, high, strict=True):
            if least > most:
                raise BudgetError(
                    f"clip leaves no whole number of {name} slots between {least} and {most} per layer at "
                    f"slots_per_layer: {slots_per_layer}; widen budget.clip or raise slots_per_layer"
                )
        if not sum(low) <= slots_per_layer <= sum(high):
            raise BudgetError(
                f"clip asks for {sum(low)} to {counted(sum(high), 'slot')} per layer, slots_per_layer is "
                f"{slots_per_layer}; widen budget.clip so that slots_per_layer lies between"
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
        """The shares as stored in a budget file; a missing upper bound is null."""
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


def require(slots_per_layer: int, *, modalities: int) -> None:
    """Raise BudgetError unless every layer can hold a slot of each modality."""
    if slots_per_layer < modalities:
        need = "one audio and one visual slot" if modalities == 2 else "one slot"
        other = "; or set budget: {name: shared}" if slots_per_layer >= 1 else ""
        raise BudgetError(
            f"slots_per_layer: {slots_per_layer} is too small, each layer needs {need}; "
            f"set slots_per_layer to {modalities} or more{other}"
        )


def _bounds(row: Sequence[float | None]) -> Pair:
    """Bounds as read from JSON, where null means no bound."""
    audio, visual = (math.inf if bound is None else float(bound) for bound in row)
    return audio, visual
