"""Draws docs/figures/accuracy_by_memory.svg from the committed results.

python benchmarks/figures.py [--png FILE]

Right answers against the kept tokens per layer as a share of the stream, on three unlike beds, training-free, all
policies in one pool of equal layers at the same entries. Bars are 95 % intervals of the paired difference to `paper`.
"""

import json
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
FIGURE = ROOT / "docs/figures/accuracy_by_memory.svg"
INK, GRID, GREY = "#57606a", "#d8dee4", "#8b949e"
DARK = {f"fill: {INK}": "fill: #c9d1d9", f"stroke: {INK}": "stroke: #c9d1d9", f"stroke: {GRID}": "stroke: #30363d"}
REFERENCE = "paper"
POLICIES = {  # label, colour
    "omnimem": ("omnimem", "#2f81f7"),
    "paper": ("paper", "#8250df"),
    "distinct": ("distinct", "#e8590c"),
    "k_center": ("k-center", GREY),
    "h2o": ("H2O", GREY),
    "snapkv": ("SnapKV", GREY),
    "random": ("random", GREY),
}
HEIGHT = 106  # of the axis, %
LABEL_GAP = 6.4  # points of accuracy between two labels


@final
@dataclass(frozen=True, kw_only=True)
class Point:
    """Accuracy of a policy at a share of the stream, with the ends of its bar, in %."""

    share: float
    accuracy: float
    low: float
    high: float


@final
@dataclass(frozen=True, kw_only=True)
class Bed:
    """One panel: its title, the results, the tokens of a stream, and the names of things in the file."""

    title: str
    file: str
    tokens: int
    accuracy: str = "accuracy"

    def curves(self) -> tuple[dict[str, list[Point]], float]:
        """The points of every policy by share, and the accuracy with full memory in %."""
        content = json.loads((RESULTS / self.file).read_text(encoding="utf-8"))
        rows: list[Mapping[str, Any]] = content["rows"]
        full = content.get("full_memory")
        full = next(row[self.accuracy] for row in rows if row["arm"] == "full") if full is None else full
        return {policy: self._curve(rows, policy) for policy in POLICIES}, 100 * full

    def _curve(self, rows: Sequence[Mapping[str, Any]], policy: str) -> list[Point]:
        reference = {row["slots"]: row[self.accuracy] for row in rows if _policy(row) == REFERENCE}
        found = []
        for row in (row for row in rows if _policy(row) == policy and row["slots"]):
            difference = row.get(f"{self.accuracy} difference") or row
            ends = [100 * (reference[row["slots"]] + (difference.get(end) or 0.0)) for end in ("low", "high")]
            if policy == REFERENCE:
                ends = [100 * row[self.accuracy]] * 2
            share, accuracy = row["slots"] / self.tokens, 100 * row[self.accuracy]
            found.append(Point(share=share, accuracy=accuracy, low=ends[0], high=ends[1]))
        return sorted(found, key=lambda point: point.share)


def _policy(row: Mapping[str, Any]) -> str:
    """The policy of an arm of the study `beds`, or of benchmarks/real_lm.py."""
    return row["arm"].removesuffix("_pool").removesuffix("_0")


BEDS = (
    Bed(title="Symbols and words\ntiny model, 64 s of video", file="beds-recall-2026-11-30.json", tokens=576),
    Bed(title="Pictures and speech\nassembled base, 64 s of video", file="beds-pictures-2026-11-30.json", tokens=192),
    Bed(
        title="Facts in prose\nSmolLM2-135M, 1,024 tokens",
        file="beds-text-2026-11-30.json",
        tokens=1024,
        accuracy="rank1",
    ),
)


def spread(places: Sequence[float], gap: float = LABEL_GAP, lowest: float = 2.0) -> list[float]:
    """The places moved apart to at least `gap` between neighbours, none below `lowest`; order is kept.

    Away from `lowest` the mean of places that touch is kept too.
    """
    order = sorted(range(len(places)), key=lambda index: places[index])
    blocks: list[list[float]] = []  # [mean, size]: labels that touch move together
    for index in order:
        blocks.append([places[index], 1])
        while len(blocks) > 1 and blocks[-1][0] - blocks[-2][0] < gap * (blocks[-2][1] + blocks[-1][1]) / 2:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [[(a * n + b * m) / (n + m), n + m]]
    moved = [mean + gap * (i - (size - 1) / 2) for mean, size in blocks for i in range(int(size))]
    for index, place in enumerate(moved):
        moved[index] = max(place, lowest + gap * index)
    return [place for _, place in sorted(zip(order, moved, strict=True))]


def draw(beds: Sequence[Bed] = BEDS) -> Figure:
    """The figure, a panel per bed, 900 px wide."""
    drawing = Figure(figsize=(9.0, 3.9), dpi=100, layout="constrained")
    drawing.patch.set_alpha(0)
    for bed, axes in zip(beds, drawing.subplots(1, len(beds)), strict=True):
        curves, full = bed.curves()
        shares = sorted({point.share for curve in curves.values() for point in curve})
        _style(axes, bed.title, shares)
        # 1. full memory and curves
        axes.axhline(full, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        for policy, curve in curves.items():
            _line(axes, curve, POLICIES[policy][1], bars=policy != REFERENCE)
        # 2. labels at the smallest budget, where the curves are apart
        places = spread([curve[0].accuracy for curve in curves.values()])
        for (policy, curve), place in zip(curves.items(), places, strict=True):
            _label(axes, shares[0], place, f"{POLICIES[policy][0]}  {curve[0].accuracy:.0f}", POLICIES[policy][1])
        axes.text(shares[0] * 0.88, full + 1.4, f"full memory  {full:.1f}", color=INK, fontsize=8.5, ha="right")
    drawing.supxlabel("kept tokens per layer, share of the stream", color=INK, fontsize=9.5)
    drawing.suptitle("Right answers by kept tokens, %, training-free", color=INK, fontsize=11)
    return drawing


def _line(axes: Axes, curve: Sequence[Point], colour: str, *, bars: bool) -> None:
    named = colour != GREY
    share, accuracy = [point.share for point in curve], [point.accuracy for point in curve]
    line = {"color": colour, "linewidth": 2.2 if named else 1.1, "zorder": 3 if named else 2}
    axes.plot(share, accuracy, marker="o", markersize=4.5 if named else 3, **line)
    if bars:
        ends = [[point.accuracy - point.low for point in curve], [point.high - point.accuracy for point in curve]]
        axes.errorbar(share, accuracy, yerr=ends, fmt="none", ecolor=colour, elinewidth=1, capsize=2, zorder=2)


def _label(axes: Axes, share: float, place: float, text: str, colour: str) -> None:
    """A label left of the first point; coloured lines have bold ones."""
    named = colour != GREY
    style = {"color": colour if named else INK, "weight": "bold" if named else "normal", "fontsize": 8.5}
    axes.text(share * 0.88, place, text, ha="right", va="center", **style)


def _style(axes: Axes, title: str, shares: Sequence[float]) -> None:
    axes.set_facecolor("none")
    axes.set_xscale("log", base=2)
    axes.set_xlim(shares[0] * 0.34, shares[-1] * 1.12)
    axes.yaxis.tick_right()
    axes.set_ylim(0, HEIGHT)
    axes.set_xticks(shares, [f"1/{1 / share:.0f}" for share in shares])
    axes.set_yticks(range(0, 101, 20))
    axes.minorticks_off()
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0, labelsize=8.5)
    axes.spines[:].set_visible(False)
    axes.set_title(title, color=INK, fontsize=9.5, loc="center")


def dark_mode(svg: str) -> str:
    """The SVG with lighter text and darker grid lines where the reader's colour scheme is dark."""
    rules = "".join(f'[style*="{old}"]{{{new}!important}}' for old, new in DARK.items())
    style = f"<style>@media (prefers-color-scheme: dark){{{rules}}}</style>"
    start = svg.index(">", svg.index("<svg")) + 1
    return f"{svg[:start]}\n {style}{svg[start:]}"


def main(arguments: Sequence[str]) -> None:
    """Write the figure; with --png also a bitmap on white."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--png", type=Path, help="also write a bitmap on white")
    given = parser.parse_args(arguments)
    drawing = draw()
    with mpl.rc_context({"svg.hashsalt": "omnimem", "svg.fonttype": "none"}):
        drawing.savefig(FIGURE, metadata={"Date": None})
    FIGURE.write_text(dark_mode(FIGURE.read_text(encoding="utf-8")), encoding="utf-8")
    if given.png:
        drawing.savefig(given.png, dpi=200, facecolor="white")


if __name__ == "__main__":
    main(sys.argv[1:])
