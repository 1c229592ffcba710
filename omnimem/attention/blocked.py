"""Attention in blocks of queries, on any device: no matrix of all queries times all keys is ever stored for autograd.

Queries stand at the end of the keys: query i of Q sees key j of K when j <= K - Q + i (bottom-right causal), and, in a
packed pass over several questions, when both belong to the same segment or the key belongs to the memory.
"""

from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

MEMORY = -2  # segment of keys that every query may see
BLOCK = 1024  # queries at a time: bounds the mask to BLOCK x keys

HeadMean = Literal["probabilities", "logits"]


@final
@dataclass(frozen=True, kw_only=True)
class Segments:
    """Which question each packed token belongs to; `MEMORY` marks keys open to all."""

    queries: Int[Tensor, "batch queries"]
    keys: Int[Tensor, "batch keys"]


def visible(
    first: int, last: int, queries: int, keys: int, segments: Segments | None, device: torch.device
) -> Bool[Tensor, "#batch block keys"]:
    """The keys that queries `first` to `last` of `queries` may see."""
    limit = torch.arange(first, last, device=device) + (keys - queries)
    mask = (torch.arange(keys, device=device)[None, :] <= limit[:, None])[None]
    if segments is None:
        return mask
    of_key = segments.keys[:, None, :]
    return mask & ((of_key == MEMORY) | (of_key == segments.queries[:, first:last, None]))


def attend(
    queries: Float[Tensor, "batch heads queries dim"],
    keys: Float[Tensor, "batch kv_heads keys dim"],
    values: Float[Tensor, "batch kv_heads keys dim"],
    *,
    scale: float,
    gate: Float[Tensor, "batch keys"] | None = None,
    segments: Segments | None = None,
) -> Float[Tensor, "batch heads queries dim"]:
    """softmax(scale q k + gate) v over the visible keys; differentiable in everything, the gate included.

    The gate rides in one more dimension of the head (query 1, key gate / scale), so its gradient, the column sum of
    the softmax's dS, comes from the very attention kernel instead of a bias of queries x keys for all heads.
    """
    dim, count, total = queries.shape[-1], queries.shape[2], keys.shape[2]
    if gate is not None:
        queries, keys, values = _with_gate(queries, keys, values, gate, scale)
    alone = count == 1 and segments is None
    if not alone and queries.device.type != "cpu":
        # With a mask, the kernels of GPUs that share keys among heads fall back to queries x keys in full.
        group = queries.shape[1] // keys.shape[1]
        keys, values = (tensor.repeat_interleave(group, dim=1) for tensor in (keys, values))
    blocks = []
    for first in range(0, count, BLOCK):
        last = min(first + BLOCK, count)
        mask = None if alone else visible(first, last, count, total, segments, queries.device)[:, None]
        blocks.append(
            F.scaled_dot_product_attention(
                queries[:, :, first:last], keys, values, attn_mask=mask, scale=scale, enable_gqa=True
            )
        )
    output = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)
    return output[..., :dim]


def _with_gate(
    queries: Tensor, keys: Tensor, values: Tensor, gate: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Heads widened by the gate's dimension and padded to the multiple of 8 that fast kernels want."""
    padding = -(queries.shape[-1] + 1) % 8
    one = queries.new_ones(()).expand(*queries.shape[:-1], 1)
    column = (gate / scale).to(keys.dtype)[:, None, :, None].expand(*keys.shape[:-1], 1)
    wide_queries = F.pad(torch.cat([queries, one], dim=-1), (0, padding))
    wide_keys = F.pad(torch.cat([keys, column], dim=-1), (0, padding))
    return wide_queries, wide_keys, F.pad(values, (0, padding + 1))


def mass(
    queries: Float[Tensor, "batch heads queries dim"],
    keys: Float[Tensor, "batch kv_heads keys dim"],
    *,
    scale: float,
    gate: Float[Tensor, "batch keys"] | None = None,
    heads: HeadMean = "probabilities",
) -> Float[Tensor, "batch keys"]:
    """Attention mass per key, float32: a_k = sum over queries of the mean over heads of A_qk (paper eq. 8).

    `logits` averages the scaled logits over the heads before one softmax per query, as the release does.
    """
    count, total = queries.shape[2], keys.shape[2]
    received = torch.zeros(keys.shape[0], total, dtype=torch.float32, device=keys.device)
    step = max(1, BLOCK // queries.shape[1])
    wide_keys = keys.float().repeat_interleave(queries.shape[1] // keys.shape[1], dim=1).transpose(-1, -2)
    for first in range(0, count, step):
        last = min(first + step, count)
        logits = (queries[:, :, first:last].float() * scale) @ wide_keys
        if gate is not None:
            logits = logits + gate.float()[:, None, None, :]
        if heads == "logits":
            logits = logits.mean(dim=1, keepdim=True)
        hidden = ~visible(first, last, count, total, None, keys.device)[:, None]
        received = received + logits.masked_fill(hidden, float("-inf")).softmax(dim=-1).mean(dim=1).sum(dim=1)
    return received
