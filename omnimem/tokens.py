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
from typing import Any, Literal, NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int, Int8, Shaped
from torch import Tensor
from torch.nn import functional as F

Tracks = Literal["both", "video", "audio"]  # of one stream


class Modality(IntEnum):
    """What a token encodes; text is never evicted (docs/paper.md, "Eviction cycle")."""

    TEXT = 0
    AUDIO = 1
    VISUAL = 2

    def mask(self, modality: Int8[Tensor, "*tokens"]) -> Bool[Tensor, "*tokens"]:
        """Which tokens are of this modality; where a graph is captured, `==` of a tensor and a member is False."""
        return modality == int(self)


EVICTABLE: tuple[Modality, Modality] = (Modality.AUDIO, Modality.VISUAL)  # the order of every budget table
SPARE = 8  # storage of a memory that grows has 1/8 of its places free when it is allocated
ABSENT = -1  # modality of padding: rows that keep unequal numbers of tokens are padded to the longest
HIDDEN = -1e4  # gate of padding: no query attends to it, in any precision


class Counts(NamedTuple):
    """How many tokens each stream of a batch holds, known without a question to the device.

    Where streams hold unequal numbers of text tokens (`markers: with_group`), that of the longest one: the others are
    padded to it.
    """

    text: int
    media: int  # audio and visual tokens
    audio: int | None  # None where only the device knows: after both competed for the same slots
    grouped: int | None  # text of groups of frames; None where only the device knows

    @classmethod
    def of(cls, modality: Tensor, place: Tensor) -> "Counts":
        """Those of all streams, in one transfer from the device."""
        return cls.of_each([(modality, place)])[0]

    @classmethod
    def of_each(cls, pairs: Sequence[tuple[Tensor, Tensor]]) -> list["Counts"]:
        """Those of several (modality, place), in one transfer from the device."""
        sums = []
        for modality, place in pairs:
            kinds, text = modality[0], Modality.TEXT.mask(modality)
            longest = [part.sum(dim=1).amax() for part in (text, text & (place[:, 3] >= 0))]
            sums.append(torch.stack([longest[0], (kinds > 0).sum(), Modality.AUDIO.mask(kinds).sum(), longest[1]]))
        return [cls(*row) for row in torch.stack(sums).tolist()]

    def plus(self, later: "Counts") -> "Counts":
        """Of these tokens and those of `later`."""
        audio = None if self.audio is None or later.audio is None else self.audio + later.audio
        grouped = None if self.grouped is None or later.grouped is None else self.grouped + later.grouped
        return Counts(self.text + later.text, self.media + later.media, audio, grouped)


def token_axis(number: int) -> dict[str, Any]:
    """Metadata of a field of `Tokens`: which axis of the tensor counts tokens."""
    return {"token_axis": number}


@final
class Room:
    """Storage of the tokens of one layer from which nothing is evicted, with free places at its end.

    Written places never change, so every `Tokens` on it stays a value. Only who holds the last token may write further:
    a fork that goes on after another one has appended copies its tokens.
    """

    def __init__(self, buffers: tuple[Tensor, ...], filled: int) -> None:
        self.buffers, self.filled = buffers, filled

    @classmethod
    def of(cls, tokens: "Tokens", more: int) -> "Room":
        """Storage with a copy of the tokens, `more` free places and an eighth of them all."""
        places = tokens.count + more
        places += places // SPARE
        buffers = []
        for part, axis in zip(tokens.tensors(), TOKEN_AXES.values(), strict=True):
            shape = list(part.shape)
            shape[axis] = places
            buffer = part.new_empty(shape)
            buffer.narrow(axis, 0, tokens.count).copy_(part)
            buffers.append(buffer)
        return cls(tuple(buffers), tokens.count)

    def follows(self, tokens: "Tokens", more: int) -> bool:
        """Whether `more` tokens can be written after these, all of whose fields are still those of this storage."""
        pairs = zip(tokens.tensors(), self.buffers, TOKEN_AXES.values(), strict=True)
        same = all(part.data_ptr() == buffer.data_ptr() for part, buffer, _ in pairs)
        return same and self.filled == tokens.count and self.buffers[0].shape[2] >= tokens.count + more


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
    # the vectors that redundancy or coverage reads, as `omnimem.sketches` stores them
    feature: Shaped[Tensor, "batch tokens feature"] = field(metadata=token_axis(1))
    gate: Float[Tensor, "batch tokens"] = field(metadata=token_axis(1))
    # inputs of the layer, where the gradient mode recomputes keys and values from them; else of width 0
    states: Float[Tensor, "batch tokens states"] = field(metadata=token_axis(1))
    # the one key-value head that holds the token; empty: all heads hold all tokens
    owner: Int8[Tensor, "batch owners tokens"] = field(metadata=token_axis(2))
    counts: Counts | None = None  # of every stream; None: unequal or not known, see `counted`
    room: Room | None = None  # where these tokens are stored, if tokens may be appended there

    @property
    def counted(self) -> Counts:
        """`counts`, or those of the first stream, asked of the device."""
        return Counts.of(self.modality, self.place) if self.counts is None else self.counts

    @property
    def padded(self) -> bool:
        """Whether rows may hold padding; asked of the device where the counts are not known."""
        if len(self.modality) == 1:
            return False
        return bool((self.modality == ABSENT).any()) if self.counts is None else self.counts.grouped != 0

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
        values: dict[str, Any] = dict(zip(TOKEN_AXES, tensors, strict=True))
        return cls(**values)

    def map(self, function: Callable[[Tensor, int], Tensor]) -> "Tokens":
        """Tokens whose fields are `function(tensor, token axis)` of these fields."""
        return type(self).of([function(getattr(self, name), axis) for name, axis in TOKEN_AXES.items()])

    def gather(self, index: Int[Tensor, "batch kept"], counts: Counts | None = None) -> "Tokens":
        """The tokens at `index`, each stream by its own row; `counts` of them, where known."""
        if len(index) == 1:  # whole rows are copied: a quarter of the time of `gather` on a CPU
            found = self.map(lambda tensor, axis: tensor.index_select(axis, index[0]))
        else:
            found = self.map(lambda tensor, axis: tensor.gather(axis, _expand(index, tensor, axis)))
        return found if counts is None else replace(found, counts=counts)

    def cat(self, later: "Tokens") -> "Tokens":
        """These tokens followed by `later`."""
        counts = None if self.counts is None or later.counts is None else self.counts.plus(later.counts)
        return replace(Tokens.joined([self, later]), counts=counts)

    def extended(self, later: "Tokens") -> "Tokens":
        """`cat` outside the autograd graph that copies `later` alone, as long as the storage has room for it."""
        room = self.room
        if room is None or not room.follows(self, later.count):
            room = Room.of(self, later.count)
        end = self.count + later.count
        for buffer, part, axis in zip(room.buffers, later.tensors(), TOKEN_AXES.values(), strict=True):
            buffer.narrow(axis, self.count, later.count).copy_(part)
        room.filled = end
        views = [buffer.narrow(axis, 0, end) for buffer, axis in zip(room.buffers, TOKEN_AXES.values(), strict=True)]
        counts = None if self.counts is None or later.counts is None else self.counts.plus(later.counts)
        return replace(Tokens.of(views), counts=counts, room=room)

    @classmethod
    def joined(cls, parts: Sequence["Tokens"]) -> "Tokens":
        """All parts, one after the other."""
        rows = [([getattr(part, name) for part in parts], axis) for name, axis in TOKEN_AXES.items()]
        return cls.of([torch.cat(row, dim=axis) for row, axis in rows])

    def since(self, count: int) -> "Tokens":
        """A copy of the tokens after the first `count`, which does not keep the others alive."""
        return self.map(lambda tensor, axis: tensor.narrow(axis, count, tensor.shape[axis] - count).clone())

    def settled(self, counts: Counts) -> "Tokens":
        """The tokens without the ABSENT ones at their end, of which `counts` holds none."""
        staying = counts.text + counts.media
        kept = self if staying == self.count else self.map(lambda tensor, axis: tensor.narrow(axis, 0, staying))
        return replace(kept, counts=counts)

    def masked(self, present: Bool[Tensor, "batch tokens"]) -> "Tokens":
        """The same tokens; those that are not `present` become padding."""
        return replace(
            self,
            modality=torch.where(present, self.modality, torch.full_like(self.modality, ABSENT)),
            gate=torch.where(present, self.gate, torch.full_like(self.gate, HIDDEN)),
            counts=None,
        )

    def detached(self) -> "Tokens":
        """The same values outside the autograd graph."""
        return replace(self.map(lambda tensor, axis: tensor.detach()), counts=self.counts)


TOKEN_AXES: dict[str, int] = {
    each.name: each.metadata["token_axis"] for each in fields(Tokens) if "token_axis" in each.metadata
}


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

    def detached(self) -> "DeepStack":
        """The same features as constants."""
        return replace(self, features=tuple(level.detach() for level in self.features))


class ChunkFacts(NamedTuple):
    """What the loop over chunks must know of one on the host."""

    counts: Counts  # of its first stream; all streams of a batch have one layout
    ends: tuple[int, ...]  # of each stream, the largest position
    times: tuple[int, ...]  # of each stream, the largest time

    @classmethod
    def of(cls, positions: Tensor, modality: Tensor, place: Tensor) -> "ChunkFacts":
        """Those of a chunk; without a wait where its tensors are on the host."""
        ends = torch.stack([positions.amax(dim=(1, 2)), positions[:, 0].amax(dim=1)])
        return cls(Counts.of(modality, place), *map(tuple, ends.tolist()))


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
    facts: ChunkFacts | None = None  # of `positions`, `modality` and `place`, from who built them on the host
    untuned: "Chunk | None" = None  # the chunk by the base model's projectors, where an adapter has others

    def __post_init__(self) -> None:
        if self.place is None:
            object.__setattr__(self, "place", place_of(self.positions))

    @property
    def places(self) -> Int[Tensor, "batch places tokens"]:
        """`place`, which is never None after construction."""
        assert self.place is not None
        return self.place

    @property
    def known(self) -> ChunkFacts:
        """`facts`, or the same asked of the device."""
        return self.facts or ChunkFacts.of(self.positions, self.modality, self.places)

    @property
    def count(self) -> int:
        """Number of tokens per stream."""
        return self.modality.shape[1]

    @classmethod
    def joined(cls, parts: Sequence["Chunk"]) -> "Chunk":
        """Parts of one stream, one after the other."""
        modality = torch.cat([part.modality for part in parts], dim=1)
        levels = zip(*(part.deepstack.features for part in parts if part.deepstack), strict=True)
        features = tuple(torch.cat(level) for level in levels)
        return replace(
            parts[-1],
            embeddings=torch.cat([part.embeddings for part in parts], dim=1),
            positions=torch.cat([part.positions for part in parts], dim=2),
            modality=modality,
            place=torch.cat([part.places for part in parts], dim=2),
            deepstack=DeepStack(mask=modality == Modality.VISUAL, features=features) if features else None,
            facts=None,
            untuned=None if parts[-1].untuned is None else cls.joined([part.untuned for part in parts if part.untuned]),
        )

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
            facts=None,
            untuned=None,
        )
