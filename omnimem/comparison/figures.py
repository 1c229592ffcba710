"""Figures of the report as inline SVG, coloured by the style sheet of the page.

Horizontal coordinates are percentages and vertical ones pixels, so that a figure scales with the page while its text
and strokes keep their size. Marks differ in shape; modalities differ in hue (blue and orange, which are distinguishable
with colour blindness) and in the caption.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, final

import numpy as np
from jaxtyping import Float64
from markupsafe import Markup

Mark = Literal["circle", "ring", "diamond", "bar"]

ROW = 28  # pixels
BLEED = 40  # pixels that lines extend above and below a row: the row may be taller and clips them
LEVELS = 12  # steps of opacity in a heat map
MOST_CELLS = 96  # along one side of a heat map
LEAST_RANGE = 0.02  # of a scale of differences: 2 points
SMOOTH = 0.04  # window of the running mean, as a fraction of the curve


@final
@dataclass(frozen=True, kw_only=True)
class Scale:
    """A range of numbers with ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Position of a value in per cent, clamped to the range."""
        return round(100 * min(max((value - self.low) / (self.high - self.low), 0.0), 1.0), 2)


def accuracy_scale() -> Scale:
    """0 to 100 %: a truncated axis would make small differences look large."""
    return Scale(low=0.0, high=1.0, ticks=(0.0, 0.25, 0.5, 0.75, 1.0))


def difference_scale(values: Sequence[float]) -> Scale:
    """Symmetric about zero, wide enough for all values."""
    most = max([LEAST_RANGE, *(abs(value) for value in values)])
    step = _nice(most / 3)
    side = math.ceil(most / step - 1e-9)
    return Scale(low=-side * step, high=side * step, ticks=tuple(tick * step for tick in range(-side, side + 1)))


def from_zero(values: Sequence[float], ticks: int = 4) -> Scale:
    """Zero to a round number above all values."""
    top = max([*values, 0.0]) or 1.0
    step = _nice(top / ticks)
    count = math.ceil(top / step - 1e-9)
    return Scale(low=0.0, high=count * step, ticks=tuple(step * tick for tick in range(count + 1)))


def interval_row(
    scale: Scale,
    value: float | None,
    bounds: Sequence[float | None],
    *,
    mark: Mark = "circle",
    kind: str = "plain",
    reference: float | None = None,
) -> Markup:
    """A mark with its interval over the grid of the scale; `reference` is an additional line (chance, or zero)."""
    parts = [_grid(scale)]
    if reference is not None:
        x = scale.at(reference)
        parts.append(f'<line class="reference" x1="{x}%" x2="{x}%" y1="{-BLEED}" y2="{ROW + BLEED}"/>')
    low, high = bounds
    if low is not None and high is not None:
        parts.append(
            f'<line class="whisker" x1="{scale.at(low)}%" x2="{scale.at(high)}%" y1="{ROW / 2:g}" y2="{ROW / 2:g}"/>'
        )
    if value is not None:
        parts.append(_mark(mark, scale.at(value), ROW / 2))
    return Markup(f'<svg class="interval {kind}" height="{ROW}" aria-hidden="true">{"".join(parts)}</svg>')


def axis_row(labels: Mapping[float, str], scale: Scale) -> Markup:
    """Tick labels for interval rows of the same scale."""
    texts = "".join(_x_label(scale.at(tick), 13, label) for tick, label in labels.items())
    return Markup(f'<svg class="interval axis" height="16" aria-hidden="true">{texts}</svg>')


def bar_row(scale: Scale, value: float | None, *, kind: str = "plain") -> Markup:
    """A bar from zero over the grid of the scale."""
    width = 0.0 if value is None else scale.at(value)
    return Markup(
        f'<svg class="interval {kind}" height="{ROW}" aria-hidden="true">{_grid(scale)}'
        f'<rect class="bar" x="0" y="{ROW / 2 - 6:g}" width="{width}%" height="12" rx="2"/></svg>'
    )


def over_places(
    lines: Sequence[tuple[str, Sequence[tuple[float, Sequence[float | None]] | None]]],
    places: Sequence[str],
    *,
    x_title: str,
    label: str,
) -> Markup:
    """Accuracies over named places from left to right: lines of (class, values), slightly offset.

    A value is (accuracy, interval), or None where there is none.
    """
    height, scale = 200, accuracy_scale()
    centres = [100 * (place + 0.5) / len(places) for place in range(len(places))]
    drawn: list[str] = []
    for number, (style, values) in enumerate(lines):
        offset = (number - (len(lines) - 1) / 2) * min(2.4, 36 / len(places) / max(1, len(lines)))
        # 1. marks with intervals
        path: list[tuple[float, float]] = []
        for centre, point in zip(centres, values, strict=True):
            if point is None:
                continue
            x, y, (low, high) = centre + offset, _height(scale, point[0], height), point[1]
            if low is not None and high is not None:
                ends = f'y1="{_height(scale, low, height):.1f}" y2="{_height(scale, high, height):.1f}"'
                drawn.append(f'<line class="whisker {style}" x1="{x:.2f}%" x2="{x:.2f}%" {ends}/>')
            drawn.append(f'<circle class="mark {style}" cx="{x:.2f}%" cy="{y:.1f}" r="4.5"/>')
            path.append((x, y))
        # 2. links
        for (x1, y1), (x2, y2) in pairwise(path):
            drawn.append(f'<line class="link {style}" x1="{x1:.2f}%" x2="{x2:.2f}%" y1="{y1:.1f}" y2="{y2:.1f}"/>')
    below = dict(zip(centres, places, strict=True))
    left = [(_height(scale, tick, height), f"{100 * tick:.0f} %") for tick in scale.ticks]
    return _chart("".join(drawn), height=height, y=left, x=below, x_title=x_title, label=label)


def _height(scale: Scale, value: float, height: int) -> float:
    return height - height * scale.at(value) / 100


def budget_bars(slots: Sequence[tuple[int, int]], *, split: bool, label: str) -> Markup:
    """Stacked bars by layer: audio below, visual above; one plain bar for shared slots."""
    height, count = 190, len(slots)
    scale = from_zero([float(audio + visual) for audio, visual in slots])
    # 1. bars
    bars: list[str] = []
    for layer, (audio, visual) in enumerate(slots):
        title = f"audio {audio:,}, visual {visual:,}" if split else f"{audio + visual:,} shared"
        x, width = f"{100 * (layer + 0.1) / count:.2f}%", f"{80 / count:.2f}%"
        middle, top = (_height(scale, float(part), height) for part in (audio, audio + visual))
        rects = (("audio", height, middle), ("visual", middle, top)) if split else (("shared", height, top),)
        body = "".join(
            f'<rect class="{name}" x="{x}" width="{width}" y="{high:.1f}" height="{low - high:.1f}"/>'
            for name, low, high in rects
        )
        bars.append(f"<g><title>layer {layer}: {title}</title>{body}</g>")
    # 2. axes
    every = max(1, math.ceil(count / 12))
    below = {100 * (layer + 0.5) / count: str(layer) for layer in range(0, count, every)}
    left, widest = _y_labels(scale, height), 6 + 4 * count
    return _chart("".join(bars), height=height, y=left, x=below, x_title="layer", label=label, widest=widest)


def curves(
    lines: Sequence[tuple[str, Sequence[float], Sequence[float]]], *, height: int, x_title: str, label: str
) -> Markup:
    """Lines over steps, each a running mean over a pale trace of the raw values: (class, steps, values)."""
    # 1. scales
    steps = [step for _, xs, _ in lines for step in xs]
    scale = from_zero([value for _, _, ys in lines for value in ys])
    first, last = min(steps), max(max(steps), min(steps) + 1)
    # 2. lines
    drawn: list[str] = []
    for name, xs, ys in lines:
        places = [1000 * (step - first) / (last - first) for step in xs]
        for kind, values in (("raw", np.asarray(ys, dtype=np.float64)), ("mean", _running_mean(ys))):
            points = " ".join(
                f"{x:.1f},{_height(scale, float(y), height):.1f}" for x, y in zip(places, values, strict=True)
            )
            drawn.append(f'<polyline class="{kind} {name}" points="{points}"/>')
    inner = f'<svg viewBox="0 0 1000 {height}" preserveAspectRatio="none" height="{height}">{"".join(drawn)}</svg>'
    # 3. axes
    every = max(1, round(_nice((last - first) / 6)))
    ticks = range(math.ceil(first / every) * every, math.floor(last) + 1, every)
    below = {100 * (tick - first) / (last - first): f"{tick:,}" for tick in ticks}
    return _chart(inner, height=height, y=_y_labels(scale, height), x=below, x_title=x_title, label=label)


@final
@dataclass(frozen=True, kw_only=True)
class Kept:
    """Tokens of one modality of one stream: arrived per bin, and kept per bin and layer after each chunk."""

    seconds: float
    bin_seconds: float
    chunk_ends: Float64[np.ndarray, " chunks"]
    arrived: Float64[np.ndarray, " bins"]
    kept: Float64[np.ndarray, "chunks layers bins"]

    @classmethod
    def read(cls, trace: Mapping[str, Any], modality: str) -> "Kept":
        """From trace.json, with bins joined and chunks skipped if there are too many for a figure."""
        arrived = np.asarray(trace["arrived"][modality], dtype=np.float64)
        kept = np.asarray(trace["kept"][modality], dtype=np.float64)
        ends = np.asarray(trace["chunk_ends"], dtype=np.float64)
        together = math.ceil(arrived.size / MOST_CELLS)
        starts = np.arange(0, arrived.size, together)
        rows = np.unique(np.linspace(0, ends.size - 1, min(ends.size, MOST_CELLS)).round().astype(np.int64))
        return cls(
            seconds=float(trace["seconds"]),
            bin_seconds=float(trace["bin_seconds"]) * together,
            chunk_ends=ends[rows],
            arrived=np.add.reduceat(arrived, starts),
            kept=np.add.reduceat(kept[rows], starts, axis=2),
        )


def kept_over_time(kept: Kept, modality: str, *, label: str) -> Markup:
    """x: arrival time of a token; y: time of the stream; opacity: fraction of the tokens still in memory."""
    rows = list(pairwise([0.0, *kept.chunk_ends.tolist()]))
    past = "".join(f"M0 {top:.7g}H{end:.7g}V{end:.7g}H0z" for top, end in rows)
    left = [(200 * tick / kept.seconds, text) for tick, text in _time_ticks(kept.seconds) if tick < 0.97 * kept.seconds]
    return _heat_map(kept, kept.kept.mean(1), rows, past, modality, height=200, y=left, label=label)


def kept_by_layer(kept: Kept, modality: str, *, label: str) -> Markup:
    """x: arrival time of a token; y: layers; opacity: fraction of the tokens in memory at the end."""
    layers = kept.kept.shape[1]
    height, every = max(60, min(200, 14 * layers)), max(1, math.ceil(layers / 6))
    rows = [(float(layer), float(layer + 1)) for layer in range(layers)]
    past = f"M0 0H{kept.seconds:.7g}V{layers}H0z"
    left = [(height * (layer + 0.5) / layers, str(layer)) for layer in range(0, layers, every)]
    return _heat_map(kept, kept.kept[-1], rows, past, modality, height=height, y=left, label=label)


def _heat_map(
    kept: Kept,
    counts: Float64[np.ndarray, "rows bins"],
    rows: Sequence[tuple[float, float]],
    past: str,
    modality: str,
    *,
    height: int,
    y: Sequence[tuple[float, str]],
    label: str,
) -> Markup:
    """Fractions of the arrived tokens, in rows of (top, bottom), over `past`, the path of the time that has passed."""
    share = np.divide(counts, kept.arrived, out=np.zeros_like(counts), where=kept.arrived > 0)
    paths = "".join(
        f'<path class="{modality}" fill-opacity="{level / LEVELS:.2f}" d="{path}"/>'
        for level, path in _cells(share, rows, kept).items()
    )
    inner = (
        f'<svg class="heat" viewBox="0 0 {kept.seconds:g} {rows[-1][1]:g}" preserveAspectRatio="none" '
        f'height="{height}"><path class="past" d="{past}"/>{paths}</svg>'
    )
    below = {100 * tick / kept.seconds: text for tick, text in _time_ticks(kept.seconds)}
    return _chart(inner, height=height, y=y, x=below, x_title="", label=label, lines=False)


def _cells(share: Float64[np.ndarray, "rows bins"], rows: Sequence[tuple[float, float]], kept: Kept) -> dict[int, str]:
    """Rectangles by level of opacity, one path per level; equal neighbours in a row become one rectangle.

    Opacity is the square root of the fraction, so that a few per cent are still visible.
    """
    level = np.clip(np.ceil(np.sqrt(np.clip(share, 0, 1)) * LEVELS - 1e-9), 0, LEVELS).astype(np.int64)
    paths: dict[int, list[str]] = {}
    for row, (top, bottom) in enumerate(rows):
        edges = [0, *(int(place) + 1 for place in np.flatnonzero(np.diff(level[row]))), level.shape[1]]
        for start, end in pairwise(edges):
            if level[row, start]:
                x, far = start * kept.bin_seconds, min(end * kept.bin_seconds, kept.seconds)
                rect = f"M{x:.7g} {top:.7g}H{far:.7g}V{bottom:.7g}H{x:.7g}z"
                paths.setdefault(int(level[row, start]), []).append(rect)
    return {one: "".join(rects) for one, rects in sorted(paths.items())}


def _chart(
    body: str,
    *,
    height: int,
    y: Sequence[tuple[float, str]],
    x: Mapping[float, str],
    x_title: str,
    label: str,
    lines: bool = True,
    widest: int | None = None,
) -> Markup:
    """A figure with labels left and below, at most `widest` rem wide; `label` is for screen readers."""
    left = "".join(
        f'<text x="100%" dx="-6" y="{place:.1f}" dy="4" text-anchor="end">{text}</text>' for place, text in y
    )
    rules = "".join(f'<line class="grid" x1="0" x2="100%" y1="{place:.1f}" y2="{place:.1f}"/>' for place, _ in y)
    below = "".join(_x_label(place, height + 16, text) for place, text in x.items())
    below += f'<text class="title" x="50%" y="{height + 33}" text-anchor="middle">{x_title}</text>' if x_title else ""
    full = height + (38 if x_title else 20)
    style = f' style="max-width: {widest}rem"' if widest else ""
    return Markup(
        f'<div class="chart"{style}><svg class="labels" height="{full}" aria-hidden="true">{left}</svg>'
        f'<svg class="area" height="{full}" role="img" aria-label="{Markup.escape(label)}">'
        f"{rules if lines else ''}{body}{below}</svg></div>"
    )


def _grid(scale: Scale) -> str:
    return "".join(
        f'<line class="grid" x1="{scale.at(tick)}%" x2="{scale.at(tick)}%" y1="{-BLEED}" y2="{ROW + BLEED}"/>'
        for tick in scale.ticks
    )


def _mark(mark: Mark, x: float, y: float) -> str:
    paths = {"diamond": "M-6.5 0L0-6.5L6.5 0L0 6.5z", "bar": "M-2-7h4v14h-4z"}
    if mark in paths:  # a path cannot be positioned in per cent, a nested svg can
        return f'<svg x="{x}%" y="{y:g}" overflow="visible"><path class="mark" d="{paths[mark]}"/></svg>'
    return f'<circle class="mark {mark}" cx="{x}%" cy="{y:g}" r="5"/>'


def _x_label(place: float, y: int, text: str) -> str:
    return f'<text x="{place:.2f}%" y="{y}" text-anchor="middle">{text}</text>'


def _y_labels(scale: Scale, height: int) -> list[tuple[float, str]]:
    return [(_height(scale, tick, height), f"{tick:,.6g}") for tick in scale.ticks]


def _time_ticks(seconds: float) -> list[tuple[float, str]]:
    step = next((step for step in (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900) if seconds / step <= 6), 1800)
    ticks = range(0, math.floor(seconds + 1e-9) + 1, step)
    return [(float(tick), f"{tick // 60}:{tick % 60:02d}") for tick in ticks]


def _running_mean(values: Sequence[float]) -> Float64[np.ndarray, " steps"]:
    half = max(1, round(SMOOTH * len(values) / 2))
    total = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    place = np.arange(len(values))
    low, high = np.maximum(place - half, 0), np.minimum(place + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _nice(step: float) -> float:
    """The smallest of 1, 2, 2.5 and 5 times a power of ten that is not below the step."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if power * factor >= step * (1 - 1e-9))
