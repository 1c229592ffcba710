"""Figures of a calibration: entropy and similarity by layer (paper, figure 2), slots by layer (paper, figure 7)."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from omnimem.budget import Budget, Signals
from omnimem.errors import counted

COLOURS = {"all": "#6b7280", "audio": "#d97706", "visual": "#2563eb"}


def draw_signals(signals: Signals) -> Figure:
    """Entropy and similarity by layer and modality (paper, figure 2)."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, readings, name in (
        (left, signals.entropy, "entropy of attention / log K"),
        (right, signals.similarity, "similarity of neighbours"),
    ):
        rows = {"all": readings.whole, "audio": readings.audio, "visual": readings.visual}
        for kind, row in rows.items():
            style = "--" if kind == "all" else "-"
            axes.plot(range(len(row)), row, style, color=COLOURS[kind], marker="o", markersize=3, label=kind)
        _by_layer(axes, signals.layers, name)
    left.legend(frameon=False)
    figure.suptitle(f"{counted(signals.chunks, 'chunk')} of {counted(signals.streams, 'stream')}", fontsize=10)
    return figure


def draw_budget(budget: Budget) -> Figure:
    """Audio and visual slots by layer, and their mean (paper, figure 7); one bar per layer for a shared pool."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    layers = range(budget.layers)
    audio, visual = ([slots[i] for slots in budget.slots] for i in (0, 1))
    axes.bar(
        layers, visual, color=COLOURS["visual" if budget.split else "all"], label="visual" if budget.split else "shared"
    )
    if budget.split:
        axes.bar(layers, audio, bottom=visual, color=COLOURS["audio"], label="audio")
    mean = budget.total / budget.layers
    axes.axhline(mean, color="black", linewidth=0.8, linestyle="--", label=f"mean {mean:,.0f}")
    _by_layer(axes, budget.layers, "slots")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def _by_layer(axes: Axes, layers: int, name: str) -> None:
    """Layers are whole numbers; at most a dozen ticks."""
    step = max(1, round(layers / 9))
    axes.set_xticks(range(0, layers, step))
    axes.set_xlabel("layer")
    axes.set_ylabel(name)
    axes.spines[["top", "right"]].set_visible(False)


def save_figures(budget: Budget, folder: Path) -> list[Path]:
    """budget.svg, and signals.svg if the budget was measured; the same bytes for the same budget."""
    figures = {"budget": draw_budget(budget)}
    if budget.signals is not None:
        figures["signals"] = draw_signals(budget.signals)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with mpl.rc_context({"svg.hashsalt": "omnimem"}):
        for name, figure in figures.items():
            paths.append(folder / f"{name}.svg")
            figure.savefig(paths[-1], metadata={"Date": None})
    return paths
