"""Retention log: for every token the last chunk after which a layer held it.

Evicted tokens never come back, so one number per token, layer and head gives the tokens held at any time: token k is
held after chunk c when it arrived with c or earlier and its number is at least c.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch
from jaxtyping import Bool, Int16, Int64
from torch import Tensor

from omnimem.memory import Memory, Shape
from omnimem.policies.base import Policy
from omnimem.streaming.attach import StreamedAttention
from omnimem.streaming.feeder import EncodedSample, Feeder
from omnimem.tokens import ABSENT, Modality, Tokens
from omnimem.view import LayerView

NEVER = -1  # read, and evicted with the chunk it arrived with
UNREAD = -2  # removed by the prefilter, never read by a layer
MOST_CHUNKS = np.iinfo(np.int16).max


@final
@dataclass(frozen=True, kw_only=True)
class Merged:
    """An entry that is not a token of the stream but a mean of several, or a summary."""

    layer: int
    head: int
    order: int  # arrival number of its place
    modality: Modality
    first: int  # first chunk after which it was held
    last: int  # last chunk after which it was held


@final
@dataclass(frozen=True, kw_only=True)
class Holding:
    """The tokens of one stream that one policy held, after every chunk."""

    ends: tuple[float, ...]  # end of each chunk in seconds; the opening is chunk 0
    came: Int64[np.ndarray, " chunks"]  # tokens that had arrived by the end of each chunk
    last: Int16[np.ndarray, "layers heads tokens"]  # last chunk after which it was held; NEVER, UNREAD
    merged: tuple[Merged, ...]
    counts: tuple[tuple[Mapping[Modality, int | float], ...], ...]  # entries by chunk and layer, from `Memory.counts`

    @property
    def arrival(self) -> Int64[np.ndarray, " tokens"]:
        """The chunk that each token arrived with."""
        return np.searchsorted(self.came, np.arange(self.last.shape[2]), side="right")

    def held(self, chunk: int) -> Bool[np.ndarray, "layers heads tokens"]:
        """Mask of the tokens held after a chunk."""
        return (self.last >= chunk) & (self.arrival <= chunk)

    def layer_shares(self, tokens: Sequence[int]) -> list[float]:
        """For each of these tokens the share of the layers (of heads of layers, if these keep their own) that hold it
        at the end.
        """
        return self.held(len(self.ends) - 1)[:, :, list(tokens)].mean(axis=(0, 1)).tolist()

    def in_common(self, other: "Holding", tokens: Sequence[int]) -> list[float]:
        """|A & B| / max(|A|, |B|) of every layer at the end, over these tokens; 1 where both hold none of them.

        Raises ValueError when heads keep tokens of their own in one of both only.
        """
        mine, theirs = (each.held(len(each.ends) - 1)[:, :, list(tokens)] for each in (self, other))
        if mine.shape != theirs.shape:
            raise ValueError(f"{mine.shape[1]} and {theirs.shape[1]} heads keep tokens of their own: not comparable")
        most = np.maximum(mine.sum(axis=(1, 2)), theirs.sum(axis=(1, 2)))
        return np.where(most > 0, (mine & theirs).sum(axis=(1, 2)) / np.maximum(most, 1), 1.0).tolist()


@final
class RetentionLog:
    """Records a stream while it is fed: pass `arrive` as the stream's recorder and call `record` after every chunk.

    Under a policy that merges, an entry is an original token exactly when its value has the same bits as the value of
    its arrival number on arrival: values never change, while keys are rotated when positions move.
    """

    def __init__(self, policy: Policy, shape: Shape, tokens: int) -> None:
        heads = shape.kv_heads if policy.traits.per_head else 1
        self._last = np.full((shape.layers, heads, tokens), UNREAD, np.int16)
        self._values = np.zeros(self._last.shape, np.int64) if policy.traits.merges else None
        self._merged: dict[tuple[int, int, int, int, int], tuple[int, int]] = {}
        self._ends: list[float] = []
        self._came: list[int] = []
        self._counts: list[tuple[Mapping[Modality, int | float], ...]] = []

    def arrive(self, layer: int, view: LayerView) -> None:
        """Record the tokens of a chunk that a layer reads, before selection."""
        first = view.pool.count - view.new
        present = (view.modality[0, first:] != ABSENT).cpu().numpy()
        order = view.order[0, first:].cpu().numpy()[present]
        self._last[layer][:, order] = NEVER
        if self._values is not None:
            values = view.pool.values[:, :, first:]
            for head, row in enumerate(values if view.heads > 1 else values[:1]):
                self._values[layer, head, order] = _bits(row)[present]

    def record(self, memory: Memory, came: int, seconds: float) -> None:
        """Record the entries held after a chunk that ended at `seconds`, with `came` tokens arrived in total."""
        chunk = len(self._ends)
        assert chunk <= MOST_CHUNKS, "chunk numbers fit 16 bits"
        for layer, tokens in enumerate(memory.layers):
            self._record_layer(layer, tokens, chunk)
        self._ends.append(seconds)
        self._came.append(came)
        self._counts.append(tuple(memory.counts()))

    def _record_layer(self, layer: int, tokens: Tokens, chunk: int) -> None:
        kinds, order = tokens.modality[0].cpu().numpy(), tokens.order[0].cpu().numpy()
        owner = tokens.owner[0, 0].cpu().numpy() if tokens.owner.shape[1] else np.zeros_like(kinds)
        present = kinds != ABSENT
        own = present
        if self._values is not None:
            bits = _bits(tokens.values[0])
            own = present & (self._values[layer, owner, order] == bits)
            for place in np.flatnonzero(present & ~own):
                key = layer, int(owner[place]), int(order[place]), int(kinds[place]), int(bits[place])
                self._merged[key] = self._merged.get(key, (chunk, chunk))[0], chunk
        self._last[layer, owner[own], order[own]] = chunk

    def holding(self) -> Holding:
        """The recorded holding."""
        merged = tuple(
            Merged(layer=layer, head=head, order=order, modality=Modality(kind), first=first, last=last)
            for (layer, head, order, kind, _), (first, last) in self._merged.items()
        )
        return Holding(
            ends=tuple(self._ends),
            came=np.asarray(self._came, np.int64),
            last=self._last,
            merged=merged,
            counts=tuple(self._counts),
        )


@torch.no_grad()
def follow(feeder: Feeder, attached: StreamedAttention, policy: Policy, opened: EncodedSample) -> Holding:
    """Stream a sample under a policy and return the tokens held after every chunk.

    Raises PolicyError when the policy needs oracle knowledge that the sample does not have.
    """
    if not policy.traits.needs_novelty:  # a recorded stream would compute redundancy features without need
        policy = replace(policy, measures=replace(policy.measures, feature=0))
    outline = feeder.outline(opened)
    log = RetentionLog(policy, attached.shape, len(outline.modality))
    stream = feeder.stream(attached, feeder.with_oracle(policy, [opened]), recorder=log.arrive)
    for chunk in feeder.chunks([opened]):
        stream.feed(chunk)
        log.record(stream.memory, stream.fed, chunk.seconds)
    return log.holding()


def _bits(values: Tensor) -> Int64[np.ndarray, " tokens"]:
    """A hash of the bits of each token's value [heads, tokens, dim]; integer sums do not depend on the order."""
    rows = values.detach().movedim(1, 0).flatten(1).contiguous().cpu()
    words = rows.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]).long().numpy()
    weights = np.random.default_rng(0).integers(1, 1 << 62, words.shape[1], dtype=np.int64) | 1
    return (words * weights).sum(axis=1)  # wraps around
