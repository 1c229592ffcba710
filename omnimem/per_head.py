"""Tokens that key-value heads keep by themselves: each head of each stream is a row, stored without padding.

Where heads keep tokens of their own, a layer is worked on as rows: [streams x kv_heads] streams of one key-value head
with the query heads that share it. So every score, selection and attention that serves streams serves heads, and a
head sees its own tokens only. Between chunks the rows of a stream lie one after the other in a single list of
(key, value) pairs, `owner` saying whose each is: heads may hold unequal numbers and nothing is stored but what is
held, at one byte a pair. Positions, arrival numbers and the other side state exist once a pair, so they cost kv_heads
times what they cost where heads keep the same tokens; bytes count that.

Rows of unequal length are filled up while they are worked on, with places whose modality is ABSENT and whose gate
hides them. In a batch, a stream that keeps less than another is filled up between chunks too, and is not charged.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from omnimem.tokens import ABSENT, HIDDEN, TOKEN_AXES, Tokens


def rows_of(tokens: Tokens, kv_heads: int) -> Tokens:
    """Each head of each stream as a row: of tokens that all heads hold, or of a list by owner."""
    return _by_owner(tokens, kv_heads) if tokens.owner.shape[1] else _alike(tokens, kv_heads)


def packed(rows: Tokens, kv_heads: int) -> Tokens:
    """The rows of each stream as one list, row after row, without the places that hold nothing."""
    batch, count = rows.modality.shape[0] // kv_heads, rows.count
    parts = [
        part.unflatten(0, (batch, kv_heads)).movedim(1, axis).flatten(axis, axis + 1)
        for part, axis in zip(rows.tensors(), TOKEN_AXES, strict=True)
    ]
    owner = torch.arange(kv_heads, dtype=torch.int8, device=rows.keys.device).repeat_interleave(count)
    listed = replace(Tokens.of(parts), owner=owner.expand(batch, 1, -1).contiguous())
    held = listed.modality != ABSENT
    most = int(held.sum(dim=1).max())
    if most == kv_heads * count:
        return listed
    return listed.gather((~held).to(torch.int8).argsort(dim=1, stable=True)[:, :most])


def query_rows(
    queries: Float[Tensor, "batch heads queries dim"], kv_heads: int
) -> Float[Tensor, "rows group queries dim"]:
    """The query heads that share a key-value head, as the heads of its row."""
    return queries.unflatten(1, (kv_heads, -1)).flatten(0, 1)


def of_rows(output: Float[Tensor, "rows group queries dim"], kv_heads: int) -> Float[Tensor, "batch heads queries dim"]:
    """The inverse of `query_rows`."""
    return output.unflatten(0, (-1, kv_heads)).flatten(1, 2)


def _alike(tokens: Tokens, kv_heads: int) -> Tokens:
    """Every row with all tokens."""
    keys, values = (part.flatten(0, 1)[:, None] for part in (tokens.keys, tokens.values))
    parts = [part.repeat_interleave(kv_heads, dim=0) for part in tokens.tensors()[2:]]
    return Tokens.of([keys, values, *parts])


def _by_owner(tokens: Tokens, kv_heads: int) -> Tokens:
    """Every row with what its head owns, filled up to the longest."""
    held = tokens.modality != ABSENT
    heads = torch.arange(kv_heads, device=held.device)
    counts = ((tokens.owner[:, 0, :, None] == heads) & held[..., None]).sum(dim=1)
    most = int(counts.max())
    if int(counts.min()) < most:
        tokens = _filled_up(tokens, counts, most)
    parts = [
        part.unflatten(axis, (kv_heads, most)).movedim(axis, 1).flatten(0, 1)
        for part, axis in zip(tokens.tensors(), TOKEN_AXES, strict=True)
    ]
    return Tokens.of([*parts[:-1], parts[-1][:, :0]])


def _filled_up(tokens: Tokens, counts: Int[Tensor, "batch kv_heads"], most: int) -> Tokens:
    """The list with `most` places for each head; those beyond what it owns hold nothing."""
    places = torch.arange(most, device=counts.device)
    there = (places < counts[..., None]).flatten(1)
    starts = counts.cumsum(dim=1) - counts
    index = (starts[..., None] + places).flatten(1).clamp_max(max(0, tokens.count - 1))
    found = tokens.gather(index)
    return replace(
        found,
        modality=torch.where(there, found.modality, torch.full_like(found.modality, ABSENT)),
        gate=torch.where(there, found.gate, torch.full_like(found.gate, HIDDEN)),
    )
