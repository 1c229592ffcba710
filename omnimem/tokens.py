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
places   the four parts of a place: frame, row, column, group; -1 where a token has none
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import Any, Literal, final

import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor
from torch.nn import functional as F

Tracks = Literal["both", "video", "audio"]  # of one stream


class Modality(IntEnum):
    """What a token encodes; text is never evicted (docs/paper.md, "Eviction cycle")."""

    TEXT = 0
    AUDIO = 1
    VISUAL = 2


EVICTABLE: tuple[Modality, Modality] = (Modality.AUDIO, Modality.VISUAL)  # the order of every budget table
ABSENT = -1  # modality of padding: rows that keep unequal numbers of tokens are padded to the longest
HIDDEN = -1e4  # gate of padding: no query attends to it, in any precision


def token_axis(number: int) -> dict[str, Any]:
    """Metadata of a field of `Tokens`: which axis of the tensor counts tokens."""
    return {"token_axis": number}


@final
@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What one layer remembers of some tokens: keys after RoPE, values, and the side state that selection needs.

    `gate` is the additive attention bias of softened selection: 0 for hard selection and for text. Where every
    key-value head keeps tokens of its own, `tokens` counts those of all heads (`omnimem.per_head`).
    """

    keys: Float[Tensor, "batch kv_heads tokens dim"] = field(metadata=token_axis(2))
    values: Float[Tensor, "batch kv_heads tokens dim"] = field(metadata=token_axis(2))
    positions: Int[Tensor, "batch axes tokens"] = field(metadata=token_axis(2))
    # frame, row, column and group in the media, int32; unlike positions, the same in every model and never moved
    place: Int[Tensor, "batch places tokens"] = field(metadata=token_axis(2))
    modality: Int8[Tensor, "batch tokens"] = field(metadata=token_axis(1))
    # arrival number in the stream, from 0
    order: Int[Tensor, "batch tokens"] = field(metadata=token_axis(1))
    # accumulated attention mass, float32
    importance: Float[Tensor, "batch tokens"] = field(metadata=token_axis(1))
    # 1 - redundancy as measured at arrival, float32
    novelty: Float[Tensor, "batch tokens"] = field(metadata=token_axis(1))
    # the vectors that redundancy is measured on
    feature: Float[Tensor, "batch tokens feature"] = field(metadata=token_axis(1))
    gate: Float[Tensor, "batch tokens"] = field(metadata=token_axis(1))
    # inputs of the layer, where the gradient mode recomputes keys and values from them; else of width 0
    states: Float[Tensor, "batch tokens states"] = field(metadata=token_axis(1))
    # the one key-value head that holds the token; empty: all heads hold all tokens
    owner: Int8[Tensor, "batch owners tokens"] = field(metadata=token_axis(2))

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

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors in the order of `TOKEN_AXES`; `Tokens.of` is the inverse."""
        return tuple(getattr(self, name) for name in TOKEN_AXES)

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Tokens":
        """Tokens from the flat tensors of `tensors()`."""
        return cls(**dict(zip(TOKEN_AXES, tensors, strict=True)))

    def map(self, function: Callable[[Tensor, int], Tensor]) -> "Tokens":
        """Tokens whose fields are `function(tensor, token axis)` of these fields."""
        return type(self)(**{name: function(getattr(self, name), axis) for name, axis in TOKEN_AXES.items()})

    def gather(self, index: Int[Tensor, "batch kept"]) -> "Tokens":
        """The tokens at `index`, each stream by its own row."""
        if len(index) == 1:  # whole rows are copied: a quarter of the time of `gather` on a CPU
            return self.map(lambda tensor, axis: tensor.index_select(axis, index[0]))
        return self.map(lambda tensor, axis: tensor.gather(axis, _expand(index, tensor, axis)))

    def cat(self, later: "Tokens") -> "Tokens":
        """These tokens followed by `later`."""
        pairs = {name: [getattr(self, name), getattr(later, name)] for name in TOKEN_AXES}
        return type(self)(**{name: torch.cat(pair, dim=TOKEN_AXES[name]) for name, pair in pairs.items()})

    @classmethod
    def joined(cls, parts: Sequence["Tokens"]) -> "Tokens":
        """All parts, one after the other."""
        rows = {name: [getattr(part, name) for part in parts] for name in TOKEN_AXES}
        return cls(**{name: torch.cat(row, dim=TOKEN_AXES[name]) for name, row in rows.items()})

    def since(self, count: int) -> "Tokens":
        """A copy of the tokens after the first `count`, which does not keep the others alive."""
        return self.map(lambda tensor, axis: tensor.narrow(axis, count, tensor.shape[axis] - count).clone())

    def masked(self, present: Bool[Tensor, "batch tokens"]) -> "Tokens":
        """The same tokens; those that are not `present` become padding."""
        return replace(
            self,
            modality=torch.where(present, self.modality, torch.full_like(self.modality, ABSENT)),
            gate=torch.where(present, self.gate, torch.full_like(self.gate, HIDDEN)),
        )

    def detached(self) -> "Tokens":
        """The same values outside the autograd graph."""
        return self.map(lambda tensor, axis: tensor.detach())


TOKEN_AXES: dict[str, int] = {each.name: each.metadata["token_axis"] for each in fields(Tokens)}


def _expand(index: Tensor, like: Tensor, axis: int) -> Tensor:
    """`index` expanded over all axes of `like` but the batch and the token axis, as `gather` requires."""
    shape = [1] * like.ndim
    shape[0], shape[axis] = index.shape
    target = list(like.shape)
    target[axis] = index.shape[1]
    return index.view(shape).expand(target)


def place_of(positions: Int[Tensor, "*batch axes tokens"]) -> Int[Tensor, "*batch places tokens"]:
    """The axes of the position as frame, row and column, without group: of streams whose layout gives no places."""
    return F.pad(positions, (0, 0, 0, 1), value=-1).to(torch.int32)


@final
@dataclass(frozen=True, kw_only=True)
class DeepStack:
    """Extra visual features that some text models add after their first layers (Qwen3-VL, Qwen3-Omni)."""

    mask: Tensor  # batch tokens, bool: which tokens are visual
    features: tuple[Tensor, ...]  # one per level: visual tokens of the whole batch x width


@final
@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A segment of the stream as the text model reads it: embedding, 3-axis position and modality of each token.

    `place` is the frame grid (for audio the latest one that has begun), row, column and group of each token; -1 where
    there is none. Without it, the axes of the position count as frame, row and column.
    """

    embeddings: Float[Tensor, "batch tokens width"]
    positions: Int[Tensor, "batch axes tokens"]
    modality: Int8[Tensor, "batch tokens"]
    seconds: float = 0.0  # stream time up to which the chunk depends on the stream
    tracks: Tracks | None = None  # of the stream that this chunk opens
    deepstack: DeepStack | None = None
    at: float | None = None  # a rest: what precedes a question at this time, for its fork; None: part of the stream
    next_position: int | None = None  # of text right after the chunk; None: the one after the largest so far
    more: bool = False  # further chunks that need the stream up to the same time follow
    place: Int[Tensor, "batch places tokens"] | None = None

    def __post_init__(self) -> None:
        if self.place is None:
            object.__setattr__(self, "place", place_of(self.positions))

    @property
    def places(self) -> Int[Tensor, "batch places tokens"]:
        """`place`, which is never None after construction."""
        assert self.place is not None
        return self.place

    @property
    def count(self) -> int:
        """Number of tokens per stream."""
        return self.modality.shape[1]

    def gather(self, index: Int[Tensor, "batch kept"]) -> "Chunk":
        """The tokens at `index`, each stream by its own row, no index twice; with their deepstack features."""
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
            place=self.places.gather(2, _expand(index, self.places, 2)),
            deepstack=deepstack,
        )
