"""Decoding: one token of every question per pass, in storage that is allocated before the first one."""

from dataclasses import dataclass
from typing import Any, cast, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from omnimem.memory import Memory
from omnimem.per_head import head_rows, merge_query_rows, query_rows, rows_of
from omnimem.streaming.attach import StreamedAttention
from omnimem.streaming.chunk_pass import ReadConfig
from omnimem.streaming.prompt_pass import PromptState
from omnimem.tokens import Room, Tokens

ALIGNED = 8  # places of a storage are a multiple of this, as GPU kernels with a bias require
CALLS = 32  # tokens of each answer for which room is made at a time: free places are hidden, and cost time too


@final
@dataclass(kw_only=True)
class Places:
    """Where a layer writes the next tokens, and what every query sees of its storage; calls change both in place."""

    index: Int[Tensor, " asked"]
    bias: Float[Tensor, "rows 1 queries places"]  # 0, a gate, or minus infinity; the heads of a group are queries


@final
class Decoding:
    """A layer step: one token of each question attends to the memory, its question and its answer so far.

    Memory, questions and room for the answers lie in one storage per layer, and the places to write to are tensors. So
    every call has the same shapes and asks the device nothing: `torch.compile` and CUDA graphs can replay one. The
    query heads that share a key-value head are further queries of it, so that its keys are read once. Outside the
    autograd graph only. The memory does not change; its keys and values exist twice, but for full memory whose storage
    has room, which lends it until `close`.
    """

    def __init__(
        self,
        attached: StreamedAttention,
        config: ReadConfig,
        memory: Memory,
        state: PromptState,
        positions: Int[Tensor, "batch axes asked"],
        *,
        calls: int,
        padded: bool,
    ) -> None:
        """With room for `calls`; `positions` are those of the first tokens after the questions of `state`."""
        self.attached, self.per_head, self.positions = attached, config.per_head, positions.clone()
        self.gated = config.gated(padded=padded)
        heads, more = attached.shape.kv_heads, calls * positions.shape[2]
        self.lent: dict[int, tuple[Room, int]] = {}  # by layer, and how many places of it are filled
        self.group = cast(Any, attached.text_model).config.num_attention_heads // heads
        self.stored: list[tuple[Tensor, Tensor]] = []
        self.places: list[Places] = []
        self.distinct: dict[int, Places] = {}  # by number of tokens of the memory, or by layer
        for layer, kept in enumerate(memory.layers):
            keys, values, segments = state.keys[layer], state.values[layer], state.segments
            if self.per_head:
                kept, keys, values = rows_of(kept, heads), head_rows(keys), head_rows(values)
                segments = segments.repeat_interleave(heads, dim=0)
            self.stored.append(self._stored(layer, kept, keys, values, more))
            key = layer if self.gated else kept.count
            if key not in self.distinct:
                self.distinct[key] = self._before(kept, segments, self.stored[-1][0].shape[2])
            self.places.append(self.distinct[key])
        # of the tokens of one call, each sees itself alone
        own = torch.eye(positions.shape[2], dtype=torch.bool, device=positions.device)
        self.own = _bias(own, self.places[0].bias.dtype).repeat(self.group, 1)

    def _stored(self, layer: int, kept: Tokens, keys: Tensor, values: Tensor, more: int) -> tuple[Tensor, Tensor]:
        """Keys and values of memory and questions with at least `more` free places behind them, which hold zeros."""
        read, room = keys.shape[2], kept.room
        extra = read + more + -(kept.count + read + more) % ALIGNED
        if room is not None and room.follows(kept, extra):
            self.lent[layer] = room, kept.count
            stored = room.lend(extra)
        else:
            stored = _padded(kept.keys, extra), _padded(kept.values, extra)
        for storage, new in zip(stored, (keys, values), strict=True):
            storage[:, :, kept.count : kept.count + read] = new
            storage[:, :, kept.count + read :] = 0
        return stored

    def extend(self, calls: int) -> None:
        """Make room for further calls: the same with more places, another layout."""
        extra = -(-calls * self.positions.shape[2] // ALIGNED) * ALIGNED
        for layer, (keys, values) in enumerate(self.stored):
            room, _ = self.lent.get(layer, (None, 0))
            if room is not None and room.filled == keys.shape[2] and room.buffers[0].shape[2] >= room.filled + extra:
                self.stored[layer] = room.lend(extra)
                for storage in self.stored[layer]:
                    storage[:, :, -extra:] = 0
            else:
                self.stored[layer] = _padded(keys, extra), _padded(values, extra)
        for places in self.distinct.values():
            places.bias = F.pad(places.bias, (0, extra), value=float("-inf"))

    def close(self) -> None:
        """Give back the room of full memory."""
        for room, filled in self.lent.values():
            room.filled = filled
        self.lent = {}

    def _before(self, kept: Tokens, segments: Int[Tensor, "rows read"], places: int) -> Places:
        """What is seen before the first token: the memory, and of the questions its own."""
        (rows, read), asked = segments.shape, torch.arange(self.positions.shape[2], device=segments.device)
        parts = [
            kept.gate[:, None].to(kept.keys.dtype) if self.gated else kept.keys.new_zeros(rows, 1, kept.count),
            _bias(segments[:, None] == asked[:, None], kept.keys.dtype),
            kept.keys.new_full((rows, 1, places - kept.count - read), float("-inf")),
        ]
        bias = torch.cat([part.expand(-1, len(asked), -1) for part in parts], dim=2)
        return Places(index=kept.count + read + asked, bias=bias.repeat(1, self.group, 1)[:, None])

    @torch.no_grad()
    def __call__(self, ids: Int[Tensor, "batch asked"]) -> Float[Tensor, "batch asked width"]:
        """Final hidden states of the next token of every question."""
        for places in self.distinct.values():
            places.bias.index_copy_(3, places.index, self.own.expand(len(places.bias), 1, -1, -1))
        hidden = self.attached.run(self.step, self.attached.embed(ids), self.positions)
        for places in self.distinct.values():
            places.index.add_(ids.shape[1])
        self.positions.add_(1)
        return hidden

    def step(
        self, layer: int, states: Tensor, queries: Tensor, keys: Tensor, values: Tensor, scale: float, *memory: Tensor
    ) -> Float[Tensor, "batch heads queries dim"]:
        """The layer step of a pass."""
        heads, places, stored = keys.shape[1], self.places[layer], self.stored[layer]
        if self.per_head:
            queries, keys, values = query_rows(queries, heads), head_rows(keys), head_rows(values)
        for storage, new in zip(stored, (keys, values), strict=True):
            storage.index_copy_(2, places.index, new.to(storage.dtype))
        grouped = queries.unflatten(1, (-1, self.group)).flatten(2, 3)
        output = F.scaled_dot_product_attention(grouped, *stored, attn_mask=places.bias, scale=scale)
        output = output.view_as(queries)
        return merge_query_rows(output, heads) if self.per_head else output


def _padded(part: Tensor, extra: int) -> Tensor:
    """A copy with so many places of zeros behind it."""
    return F.pad(part, (0, 0, 0, extra))


def _bias(seen: Bool[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """0 where a key is seen, minus infinity elsewhere."""
    return torch.where(seen, 0.0, float("-inf")).to(dtype)
