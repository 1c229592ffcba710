"""The memory of all layers: a value that is never changed in place."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from omnimem.tokens import ABSENT, TOKEN_AXES, Counts, Modality, Tokens

Held = frozenset[tuple[int, int]]  # tokens of a layer: head (0 where all heads hold all tokens) and arrival number


@final
@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a text model that an empty memory depends on."""

    layers: int
    kv_heads: int
    dim: int  # of one head
    width: int  # of the residual stream
    feature: int  # of the vectors that redundancy or coverage reads
    dtype: torch.dtype
    device: torch.device
    sketch: torch.dtype | None = None  # of the feature, where it is a sketch of the layer input
    places: int = 0  # parts of a place that are carried: 3 or none


@final
@dataclass(frozen=True, kw_only=True)
class Memory:
    """What every layer remembers of the streams of one batch; empty at the start of a stream."""

    layers: tuple[Tokens, ...]

    @classmethod
    def empty(cls, shape: Shape, batch: int) -> "Memory":
        """A memory without tokens."""
        numbers = {"dtype": shape.dtype, "device": shape.device}
        exact = {"dtype": torch.float32, "device": shape.device}
        whole = {"dtype": torch.int32, "device": shape.device}
        tokens = Tokens(
            keys=torch.zeros(batch, shape.kv_heads, 0, shape.dim, **numbers),
            values=torch.zeros(batch, shape.kv_heads, 0, shape.dim, **numbers),
            positions=torch.zeros(batch, 3, 0, **whole),
            place=torch.zeros(batch, shape.places, 0, **whole),
            group=torch.zeros(batch, 0, **whole),
            modality=torch.zeros(batch, 0, dtype=torch.int8, device=shape.device),
            order=torch.zeros(batch, 0, **whole),
            importance=torch.zeros(batch, 0, **exact),
            novelty=torch.zeros(batch, 0, **exact),
            feature=torch.zeros(batch, 0, shape.feature, dtype=shape.sketch or shape.dtype, device=shape.device),
            gate=torch.zeros(batch, 0, **exact),
            states=torch.zeros(batch, 0, 0, **numbers),
            owner=torch.zeros(batch, 0, 0, dtype=torch.int8, device=shape.device),
            counts=Counts(0, 0, 0, 0),
        )
        return cls(layers=(tokens,) * shape.layers)

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of all layers, flat; `Memory.of` is the inverse."""
        return tuple(tensor for layer in self.layers for tensor in layer.tensors())

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Memory":
        """A memory from the flat tensors of `tensors()`."""
        size = len(TOKEN_AXES)
        rows = (tensors[first : first + size] for first in range(0, len(tensors), size))
        return cls(layers=tuple(Tokens.of(row) for row in rows))

    @classmethod
    def joined(cls, blocks: Sequence["Memory"]) -> "Memory":
        """The blocks of a memory from which nothing was evicted, one after the other."""
        return cls(
            layers=tuple(Tokens.joined(parts) for parts in zip(*(block.layers for block in blocks), strict=True))
        )

    def since(self, before: "Memory") -> "Memory":
        """The tokens after those of `before`, as a block of its own."""
        pairs = zip(self.layers, before.layers, strict=True)
        return Memory(layers=tuple(layer.since(earlier.count) for layer, earlier in pairs))

    def detached(self) -> "Memory":
        """The same values outside the autograd graph."""
        return Memory(layers=tuple(layer.detached() for layer in self.layers))

    def held(self, row: int = 0) -> tuple[Held, ...]:
        """The audio and visual tokens that each layer holds of one stream."""
        found = []
        for layer in self.layers:
            there, order = layer.modality[row] > 0, layer.order[row]
            owner = layer.owner[row, 0] if layer.owner.shape[1] else torch.zeros_like(order)
            found.append(frozenset(zip(owner[there].tolist(), order[there].tolist(), strict=True)))
        return tuple(found)

    @property
    def batch(self) -> int:
        """Number of streams that share the pass."""
        return self.layers[0].modality.shape[0]

    def counts(self) -> list[dict[Modality, int | float]]:
        """Tokens per modality of each layer: mean over streams, and over heads that keep tokens of their own."""
        parts = [self.batch * layer.heads for layer in self.layers]
        return [
            {kind: _mean(int((layer.modality == kind).sum()), part) for kind in Modality}
            for layer, part in zip(self.layers, parts, strict=True)
        ]

    @property
    def entries(self) -> int | float:
        """Audio and visual entries per stream, summed over the layers; the budget limits this number.

        An entry is a key and a value of every key-value head, so a token that one of H heads keeps counts 1 / H.
        """
        return sum(
            _mean(int((layer.modality > 0).sum()), self.batch * layer.heads)
            if layer.counts is None
            else layer.counts.media
            for layer in self.layers
        )

    @property
    def bytes(self) -> int:
        """Bytes per stream with text and all side state; padding of shorter streams is not counted."""
        return sum(int(layer.bytes * self._held(layer)) for layer in self.layers) // self.batch

    def _held(self, layer: Tokens) -> float:
        """The fraction of a layer's places that is not padding; a batch of one stream has no padding."""
        padded = self.batch > 1 and layer.count > 0 and (layer.counts is None or layer.counts.grouped != 0)
        return float((layer.modality != ABSENT).float().mean()) if padded else 1.0


def in_common(ours: Sequence[Held], theirs: Sequence[Held]) -> list[float]:
    """|A & B| / max(|A|, |B|) of every layer; 1 where both hold nothing. A merged entry counts by its number."""
    return [
        len(mine & other) / max(len(mine), len(other)) if mine or other else 1.0
        for mine, other in zip(ours, theirs, strict=True)
    ]


def _mean(total: int, parts: int) -> int | float:
    """total / parts, as an integer where it is one."""
    return total // parts if total % parts == 0 else total / parts
