"""Tokens that key-value heads keep separately: each head of each stream is a row, stored without padding.

Where heads keep tokens of their own, a layer is processed as rows: [streams x kv_heads] streams of one key-value head
with the query heads that share it. So every score, selection and attention that works on streams works on heads, and
a head sees its own tokens only. Between chunks the rows of a stream are concatenated to a single list of (key, value)
pairs, and `owner` gives the head of each: heads may hold unequal numbers without padding, at one byte per pair.
Positions, arrival numbers and the other side state exist once per pair, so they take kv_heads times the memory that
they take where heads keep the same tokens; `Tokens.bytes` counts that.

Rows of unequal length are padded while they are processed: modality ABSENT, and a gate that hides them. In a batch,
the list of a stream that keeps less than another is padded between chunks too; the padding is not counted.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from omnimem.tokens import ABSENT, TOKEN_AXES, Tokens


def rows_of(tokens: Tokens, kv_heads: int) -> Tokens:
    """Each head of each stream as a row, from tokens that all heads hold or from a list by owner."""
    return _by_owner(tokens, kv_heads) if tokens.owner.shape[1] else _shared(tokens, kv_heads)


def packed(rows: Tokens, kv_heads: int) -> Tokens:
    """The rows of each stream concatenated to one list; padding, if a stream keeps less than another, is at the end."""
    batch, count = rows.modality.shape[0] // kv_heads, rows.count

    def joined(part: Tensor, axis: int) -> Tensor:
        return part.unflatten(0, (batch, kv_heads)).movedim(1, axis).flatten(axis, axis + 1)

    owner = torch.arange(kv_heads, dtype=torch.int8, device=rows.keys.device).repeat_interleave(count)
    listed = replace(rows.map(joined), owner=owner.expand(batch, 1, -1).contiguous())
    present = listed.modality != ABSENT
    least, most = map(int, present.sum(dim=1).aminmax())
    if least == kv_heads * count:
        return listed
    return listed.gather((~present).to(torch.int8).argsort(dim=1, stable=True)[:, :most])


def head_rows(part: Float[Tensor, "batch kv_heads tokens dim"]) -> Float[Tensor, "rows 1 tokens dim"]:
    """Keys or values of each key-value head as a row."""
    return part.flatten(0, 1)[:, None]


def query_rows(
    queries: Float[Tensor, "batch heads queries dim"], kv_heads: int
) -> Float[Tensor, "rows group queries dim"]:
    """The query heads that share a key-value head, as the heads of its row."""
    return queries.unflatten(1, (kv_heads, -1)).flatten(0, 1)


def merge_query_rows(
    output: Float[Tensor, "rows group queries dim"], kv_heads: int
) -> Float[Tensor, "batch heads queries dim"]:
    """The inverse of `query_rows`."""
    return output.unflatten(0, (-1, kv_heads)).flatten(1, 2)


def _shared(tokens: Tokens, kv_heads: int) -> Tokens:
    """Every row with all tokens: keys and values of its own head, a copy of the other fields."""
    copied = TOKEN_AXES.keys() - {"keys", "values"}
    return Tokens(
        keys=head_rows(tokens.keys),
        values=head_rows(tokens.values),
        **{name: getattr(tokens, name).repeat_interleave(kv_heads, dim=0) for name in copied},
    )


def _by_owner(tokens: Tokens, kv_heads: int) -> Tokens:
    """Every row with the tokens that its head owns, padded to the longest."""
    present = tokens.modality != ABSENT
    heads = torch.arange(kv_heads, device=present.device)
    counts = ((tokens.owner[:, 0, :, None] == heads) & present[..., None]).sum(dim=1)
    most = int(counts.max())
    if int(counts.min()) < most:
        tokens = _padded(tokens, counts, most)
    rows = tokens.map(lambda part, axis: part.unflatten(axis, (kv_heads, most)).movedim(axis, 1).flatten(0, 1))
    return replace(rows, owner=rows.owner[:, :0])


def _padded(tokens: Tokens, counts: Int[Tensor, "batch kv_heads"], most: int) -> Tokens:
    """The list with `most` places for each head, padding after the tokens that it owns."""
    places = torch.arange(most, device=counts.device)
    present = (places < counts[..., None]).flatten(1)
    starts = counts.cumsum(dim=1) - counts
    index = (starts[..., None] + places).flatten(1).clamp_max(max(0, tokens.count - 1))
    return tokens.gather(index).masked(present)
