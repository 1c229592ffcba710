"""Sizes drawn for every step, from a list (in shuffled cycles) or from a range; functions of (seed, step) alone."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar, final

Drawn = TypeVar("Drawn")


@final
@dataclass(frozen=True, kw_only=True)
class ChunkRange:
    """Maximum chunk size of a step in tokens, log-uniform over the whole numbers from low to high."""

    low: int  # fewest tokens
    high: int  # most tokens

    def __post_init__(self) -> None:
        _check_ends(self.low, self.high)

    def __str__(self) -> str:
        return f"{self.low} to {self.high}"

    def at(self, place: float) -> int:
        """The size at quantile `place` in [0, 1)."""
        return log_uniform(self.low, self.high, place)


@final
@dataclass(frozen=True, kw_only=True)
class BudgetRange:
    """Slots per layer of a step, log-uniform over the whole numbers from low to high; full memory in some steps.

    The loss of information depends on the ratio of budget and stream, so 12 to 24 slots are drawn as often as 24 to 48.
    """

    low: int  # fewest slots per layer
    high: int  # most slots per layer
    full: float = 0.0  # fraction of steps at full memory; with 0 the accuracy at full memory decreases

    def __post_init__(self) -> None:
        _check_ends(self.low, self.high)
        if not 0 <= self.full <= 1:
            raise ValueError(f"full must be between 0 and 1, got {self.full:g}")

    def __str__(self) -> str:
        return f"{self.low} to {self.high}" + (f", full in {self.full:.0%} of the steps" if self.full else "")

    def at(self, place: float) -> int | None:
        """The slots at quantile `place` in [0, 1); None: full memory."""
        if place < self.full:
            return None
        return log_uniform(self.low, self.high, (place - self.full) / (1 - self.full))

    def band(self, slots: int) -> str:
        """The interval between doublings of `low` that contains the slots; names the curve of a step."""
        first = self.low
        while 2 * first <= slots:
            first *= 2
        last = min(2 * first - 1, self.high)
        return f"{first}-{last}" if last > first else f"{first}"


def log_uniform(low: int, high: int, place: float) -> int:
    """floor(low ((high + 1) / low)^u): P(k) = log((k + 1) / k) / log((high + 1) / low) for u uniform in [0, 1)."""
    return min(high, int(low * ((high + 1) / low) ** place))


def uniform(*parts: int | str) -> float:
    """A pseudo-random number in [0, 1), a function of the parts."""
    return (int.from_bytes(_hash(*parts)[:8], "big") >> 11) / 2**53


def shuffled_cycle(choices: Sequence[Drawn], step: int, *parts: int | str) -> Drawn:
    """The choice of a step; each cycle through the list is a new permutation, a function of the parts."""
    cycle, place = divmod(step, len(choices))
    order = sorted(range(len(choices)), key=lambda number: _hash(*parts, cycle, number))
    return choices[order[place]]


def _check_ends(low: int, high: int) -> None:
    if low < 1:
        raise ValueError(f"low = {low} must be at least 1")
    if high < low:
        raise ValueError(f"high = {high} is below low = {low}; swap them")


def _hash(*parts: int | str) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()
