"""Shares into whole numbers: exact sum, every bound kept."""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from fractions import Fraction


def apportion(weights: Sequence[float], total: int, low: Sequence[int], high: Sequence[int]) -> list[int]:
    """Whole numbers that sum to `total` exactly, each between its `low` and `high`, in proportion to `weights`.

    One scale λ is found with Σ clip(λ w, low, high) = total, in exact fractions; then largest remainder, ties to the
    larger part, then to the earlier one. Zero weights stay at `low` until everything else is at `high`.
    """
    if not sum(low) <= total <= sum(high):
        raise ValueError(f"{total} slots do not lie between the {sum(low)} and {sum(high)} that the bounds allow")
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
