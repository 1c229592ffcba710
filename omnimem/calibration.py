"""Calibration: measures how each layer uses its memory on a few streams; `omnimem.budget` allocates slots from it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from omnimem.budget import Readings, Signals
from omnimem.errors import UserError, counted
from omnimem.policies.base import Policy, ScoredPolicy
from omnimem.streaming.attach import StreamedAttention
from omnimem.streaming.stream import Stream
from omnimem.tokens import Chunk, Modality
from omnimem.view import LayerView, similarity

KINDS = ("all", "audio", "visual")


class CalibrationError(UserError):
    """Streams that cannot be measured; the message names the setting to change."""


@final
@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """Number of measured streams, and of chunks skipped in each while the memory fills."""

    streams: int = 8  # the first training streams, whose attention is measured
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
        self._entropy = {name: _Mean(layers) for name in KINDS}
        self._similarity = {name: _Mean(layers) for name in KINDS}

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
        # 1. check that something was measured
        skip = self.options.skip_chunks
        if self.chunks == 0:
            raise too_short(self.longest, skip)
        for name in ("audio", "visual"):
            if not min(self._entropy[name].counts):
                raise missing_modality(name)
        # 2. means
        return Signals(
            entropy=_readings(self._entropy),
            similarity=_readings(self._similarity),
            streams=self.streams,
            chunks=self.chunks,
        )


def too_short(longest: int, skip: int) -> CalibrationError:
    """All calibration streams end within the chunks that are skipped; `longest` is their largest number of chunks."""
    return CalibrationError(
        f"no calibration stream is longer than calibration.skip_chunks: {skip} (the longest has "
        f"{counted(longest, 'chunk')}); set calibration.skip_chunks below {max(longest, 1)}, give longer streams, or "
        "lower stream.chunk_tokens"
    )


def missing_modality(name: str) -> CalibrationError:
    """The calibration streams have no tokens of a modality that a budget shares slots with."""
    return CalibrationError(
        f"the calibration streams hold no {name} tokens to measure; "
        "give streams with both tracks, or set memory.budget: {name: shared}"
    )


def calibrate(
    attached: StreamedAttention, policy: Policy, streams: Iterable[Iterable[Chunk]], options: CalibrationOptions
) -> Signals:
    """Signals of a model, measured under `policy` on the first `options.streams` streams."""
    recorder = Recorder(attached.shape.layers, options)
    measured = policy.on_inputs() if isinstance(policy, ScoredPolicy) else policy
    # the entropy of an estimate is no estimate of the entropy: signals are measured from all queries
    measured = replace(measured, measures=replace(measured.measures, query_stride=1))
    for _, chunks in zip(range(options.streams), streams, strict=False):
        recorder.begin()
        stream: Stream | None = None
        for chunk in chunks:
            if stream is None:
                stream = Stream(attached, measured, batch=chunk.modality.shape[0], recorder=recorder)
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
