"""Ledger: of every token the last chunk after which a layer held it.

What is evicted never comes back, so one number a token, layer and head tells what was held at any time: token k is held
after chunk c when it came with c or earlier and its number is at least c.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch
from jaxtyping import Bool, Int16, Int64
from torch import Tensor

from omnimem.memory import Memory, Shape
from omnimem.policies.base import Policy
from omnimem.policies.capabilities import keeps_per_head, merges, needs_novelty
from omnimem.streaming.attach import StreamedAttention
from omnimem.streaming.feeder import EncodedSample, Feeder
from omnimem.tokens import ABSENT, Modality, Tokens
from omnimem.view import LayerView

NEVER = -1  # read, and evicted with the chunk it came with
UNREAD = -2  # sifted out before any layer read it
MOST_CHUNKS = np.iinfo(np.int16).max


@final
@dataclass(frozen=True, kw_only=True)
class Merged:
    """An entry that is no token that arrived: a mean of several, or a summary."""

    layer: int
    head: int
    order: int  # arrival number that it stands by
    modality: Modality
    first: int  # chunk after which it was there
    last: int  # chunk after which it was there for the last time


@final
@dataclass(frozen=True, kw_only=True)
class Holding:
    """What one policy held of one stream, after every chunk."""

    ends: tuple[float, ...]  # seconds, of each chunk; the opening is chunk 0
    came: Int64[np.ndarray, " chunks"]  # tokens that had come by the end of each chunk
    last: Int16[np.ndarray, "layers heads tokens"]  # last chunk after which it was held; NEVER, UNREAD
    merged: tuple[Merged, ...]
    counts: tuple[tuple[Mapping[Modality, int | float], ...], ...]  # entries by chunk and layer, as the memory counts

    @property
    def arrival(self) -> Int64[np.ndarray, " tokens"]:
        """The chunk that each token came with."""
        return np.searchsorted(self.came, np.arange(self.last.shape[2]), side="right")

    def held(self, chunk: int) -> Bool[np.ndarray, "layers heads tokens"]:
        """Which tokens were held after a chunk."""
        return (self.last >= chunk) & (self.arrival <= chunk)


@final
class RetentionLog:
    """Keeps the book while a stream is fed: `arrive` is its recorder, `note` is told after every chunk.

    An entry of a policy that merges is a token that arrived exactly when its value has the bits that the token of its
    arrival number had on arrival: keys are turned when positions move, values never change.
    """

    def __init__(self, policy: Policy, shape: Shape, tokens: int) -> None:
        heads = shape.kv_heads if keeps_per_head(policy) else 1
        self._last = np.full((shape.layers, heads, tokens), UNREAD, np.int16)
        self._values = np.zeros(self._last.shape, np.int64) if merges(policy) else None
        self._merged: dict[tuple[int, int, int, int, int], tuple[int, int]] = {}
        self._ends: list[float] = []
        self._came: list[int] = []
        self._counts: list[tuple[Mapping[Modality, int | float], ...]] = []

    def arrive(self, layer: int, view: LayerView) -> None:
        """The tokens of a chunk as a layer reads them, before it decides what it keeps."""
        first = view.pool.count - view.new
        there = (view.modality[0, first:] != ABSENT).cpu().numpy()
        order = view.order[0, first:].cpu().numpy()[there]
        self._last[layer][:, order] = NEVER
        if self._values is not None:
            values = view.pool.values[:, :, first:]
            for head, row in enumerate(values if view.heads > 1 else values[:1]):
                self._values[layer, head, order] = _bits(row)[there]

    def note(self, memory: Memory, came: int, seconds: float) -> None:
        """What is held after a chunk that ended at `seconds`, when so many tokens have come in all."""
        chunk = len(self._ends)
        assert chunk <= MOST_CHUNKS, "chunk numbers fit 16 bits"
        for layer, tokens in enumerate(memory.layers):
            self._note(layer, tokens, chunk)
        self._ends.append(seconds)
        self._came.append(came)
        self._counts.append(tuple(memory.counts()))

    def _note(self, layer: int, tokens: Tokens, chunk: int) -> None:
        kinds, order = tokens.modality[0].cpu().numpy(), tokens.order[0].cpu().numpy()
        owner = tokens.owner[0, 0].cpu().numpy() if tokens.owner.shape[1] else np.zeros_like(kinds)
        there = kinds != ABSENT
        own = there
        if self._values is not None:
            bits = _bits(tokens.values[0])
            own = there & (self._values[layer, owner, order] == bits)
            for place in np.flatnonzero(there & ~own):
                key = layer, int(owner[place]), int(order[place]), int(kinds[place]), int(bits[place])
                self._merged[key] = self._merged.get(key, (chunk, chunk))[0], chunk
        self._last[layer, owner[own], order[own]] = chunk

    def holding(self) -> Holding:
        """All that was noted."""
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
    """Stream a sample under a policy, and what was held of it.

    Raises PolicyError when the policy asks for what the sample does not tell.
    """
    if not needs_novelty(policy):  # a stream that is recorded carries what redundancy is judged on, needed or not
        policy = replace(policy, measures=replace(policy.measures, feature=0))
    outline = feeder.outline(opened)
    ledger = RetentionLog(policy, attached.shape, len(outline.modality))
    stream = feeder.stream(attached, feeder.with_oracle(policy, [opened]), recorder=ledger.arrive)
    for chunk in feeder.chunks([opened]):
        stream.feed(chunk)
        ledger.note(stream.memory, stream.fed, chunk.seconds)
    return ledger.holding()


def _bits(values: Tensor) -> Int64[np.ndarray, " tokens"]:
    """A number for the bits of each token's value [heads, tokens, dim]; sums of whole numbers know no order."""
    rows = values.detach().movedim(1, 0).flatten(1).contiguous().cpu()
    words = rows.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]).long().numpy()
    weights = np.random.default_rng(0).integers(1, 1 << 62, words.shape[1], dtype=np.int64) | 1
    return (words * weights).sum(axis=1)  # wraps around
