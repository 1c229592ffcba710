"""Numbers and names as text: reports, model cards and pages of the inspector share these."""

from collections.abc import Mapping
from typing import Any

UNKNOWN = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


def shown(label: str) -> str:
    """The name of an arm or kind without underscores; the name of a run is unchanged."""
    run, slash, name = label.rpartition("/")
    return f"{run} / {name.replace('_', ' ')}" if slash else name.replace("_", " ")


def percent(value: float | None) -> str:
    """87.1 for 0.871; a dash for None."""
    return UNKNOWN if value is None else f"{100 * value:.1f}"


def points(value: float | None) -> str:
    """+8.2 for 0.082, with a true minus sign."""
    if value is None:
        return UNKNOWN
    text = f"{100 * value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", MINUS)


def count(value: float | int | None) -> str:
    """A number of entries or frames, with a decimal only if it has one."""
    return UNKNOWN if value is None else f"{value:,.1f}".removesuffix(".0")


def size(value: float | int | None) -> str:
    """Bytes in a suitable unit."""
    if value is None:
        return UNKNOWN
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"
        value /= 1000
    raise AssertionError("the last unit has no limit")


def seconds(value: float | int | None) -> str:
    """A time in a suitable unit."""
    if value is None:
        return UNKNOWN
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def span(values: list[int] | tuple[int, ...]) -> str:
    """The range of the values: `8 to 12`, or one number if all are equal."""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def unread(entry: Mapping[str, Any]) -> str:
    """A warning about predictions of an arm in which no answer was found; "" if there are none."""
    share = entry["no_answer"]
    if not share:
        return ""
    return (
        "no answer could be read" if share == 1 else f"no answer could be read in {percent(share)} % of its predictions"
    )
