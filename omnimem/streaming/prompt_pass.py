"""The prompt pass: packed questions read the memory, which does not change."""

from collections.abc import Sequence
from dataclasses import dataclass
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
class PromptAttention:
    """A layer step: packed questions attend to the memory and to their own segment; the memory does not change.

    Where the memory carries layer inputs, its keys and values are recomputed from them: the values stay the same, and
    the weights that produce them learn.
    """

    def __init__(
        self, attached: StreamedAttention, config: ReadConfig, segments: Tensor, *, padded: bool = False
    ) -> None:
        self.attached, self.config, self.segments = attached, config, segments
        self.gated = config.gated(padded=padded)
        self._read: dict[int, tuple[Tensor, Tensor]] | None = {}

    def __call__(
        self, layer: int, states: Tensor, queries: Tensor, keys: Tensor, values: Tensor, scale: float, *memory: Tensor
    ) -> Tensor:
        # 1. the memory, with gradient to the weights where it carries layer inputs
        kept = Tokens.of(memory)
        if kept.states.shape[-1]:
            kept = kv_from_states(kept, self.attached, layer)
        # 2. note keys and values of the questions, which decoding reads
        if self._read is not None:
            self._read[layer] = keys, values
        key_segments = query_segments = self.segments
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

    def take_results(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values of the questions in every layer; the step drops them and notes no more."""
        read, self._read = self._read, None
        return read or {}


@final
@dataclass(frozen=True, kw_only=True)
class PromptState:
    """Questions that were read: final hidden states, keys and values of all their tokens."""

    hidden: Float[Tensor, "batch tokens width"]
    segments: Int[Tensor, "batch tokens"]
    keys: dict[int, Tensor]
    values: dict[int, Tensor]


def last_of_each(prompt: Prompt) -> tuple[Int[Tensor, "batch asked"], Int[Tensor, "batch asked"]]:
    """Index and offset of the last token of every question; offset -1 where a row has no such question."""
    count = int(prompt.segments.max()) + 1
    place = torch.arange(prompt.ids.shape[1], device=prompt.ids.device)
    own = prompt.segments[:, None, :] == torch.arange(count, device=place.device)[None, :, None]
    last = torch.where(own, place, -1).amax(dim=-1)
    offset = prompt.offsets.gather(1, last.clamp_min(0))
    return last.clamp_min(0), torch.where(last < 0, -1, offset)
