"""The tokens that one layer remembers, and the legend of axis letters used by every shape in this package.

batch    streams of one layout that share a pass
tokens   tokens of a memory, of a chunk, or of both (the pool), in order of arrival
queries  tokens that attend
keys     tokens attended to
heads    query heads;  kv_heads  key-value heads
dim      width of one head;  width  width of the residual stream;  feature  width of the redundancy feature
states   width of the layer inputs that are carried: all of them or 0
owners   1 where every key-value head keeps tokens of its own, else 0
axes     the three axes of a position: time, height, width
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import final

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor


class Modality(IntEnum):
    """What a token is; text is never evicted (release, method 1.5)."""

    TEXT = 0
    AUDIO = 1
    VISUAL = 2


EVICTABLE: tuple[Modality, Modality] = (Modality.AUDIO, Modality.VISUAL)  # the order of every budget table
ABSENT = -1  # modality of a place that holds nothing: rows that keep unequal numbers are filled up with such places
HIDDEN = -1e4  # gate of such a place: no query sees it, in any precision


@final
@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What one layer remembers of some tokens: keys after RoPE, values, and what selection needs to judge them.

    `gate` is the additive attention bias of softened selection: 0 for hard selection and for text. Where every
    key-value head keeps tokens of its own, `tokens` counts those of all heads (`omnimem.per_head`).
    """

    keys: Float[Tensor, "batch kv_heads tokens dim"]
    values: Float[Tensor, "batch kv_heads tokens dim"]
    positions: Int[Tensor, "batch axes tokens"]
    modality: Int8[Tensor, "batch tokens"]
    order: Int[Tensor, "batch tokens"]  # arrival number in the stream, from 0
    importance: Float[Tensor, "batch tokens"]  # accumulated attention mass, float32
    novelty: Float[Tensor, "batch tokens"]  # 1 - redundancy as judged at arrival, float32
    feature: Float[Tensor, "batch tokens feature"]  # what redundancy is judged on
    gate: Float[Tensor, "batch tokens"]
    states: Float[Tensor, "batch tokens states"]  # what entered the layer, where gradient asks for it; else empty
    owner: Int8[Tensor, "batch owners tokens"]  # the key-value head that holds a token alone; empty: all heads hold all

    @property
    def count(self) -> int:
        """Number of tokens per stream."""
        return self.modality.shape[1]

    @property
    def heads(self) -> int:
        """How many key-value heads keep tokens of their own; 1: all of them hold every token."""
        return int(self.owner.max()) + 1 if self.owner.numel() else 1

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values and of all side state."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    @property
    def key_value_bytes(self) -> int:
        """Bytes of the keys and values alone."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.keys, self.values))

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors in the order of the fields; `Tokens.of` is the inverse."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Tokens":
        """Tokens from the flat tensors of `tensors()`."""
        return cls(**{field.name: tensor for field, tensor in zip(fields(cls), tensors, strict=True)})

    def gather(self, index: Int[Tensor, "batch kept"]) -> "Tokens":
        """The tokens at `index`, each stream by its own row."""
        return type(self).of(
            [
                tensor.gather(axis, _expand(index, tensor, axis))
                for tensor, axis in zip(self.tensors(), TOKEN_AXES, strict=True)
            ]
        )

    def cat(self, later: "Tokens") -> "Tokens":
        """These tokens followed by `later`."""
        pairs = zip(self.tensors(), later.tensors(), TOKEN_AXES, strict=True)
        return type(self).of([torch.cat([a, b], dim=axis) for a, b, axis in pairs])


TOKEN_AXES: tuple[int, ...] = (2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 2)  # the axis of `tokens` in each field


def _expand(index: Tensor, like: Tensor, axis: int) -> Tensor:
    """`index` broadcast over every axis of `like` but the batch and the token axis, as `gather` wants it."""
    shape = [1] * like.ndim
    shape[0], shape[axis] = index.shape
    target = list(like.shape)
    target[axis] = index.shape[1]
    return index.view(shape).expand(target)


@final
@dataclass(frozen=True, kw_only=True)
class DeepStack:
    """Extra visual features that some text models add after their first layers (Qwen3-VL, Qwen3-Omni)."""

    mask: Tensor  # batch tokens, bool: where the visual tokens stand
    features: tuple[Tensor, ...]  # one a level: visual tokens of the whole batch x width


@final
@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A stretch of the stream, ready for the text model: embeddings, 3-axis positions and modality of each token."""

    embeddings: Float[Tensor, "batch tokens width"]
    positions: Int[Tensor, "batch axes tokens"]
    modality: Int8[Tensor, "batch tokens"]
    seconds: float = 0.0  # stream time at the end of the chunk
    deepstack: DeepStack | None = None

    @property
    def count(self) -> int:
        """Number of tokens per stream."""
        return self.modality.shape[1]

    def gather(self, index: Int[Tensor, "batch kept"]) -> "Chunk":
        """The tokens at `index`, each stream by its own row and every one once; deepstack features go with theirs."""
        deepstack = self.deepstack
        if deepstack is not None:
            mask = deepstack.mask.gather(1, index)
            place = (deepstack.mask.flatten().cumsum(0) - 1).view_as(deepstack.mask).gather(1, index)[mask]
            deepstack = DeepStack(mask=mask, features=tuple(level[place] for level in deepstack.features))
        return replace(
            self,
            embeddings=self.embeddings.gather(1, _expand(index, self.embeddings, 1)),
            positions=self.positions.gather(2, _expand(index, self.positions, 2)),
            modality=self.modality.gather(1, index),
            deepstack=deepstack,
        )
