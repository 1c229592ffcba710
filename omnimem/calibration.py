"""Calibration: measures how each layer uses its memory on a few streams; `omnimem.budget` allocates slots from it.

The figures are the paper's figure 2 (entropy and similarity by layer and modality) and figure 7 (budget by layer).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import final

import matplotlib as mpl
import torch
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from omnimem.budget import Budget, Readings, Signals
from omnimem.policies.base import Policy
from omnimem.streaming.attach import StreamedAttention
from omnimem.streaming.stream import Stream
from omnimem.tokens import Chunk, Modality
from omnimem.view import LayerView, similarity

COLOURS = {"all": "#6b7280", "audio": "#d97706", "visual": "#2563eb"}


class CalibrationError(ValueError):
    """Streams that cannot be measured; the message names the setting to change."""


@final
@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """Number of measured streams, and of chunks skipped in each while the memory fills."""

    streams: int = 8
    skip_chunks: int = 5  # at the start of every stream, as in the release

    def __post_init__(self) -> None:
        if self.streams < 1:
            raise CalibrationError(f"calibration.streams is {self.streams}; set it to 1 or more")
        if self.skip_chunks < 0:
            raise CalibrationError(f"calibration.skip_chunks is {self.skip_chunks}; set it to 0 or more")


@final
class _Mean:
    """A mean per layer."""

    def __init__(self, layers: int) -> None:
        self.sums, self.counts = [0.0] * layers, [0] * layers

    def add(self, layer: int, readings: Float[Tensor, " batch"]) -> None:
        self.sums[layer] += float(readings.double().sum())
        self.counts[layer] += readings.numel()

    def values(self) -> tuple[float, ...]:
        return tuple(total / count for total, count in zip(self.sums, self.counts, strict=True))


@final
class Recorder:
    """Measures every layer after every chunk of a stream: `Stream(…, recorder=recorder)`.

    Entropy: of the attention of the chunk's queries to the audio and visual tokens of [memory ; chunk], normalised over
    those tokens and divided by the log of their number. Similarity: the mean of s over the same tokens, computed in the
    pool. Text is excluded: it is never evicted, and the attention sink on the first token would dominate the entropy.
    """

    def __init__(self, layers: int, options: CalibrationOptions) -> None:
        self.options = options
        self.streams, self.chunks, self.longest = 0, 0, 0
        self._seen = [0] * layers
        self._entropy = {name: _Mean(layers) for name in COLOURS}
        self._similarity = {name: _Mean(layers) for name in COLOURS}

    def begin(self) -> None:
        """Start a new stream (or batch of streams)."""
        self._seen = [0] * len(self._seen)

    @torch.no_grad()
    def __call__(self, layer: int, view: LayerView) -> None:
        """Measure one layer; chunks that hold only text are ignored."""
        # 1. skip the first chunks
        if bool((view.modality[:, -view.new :] == Modality.TEXT).all()):
            return
        self._seen[layer] += 1
        self._count(layer, view.modality.shape[0] // view.heads)
        if self._seen[layer] <= self.options.skip_chunks:
            return
        # 2. measure all tokens and each modality
        neighbours = similarity(view.pool.feature, view.modality, view.measures)
        members = {
            "all": view.modality != Modality.TEXT,
            "audio": view.modality == Modality.AUDIO,
            "visual": view.modality == Modality.VISUAL,
        }
        for name, member in members.items():
            if int(member[0].sum()) > 1:  # the entropy of a single token is 0 / log 1
                self._entropy[name].add(layer, normalised_entropy(view.mass, member))
                self._similarity[name].add(layer, (neighbours * member).sum(1) / member.sum(1))

    def _count(self, layer: int, batch: int) -> None:
        if layer == 0:
            self.longest = max(self.longest, self._seen[0])
            self.streams += batch * (self._seen[0] == self.options.skip_chunks + 1)
            self.chunks += batch * (self._seen[0] > self.options.skip_chunks)

    def signals(self) -> Signals:
        """Mean over all measured chunks of all streams; streams of at most skip_chunks chunks are not measured.

        Raises CalibrationError when no stream is long enough, or a modality is missing.
        """
        skip = self.options.skip_chunks
        if self.chunks == 0:
            raise CalibrationError(
                f"no calibration stream is longer than calibration.skip_chunks: {skip} (the longest has {self.longest} "
                f"chunks); set calibration.skip_chunks below {max(self.longest, 1)}, give longer streams, or lower "
                "stream.chunk_tokens"
            )
        for name in ("audio", "visual"):
            if not min(self._entropy[name].counts):
                raise CalibrationError(
                    f"the calibration streams hold no {name} tokens to measure; "
                    "give streams with both tracks, or set memory.budget: {name: shared}"
                )
        return Signals(
            entropy=_readings(self._entropy),
            similarity=_readings(self._similarity),
            streams=self.streams,
            chunks=self.chunks,
        )


def calibrate(
    attached: StreamedAttention, policy: Policy, streams: Iterable[Iterable[Chunk]], options: CalibrationOptions
) -> Signals:
    """Signals of a model, measured under `policy` on the first `options.streams` streams."""
    recorder = Recorder(attached.shape.layers, options)
    for _, chunks in zip(range(options.streams), streams, strict=False):
        recorder.begin()
        stream: Stream | None = None
        for chunk in chunks:
            if stream is None:
                stream = Stream(attached, policy, batch=chunk.modality.shape[0], recorder=recorder)
            with torch.no_grad():
                stream.feed(chunk)
    return recorder.signals()


def normalised_entropy(
    mass: Float[Tensor, "batch tokens"], member: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, " batch"]:
    """H(p) / log K with p the mass of the K members divided by its sum: 1 for uniform attention."""
    inside = mass.double() * member
    share = inside / inside.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return torch.special.entr(share).sum(dim=1) / member.sum(dim=1).double().log()


def _readings(means: dict[str, _Mean]) -> Readings:
    return Readings(whole=means["all"].values(), audio=means["audio"].values(), visual=means["visual"].values())


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
    figure.suptitle(f"{signals.chunks} chunks of {signals.streams} streams", fontsize=10)
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
    """Label an x axis of layers, with integer ticks, at most about a dozen."""
    step = max(1, round(layers / 9))
    axes.set_xticks(range(0, layers, step))
    axes.set_xlabel("layer")
    axes.set_ylabel(name)
    axes.spines[["top", "right"]].set_visible(False)


def save_figures(budget: Budget, folder: Path) -> list[Path]:
    """Write budget.svg, and signals.svg if the budget has signals; deterministic for a given budget."""
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
