"""The prompt pass: packed questions read the memory, which does not change."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from omnimem.attention.blocked import MEMORY, Segments, attend
from omnimem.per_head import head_rows, merge_query_rows, query_rows, rows_of
from omnimem.streaming.attach import StreamedAttention
from omnimem.streaming.chunk_pass import ReadConfig, kv_from_states
from omnimem.tokens import Tokens

PADDING = -1  # segment of padding in a packed pass
ANSWER = 64  # places for tokens of answers behind the questions; a longer answer copies the memory once more
IGNORED = -100  # label of a token that predicts nothing to learn
Asked = tuple[Sequence[int], Sequence[int], Sequence[int]]  # ids, offsets, labels


@final
@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Packed questions of each stream; they follow the tokens fed so far."""

    ids: Int[Tensor, "batch tokens"]
    segments: Int[Tensor, "batch tokens"]  # number of the question; PADDING where a row is shorter
    offsets: Int[Tensor, "batch tokens"]  # position relative to the first position after the stream
    labels: Int[Tensor, "batch tokens"] | None = None  # the next token at each place; -100: no loss
    single: bool = False  # one token of the only question of the only stream: it sees all that precedes it


def pack(rows: Sequence[Sequence[Asked]], *, fill: int, device: torch.device) -> Prompt:
    """The questions of each stream packed into one row, in order; shorter rows are padded with the id `fill`.

    A question is (ids, offsets, labels): token ids, positions relative to the first one after the stream, and labels
    at the tokens that predict them (-100: no loss).
    """
    packed = []
    for row in rows:
        columns = [
            (i, number, offset, label)
            for number, (ids, offsets, labels) in enumerate(row)
            for i, offset, label in zip(ids, offsets, labels, strict=True)
        ]
        packed.append(torch.tensor(columns, dtype=torch.long).reshape(-1, 4).T)
    width = max(row.shape[1] for row in packed)
    empty = torch.tensor([[fill], [PADDING], [0], [IGNORED]])
    padded = [torch.cat([row, empty.expand(4, width - row.shape[1])], dim=1) for row in packed]
    ids, segments, offsets, labels = torch.stack(padded, dim=1).to(device)
    return Prompt(ids=ids, segments=segments, offsets=offsets, labels=labels)


@final
class Joined:
    """Keys and values of one layer's memory and of the questions after it, in one storage with room for answers.

    A token of an answer is written behind them, so that decoding copies the memory once, not for every token; while an
    answer is decoded, keys and values of the memory exist twice. Written places never change.
    """

    def __init__(self, memory: Tokens, keys: Tensor, values: Tensor) -> None:
        self.memory, self.filled = memory.keys, memory.count
        places = memory.count + keys.shape[2] + ANSWER
        self.keys, self.values = (
            part.new_empty(*part.shape[:2], places, part.shape[3]) for part in (memory.keys, memory.values)
        )
        self.write(memory.keys, memory.values, 0)
        self.write(keys, values, memory.count)

    def write(self, keys: Tensor, values: Tensor, first: int) -> None:
        """Write tokens from place `first` on."""
        self.filled = first + keys.shape[2]
        self.keys[:, :, first : self.filled], self.values[:, :, first : self.filled] = keys, values

    def follows(self, memory: Tokens, read: int, more: int) -> bool:
        """Whether `more` tokens can be written after `read` tokens of questions that read this memory."""
        here = self.memory is memory.keys and self.filled == memory.count + read
        return here and self.keys.shape[2] >= self.filled + more


@final
class PromptAttention:
    """A layer step: packed questions attend to the memory and to their own segment; the memory does not change.

    Where the memory carries layer inputs, its keys and values are recomputed from them: the values stay the same, and
    the weights that produce them learn.
    """

    def __init__(
        self,
        attached: StreamedAttention,
        config: ReadConfig,
        segments: Tensor,
        before: "PromptState | None",
        single: bool = False,
        *,
        padded: bool = False,
    ) -> None:
        self.attached, self.config, self.segments, self.before = attached, config, segments, before
        self.single, self.gated = single, config.gated(padded=padded)
        self.joined: dict[int, Joined] = {}
        self._read: dict[int, tuple[Tensor, Tensor]] | None = {}
        self._segments: dict[int, Segments] = {}  # by number of tokens of the memory

    def __call__(
        self, layer: int, states: Tensor, queries: Tensor, keys: Tensor, values: Tensor, scale: float, *memory: Tensor
    ) -> Tensor:
        # 1. the memory, with gradient to the weights where it carries layer inputs
        kept = Tokens.of(memory)
        if kept.states.shape[-1]:
            kept = kv_from_states(kept, self.attached, layer)
        elif self.before is not None and self.stores:
            return self._decoded(layer, kept, self.before, queries, keys, values, scale)
        # 2. keys and values of the questions, after those of the tokens that were read before
        key_segments = query_segments = self.segments
        if self.before is not None:
            keys = torch.cat([self.before.keys[layer], keys], dim=2)
            values = torch.cat([self.before.values[layer], values], dim=2)
            key_segments = torch.cat([self.before.segments, key_segments], dim=1)
        if self._read is not None:
            self._read[layer] = keys, values
        # 3. attend to [memory ; questions]; where heads keep tokens of their own, each head is a row
        heads = keys.shape[1]
        if self.config.per_head:
            kept, queries, keys, values = (
                rows_of(kept, heads),
                query_rows(queries, heads),
                head_rows(keys),
                head_rows(values),
            )
            key_segments, query_segments = (
                part.repeat_interleave(heads, dim=0) for part in (key_segments, query_segments)
            )
        output = attend(
            queries,
            torch.cat([kept.keys, keys], dim=2),
            torch.cat([kept.values, values], dim=2),
            scale=scale,
            gate=F.pad(kept.gate, (0, keys.shape[2])) if self.gated else None,
            segments=Segments(
                queries=query_segments, keys=torch.cat([torch.full_like(kept.order, MEMORY), key_segments], dim=1)
            ),
        )
        return merge_query_rows(output, heads) if self.config.per_head else output

    @property
    def stores(self) -> bool:
        """Whether a continuation stores the memory with it: without gradient, where the memory has a bound."""
        config = self.config
        return not (torch.is_grad_enabled() or config.per_head or config.policy.budget is None)

    def _decoded(
        self,
        layer: int,
        kept: Tokens,
        before: "PromptState",
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
    ) -> Tensor:
        """The same for a continuation, with memory and questions in one storage that the next tokens are written to."""
        joined, read = before.joined.get(layer), before.keys[layer].shape[2]
        if joined is not None and joined.follows(kept, read, keys.shape[2]):
            joined.write(keys, values, joined.filled)
        else:
            read_keys, read_values = before.keys[layer], before.values[layer]
            joined = Joined(kept, torch.cat([read_keys, keys], dim=2), torch.cat([read_values, values], dim=2))
        own = slice(kept.count, joined.filled)
        if self._read is not None:
            self._read[layer], self.joined[layer] = (joined.keys[:, :, own], joined.values[:, :, own]), joined
        count = joined.filled - kept.count
        return attend(
            queries,
            joined.keys[:, :, : joined.filled],
            joined.values[:, :, : joined.filled],
            scale=scale,
            gate=F.pad(kept.gate, (0, count)) if self.gated else None,
            segments=None if self.single else self._visible(kept),
        )

    def _visible(self, kept: Tokens) -> Segments:
        """Which question each query and key belongs to; the same in all layers whose memory has the same size."""
        if kept.count not in self._segments:
            past = () if self.before is None else (self.before.segments,)
            keys = torch.cat([torch.full_like(kept.order, MEMORY), *past, self.segments], dim=1)
            self._segments[kept.count] = Segments(queries=self.segments, keys=keys)
        return self._segments[kept.count]

    def take_results(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values of the questions in every layer; the step drops them and notes no more."""
        read, self._read = self._read, None
        return read or {}


@final
@dataclass(frozen=True, kw_only=True)
class PromptState:
    """Questions read so far: final hidden states of the latest tokens, and keys and values of all of them."""

    hidden: Float[Tensor, "batch tokens width"]
    segments: Int[Tensor, "batch read"]
    offsets: Int[Tensor, "batch read"]
    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    joined: dict[int, Joined] = field(default_factory=dict)  # where they are stored behind the memory, without gradient


def last_of_each(prompt: Prompt) -> tuple[Int[Tensor, "batch asked"], Int[Tensor, "batch asked"]]:
    """Index and offset of the last token of every question; offset -1 where a row has no such question."""
    count = int(prompt.segments.max()) + 1
    place = torch.arange(prompt.ids.shape[1], device=prompt.ids.device)
    own = prompt.segments[:, None, :] == torch.arange(count, device=place.device)[None, :, None]
    last = torch.where(own, place, -1).amax(dim=-1)
    offset = prompt.offsets.gather(1, last.clamp_min(0))
    return last.clamp_min(0), torch.where(last < 0, -1, offset)
