"""The prompt pass: packed questions read the memory on a fork; the memory stays as it is."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from omnimem.attention.blocked import MEMORY, Segments, attend
from omnimem.per_head import of_rows, query_rows, rows_of
from omnimem.streaming.attach import StreamedAttention
from omnimem.streaming.chunk_pass import ReadConfig, head_rows, kv_from_states
from omnimem.tokens import Tokens

PADDING = -1  # segment of padding in a packed pass


@final
@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Packed questions of each stream, to be read at the end of what was fed."""

    ids: Int[Tensor, "batch tokens"]
    segments: Int[Tensor, "batch tokens"]  # number of the question; PADDING where a row is shorter
    offsets: Int[Tensor, "batch tokens"]  # position relative to the first one after the stream
    labels: Int[Tensor, "batch tokens"] | None = None  # the token each row should predict next; -100: none


@final
class PromptAttention:
    """A layer step: packed questions attend to the memory and to their own segment; the memory stays as it is.

    Where the memory carries layer inputs, its keys and values are made of them anew: their values are as they were,
    and the weights that make them learn.
    """

    def __init__(
        self, attached: StreamedAttention, manner: ReadConfig, segments: Tensor, before: "PromptState | None"
    ) -> None:
        self.attached, self.manner, self.segments, self.before = attached, manner, segments, before
        self._read: dict[int, tuple[Tensor, Tensor]] | None = {}

    def __call__(
        self, layer: int, states: Tensor, queries: Tensor, keys: Tensor, values: Tensor, scale: float, *memory: Tensor
    ) -> Tensor:
        kept = Tokens.of(memory)
        if kept.states.shape[-1]:
            kept = kv_from_states(kept, self.attached, layer)
        asked = self.segments
        if self.before is not None:
            keys = torch.cat([self.before.keys[layer], keys], dim=2)
            values = torch.cat([self.before.values[layer], values], dim=2)
            asked = torch.cat([self.before.segments, asked], dim=1)
        if self._read is not None:
            self._read[layer] = keys, values
        asking, heads = self.segments, keys.shape[1]
        if self.manner.policy.per_head:
            kept, queries, (keys, values) = (
                rows_of(kept, heads),
                query_rows(queries, heads),
                map(head_rows, (keys, values)),
            )
            asking, asked = (part.repeat_interleave(heads, dim=0) for part in (asking, asked))
        open_to_all = torch.full_like(kept.order, MEMORY)
        output = attend(
            queries,
            torch.cat([kept.keys, keys], dim=2),
            torch.cat([kept.values, values], dim=2),
            scale=scale,
            gate=F.pad(kept.gate, (0, keys.shape[2])) if self.manner.gated else None,
            segments=Segments(queries=asking, keys=torch.cat([open_to_all, asked], dim=1)),
        )
        return of_rows(output, heads) if self.manner.policy.per_head else output

    def take_results(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values of the questions in every layer; the step forgets them, and notes no more."""
        read, self._read = self._read, None
        return read or {}


@final
@dataclass(frozen=True, kw_only=True)
class PromptState:
    """Questions read so far: final hidden states of the last tokens read, and the keys and values to go on from."""

    hidden: Float[Tensor, "batch tokens width"]
    segments: Int[Tensor, "batch read"]
    offsets: Int[Tensor, "batch read"]
    keys: dict[int, Tensor]
    values: dict[int, Tensor]


def last_of_each(prompt: Prompt) -> tuple[Int[Tensor, "batch asked"], Int[Tensor, "batch asked"]]:
    """Index and offset of the last token of every question; offset -1 where a row has no such question."""
    count = int(prompt.segments.max()) + 1
    place = torch.arange(prompt.ids.shape[1], device=prompt.ids.device)
    mine = prompt.segments[:, None, :] == torch.arange(count, device=place.device)[None, :, None]
    last = torch.where(mine, place, -1).amax(dim=-1)
    offset = prompt.offsets.gather(1, last.clamp_min(0))
    return last.clamp_min(0), torch.where(last < 0, -1, offset)
