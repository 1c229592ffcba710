"""Targets of a GPU: what the rows of a record must show."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

Rows = Mapping[tuple[str, str], Mapping[str, Any]]  # by section and arm


@final
@dataclass(frozen=True, kw_only=True)
class Target:
    """A figure that must not exceed its bound; `of` raises KeyError where a row or its figure is missing."""

    name: str
    bound: float
    of: Callable[[Rows], float]

    def verdict(self, rows: Rows) -> dict[str, Any]:
        """Name, bound, what was found, and "met", "missed" or "not measured"."""
        try:
            found = self.of(rows)
        except KeyError:
            found = None
        said = "not measured" if found is None else "met" if found <= self.bound else "missed"
        return {"target": self.name, "bound": self.bound, "found": found, "verdict": said}


def _figure(section: str, arm: str, name: str = "median_ms") -> Callable[[Rows], float]:
    """A figure of a row."""

    def figure(rows: Rows) -> float:
        found = rows[section, arm].get(name)
        if found is None:
            raise KeyError(name)
        return found

    return figure


def _ratio(section: str, arm: str, to: str) -> Callable[[Rows], float]:
    """Time of an arm over that of another one of the same section."""
    ours, theirs = _figure(section, arm), _figure(section, to)
    return lambda rows: ours(rows) / theirs(rows)


def _beyond(section: str, arm: str, to: str) -> Callable[[Rows], float]:
    """By what share an arm takes longer than another one."""
    ratio = _ratio(section, arm, to)
    return lambda rows: ratio(rows) - 1


def _judged(count: int) -> Callable[[Rows], float]:
    """Redundancy and coverage of a layer over its attention."""
    whole, mass = (_figure(f"chunk of {count}", arm, "ms_a_layer") for arm in ("omnimem", "attention mass alone"))
    attention = _figure(f"attention, chunk {count}", "ours")
    return lambda rows: (whole(rows) - mass(rows)) / attention(rows)


def _peak(count: int) -> Callable[[Rows], float]:
    """Peak of an hour over weights + memory + 5 % + one chunk."""
    peak, limit = (_figure("an hour of video", f"chunks of {count}", name) for name in ("peak_gib", "limit_gib"))
    return lambda rows: peak(rows) / limit(rows)


def targets(chunks: tuple[int, int], question: int) -> list[Target]:
    """Those of issue 15, by the two lengths of a chunk and the tokens of a question."""
    first = _figure("asking", "a question")
    found = [
        Target(name=f"default over the floor, chunks of {count:,}", bound=bound, of=_ratio(f"chunk of {count}", *arms))
        for count, bound in zip(chunks, (1.15, 1.10), strict=True)
        for arms in [("omnimem", "random")]
    ]
    found += [
        Target(
            name=f"attention mass of every {'' if stride == 1 else f'{stride}th '}query, share of attention, {count:,}",
            bound=bound,
            of=_beyond(f"attention, chunk {count}", f"with its mass, stride {stride}", "ours"),
        )
        for stride, bound in ((1, 0.25), (4, 0.07))
        for count in chunks
    ]
    found += [
        Target(name=f"redundancy and coverage over attention, {chunks[0]:,}", bound=1.0, of=_judged(chunks[0])),
        Target(name=f"s to the first token after {question} tokens", bound=0.1, of=lambda rows: first(rows) / 1000),
        Target(name="a further token over stock", bound=1.1, of=_ratio("asking", "a further token", "stock, further")),
    ]
    for count in chunks:
        seconds = _figure("an hour of video", f"chunks of {count}", "seconds")
        found += [
            Target(name=f"s for an hour of video, chunks of {count:,}", bound=60.0, of=seconds),
            Target(name=f"peak over its limit, chunks of {count:,}", bound=1.0, of=_peak(count)),
        ]
    side = _figure("memory of a stream", "omnimem", "side_share")
    return [*found, Target(name="side state of the default over keys and values", bound=0.05, of=side)]
