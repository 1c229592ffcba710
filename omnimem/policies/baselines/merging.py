"""Merged tokens: averages of several, whose keys are rotated to one position first."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from omnimem.positions import rotate
from omnimem.tokens import Modality, Tokens
from omnimem.view import LayerView


@final
@dataclass(frozen=True, kw_only=True)
class Merge:
    """Weights, positions and order of merged tokens."""

    weights: Float[Tensor, "batch merged tokens"]  # of each source, summing to 1
    positions: Int[Tensor, "batch axes merged"]
    order: Int[Tensor, "batch merged"]  # arrival numbers that they inherit


def merged(view: LayerView, merge: Merge, kind: Modality) -> Tokens:
    """The new tokens: V = sum of w V, K = sum of w K, with K rotated from its own position to the new one.

    A new token has the place and group of the token whose arrival number it inherits.
    Averaging keys after RoPE at their own positions would mix phases. Differentiable in keys and values, not in the
    weights. Raises ValueError when the view has no rotary embedding.
    """
    if view.rotary is None:
        raise ValueError("merging rotates keys with the text model's rotary embedding; feed the policy by a Stream")
    pool, weights = view.pool, merge.weights.detach()
    keys = []
    for number in range(weights.shape[1]):
        way = merge.positions[:, :, number, None] - pool.positions
        turned = rotate(pool.keys.float(), *view.rotary(way.transpose(0, 1)))
        keys.append((turned * weights[:, number, None, :, None]).sum(dim=2))
    values = torch.einsum("bmt,bhtd->bhmd", weights, pool.values.float())
    return _new(pool, torch.stack(keys, dim=2), values, merge, kind)


def _new(pool: Tokens, keys: Tensor, values: Tensor, merge: Merge, kind: Modality) -> Tokens:
    """Tokens of these keys and values, without other side state."""
    count = merge.order.shape[1]
    zeros = torch.zeros(merge.order.shape, dtype=torch.float32, device=pool.keys.device)
    weights, source = merge.weights.detach(), _of_numbers(pool, merge.order)
    return Tokens(
        keys=keys.to(pool.keys.dtype),
        values=values.to(pool.values.dtype),
        positions=merge.positions.to(pool.positions.dtype),
        place=pool.place.gather(2, source[:, None].expand(-1, pool.place.shape[1], -1)),
        group=pool.group.gather(1, source),
        modality=torch.full_like(merge.order, int(kind), dtype=torch.int8),
        order=merge.order.to(pool.order.dtype),
        importance=zeros,
        novelty=zeros,
        feature=(weights @ pool.feature.float()).to(pool.feature.dtype),
        gate=zeros,
        states=pool.states[:, :1].expand(-1, count, -1)[:, :, :0],
        owner=pool.owner[:, :, :1].expand(-1, -1, count)[:, :0],
    )


def _of_numbers(pool: Tokens, order: Int[Tensor, "batch merged"]) -> Int[Tensor, "batch merged"]:
    """Index in the pool of the tokens with these arrival numbers."""
    return (pool.order[:, None] == order[..., None]).to(torch.int8).argmax(dim=2)


def with_merged(kept: Tokens, new: Tokens) -> Tokens:
    """Both, in order of arrival; a merged token follows the token of the same number."""
    both = kept.cat(new)
    return both.gather(both.order.argsort(dim=1, stable=True))
