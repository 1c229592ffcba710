"""Round shares to whole numbers with an exact sum within bounds."""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from fractions import Fraction


def apportion(weights: Sequence[float], total: int, low: Sequence[int], high: Sequence[int]) -> list[int]:
    """Whole numbers that sum to `total` exactly, each between its `low` and `high`, in proportion to `weights`.

    Finds the scale λ with Σ clip(λ w, low, high) = total, in exact fractions; then rounds by largest remainder, ties to
    the larger part, then to the earlier one. Zero weights stay at `low` until all others are at `high`.
    Raises ValueError when the bounds do not allow `total`.
    """
    # 1. the piecewise linear function of the scale
    if not sum(low) <= total <= sum(high):
        raise ValueError(f"{total} slots are not between the {sum(low)} and {sum(high)} that the bounds allow")
    exact = [Fraction(weight) for weight in weights]

    def clipped(scale: Fraction) -> list[Fraction]:
        return [min(max(scale * w, Fraction(a)), Fraction(b)) for w, a, b in zip(exact, low, high, strict=True)]

    def filled(scale: Fraction) -> Fraction:
        return sum(clipped(scale), Fraction(0))

    # 2. solve for the scale
    corners = sorted({bound / w for w, *pair in zip(exact, low, high, strict=True) if w for bound in pair})
    upper = bisect_left(corners, total, key=filled)
    if upper == len(corners):  # all weighted parts are at `high`: the zero weights share the rest equally
        rest = [0.0 if weight else 1.0 for weight in weights]
        return apportion(rest, total, [b if w else a for w, a, b in zip(exact, low, high, strict=True)], high)
    parts = clipped(_between(corners, upper, total, filled))
    # 3. largest remainder
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
