"""Draws docs/figures/accuracy_by_memory.svg from the committed results.

python benchmarks/figures.py [--png FILE]

Accuracy on audio-visual recall against kept tokens per layer as a share of the stream, training-free, the mean over
three worlds and two base models. Bars are 95 % intervals of the paired difference to `distinct`.
"""

import json
import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/policies-2026-11-26.json"
FIGURE = ROOT / "docs/figures/accuracy_by_memory.svg"
STREAM = 576  # audio and visual tokens of a stream of 64 s
FULL_MEMORY = 99.5  # %, docs/log/2026-11-26-distinct.md: test split of seed 1, shipped base
INK, GRID, GREY = "#57606a", "#d8dee4", "#8b949e"
DARK = {f"fill: {INK}": "fill: #c9d1d9", f"stroke: {INK}": "stroke: #c9d1d9", f"stroke: {GRID}": "stroke: #30363d"}
ARMS = {  # label, colour; all with the same audio-visual split
    "distinct": ("distinct (ours)", "#e8590c"),
    "k_center_split": ("k-center", GREY),
    "omnimem": ("omnimem (default)", "#2f81f7"),
    "keydiff_split": ("KeyDiff", GREY),
    "paper": ("paper's score (psi)", "#8250df"),
    "infinipot_v_split": ("InfiniPot-V", GREY),
    "hermes_split": ("HERMES", GREY),
    "streammem_split": ("StreamMem", GREY),
    "snapkv_split": ("SnapKV", GREY),
    "uniform_split": ("uniform", GREY),
}
LABEL_GAP = 4.6  # points of accuracy between two labels


def curve(rows: Sequence[Mapping[str, Any]], arm: str) -> list[tuple[float, float, float, float]]:
    """(share of the stream, accuracy, low, high) of an arm at each budget, in % but for the share."""
    reference = {row["slots"]: row["accuracy"] for row in rows if row["arm"] == "distinct"}
    found = []
    for row in (row for row in rows if row["arm"] == arm):
        low, high = (100 * (reference[row["slots"]] + row.get(end, 0.0)) for end in ("low", "high"))
        found.append((row["slots"] / STREAM, 100 * row["accuracy"], low, high))
    return sorted(found)


def spread(places: Sequence[float]) -> list[float]:
    """The places moved apart to at least LABEL_GAP between neighbours; order and mean are kept."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    blocks: list[list[float]] = []  # [mean, size]: labels that touch move together
    for index in order:
        blocks.append([places[index], 1])
        while len(blocks) > 1 and blocks[-1][0] - blocks[-2][0] < LABEL_GAP * (blocks[-2][1] + blocks[-1][1]) / 2:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [[(a * n + b * m) / (n + m), n + m]]
    moved = [mean + LABEL_GAP * (i - (size - 1) / 2) for mean, size in blocks for i in range(int(size))]
    return [place for _, place in sorted(zip(order, moved, strict=True))]


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The figure, 700 px wide."""
    drawing = Figure(figsize=(7.0, 4.4), dpi=100, layout="constrained")
    drawing.patch.set_alpha(0)
    axes = drawing.subplots()
    curves = {arm: curve(rows, arm) for arm in ARMS}
    # 1. reference line and curves
    axes.axhline(FULL_MEMORY, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    _label(axes, FULL_MEMORY, f"full memory  {FULL_MEMORY}", INK)
    for arm, (_, colour) in ARMS.items():
        share, accuracy, low, high = zip(*curves[arm], strict=True)
        bars = _lengths(low, accuracy), _lengths(accuracy, high)
        named = colour != GREY
        line = {"color": colour, "linewidth": 2.4 if named else 1.2, "zorder": 3 if named else 2}
        axes.plot(share, accuracy, marker="o", markersize=5 if named else 3.5, **line)
        if arm != "distinct":
            axes.errorbar(share, accuracy, yerr=bars, fmt="none", ecolor=colour, elinewidth=1.2, capsize=2, zorder=2)
    # 2. labels at the small budget, where the curves are apart
    for (arm, (label, colour)), place in zip(ARMS.items(), spread([curves[arm][0][1] for arm in ARMS]), strict=True):
        _label(axes, place, f"{label}  {curves[arm][0][1]:.0f}", colour)
    _style(axes)
    return drawing


def _label(axes: Axes, place: float, text: str, colour: str) -> None:
    """A label left of the axes; coloured lines have bold ones."""
    named = colour not in (GREY, INK)
    style = {"color": colour if named else INK, "weight": "bold" if named else "normal", "fontsize": 9.5}
    axes.text(1 / 34.3, place, text, ha="right", va="center", **style)


def _lengths(low: Iterable[float], high: Iterable[float]) -> list[float]:
    return [above - below for below, above in zip(low, high, strict=True)]


def _style(axes: Axes) -> None:
    axes.set_facecolor("none")
    axes.set_xscale("log", base=2)
    axes.set_xlim(1 / 33.5, 1 / 7.6)
    axes.yaxis.tick_right()
    axes.set_ylim(0, 106)
    axes.set_xticks([1 / 32, 1 / 16, 1 / 8], ["1/32\n18 tokens", "1/16\n36 tokens", "1/8\n72 tokens"])
    axes.set_yticks(range(0, 81, 20))
    axes.minorticks_off()
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("kept audio and visual tokens per layer, share of the stream", color=INK)
    axes.set_title("Accuracy on audio-visual recall, %, training-free", color=INK, fontsize=11, loc="center")


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
    drawing = draw(json.loads(RESULTS.read_text(encoding="utf-8"))["rows"])
    with mpl.rc_context({"svg.hashsalt": "omnimem", "svg.fonttype": "none"}):
        drawing.savefig(FIGURE, metadata={"Date": None})
    FIGURE.write_text(dark_mode(FIGURE.read_text(encoding="utf-8")), encoding="utf-8")
    if given.png:
        drawing.savefig(given.png, dpi=200, facecolor="white")


if __name__ == "__main__":
    main(sys.argv[1:])
