"""Attention in blocks of queries, on any device: autograd never stores a matrix of all queries times all keys.

The queries are the last Q of the K key positions: query i sees key j when j <= K - Q + i (bottom-right causal). In a
packed pass over several questions the key must also belong to the memory or to the query's own segment.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from omnimem.lazy import lazy_property

MEMORY = -2  # segment of keys that every query may see
BLOCK = 1024  # queries per block: bounds the mask to BLOCK x keys
ROWS = 128  # queries times heads of a block whose probabilities are formed on a CPU: they should fit into its cache
TRITON = find_spec("triton") is not None

HeadMean = Literal["probabilities", "logits"]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Segments:
    """The question that each packed token belongs to; `MEMORY` marks keys that all queries see."""

    queries: Int[Tensor, "batch queries"]
    keys: Int[Tensor, "batch keys"]
    masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # of blocks of queries, for all layers

    def visible(self, first: int, last: int) -> Bool[Tensor, "batch block keys"]:
        """Mask of the keys that queries `first` to `last` (exclusive) may see."""
        if (first, last) not in self.masks:
            queries, keys = self.queries.shape[1], self.keys.shape[1]
            causal = visible(first, last, queries, keys, None, self.keys.device)
            of_key = self.keys[:, None, :]
            self.masks[first, last] = causal & ((of_key == MEMORY) | (of_key == self.queries[:, first:last, None]))
        return self.masks[first, last]


def visible(
    first: int, last: int, queries: int, keys: int, segments: Segments | None, device: torch.device
) -> Bool[Tensor, "#batch block keys"]:
    """Mask of the keys that queries `first` to `last` (exclusive) may see."""
    if segments is not None:
        return segments.visible(first, last)
    limit = torch.arange(first, last, device=device) + (keys - queries)
    return (torch.arange(keys, device=device)[None, :] <= limit[:, None])[None]


def attend(
    queries: Float[Tensor, "batch heads queries dim"],
    keys: Float[Tensor, "batch kv_heads keys dim"],
    values: Float[Tensor, "batch kv_heads keys dim"],
    *,
    scale: float,
    gate: Float[Tensor, "batch keys"] | None = None,
    segments: Segments | None = None,
) -> Float[Tensor, "batch heads queries dim"]:
    """softmax(scale q k + gate) v over the visible keys; differentiable in all tensors, the gate included.

    The gate is one more dimension of the head (query 1, key gate / scale). Its gradient, the column sum of the
    softmax's dS, then comes from the attention kernel itself, without a bias of queries x keys for all heads.
    """
    # 1. add the gate as a head dimension
    dim, count, total = queries.shape[-1], queries.shape[2], keys.shape[2]
    if gate is not None:
        queries, keys, values = _with_gate(queries, keys, values, gate, scale)
    # 2. one flash call where the kernel supports the inputs
    single = count == 1 and segments is None
    if not single and segments is None and _flash_supports(queries, keys, values):
        bias: Any = causal_lower_right(count, total)  # takes half the time of an explicit mask (docs/log)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=scale, enable_gqa=True)[
            ..., :dim
        ]
    # 3. otherwise, masked blocks of queries; on a CPU small ones, each with the keys that it sees
    if not single and queries.device.type != "cpu":
        # With a mask, the GPU kernels for grouped queries fall back to the full queries x keys matrix.
        group = queries.shape[1] // keys.shape[1]
        keys, values = (tensor.repeat_interleave(group, dim=1) for tensor in (keys, values))
    blocks = []
    step = min(BLOCK, ROWS) if queries.device.type == "cpu" and segments is None else BLOCK
    for first in range(0, count, step):
        last = min(first + step, count)
        seen = total - count + last if segments is None else total
        mask = None if single else visible(first, last, count, total, segments, queries.device)[:, None, :, :seen]
        blocks.append(
            F.scaled_dot_product_attention(
                queries[:, :, first:last],
                keys[:, :, :seen],
                values[:, :, :seen],
                attn_mask=mask,
                scale=scale,
                enable_gqa=True,
            )
        )
    output = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)
    return output[..., :dim]


def _flash_supports(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the flash kernel can run; only it has both the lower-right causal mask and grouped queries."""
    if queries.device.type != "cuda" or queries.dtype not in (torch.float16, torch.bfloat16):
        return False
    return can_use_flash_attention(SDPAParams(queries, keys, values, None, 0.0, False, True))


def _with_gate(
    queries: Tensor, keys: Tensor, values: Tensor, gate: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values widened by the gate's dimension and padded to a multiple of 8 for fast kernels."""
    padding = -(queries.shape[-1] + 1) % 8
    one = queries.new_ones(()).expand(*queries.shape[:-1], 1)
    column = (gate / scale).to(keys.dtype)[:, None, :, None].expand(*keys.shape[:-1], 1)
    wide_queries = F.pad(torch.cat([queries, one], dim=-1), (0, padding))
    wide_keys = F.pad(torch.cat([keys, column], dim=-1), (0, padding))
    return wide_queries, wide_keys, F.pad(values, (0, padding + 1))


def attend_measured(
    queries: Float[Tensor, "batch heads queries dim"],
    keys: Float[Tensor, "batch kv_heads keys dim"],
    values: Float[Tensor, "batch kv_heads keys dim"],
    *,
    scale: float,
    gate: Float[Tensor, "batch keys"] | None = None,
) -> tuple[Float[Tensor, "batch heads queries dim"], Float[Tensor, "batch keys"]] | None:
    """`attend` and `mass` of the same inputs in one pass; None where two passes are better.

    One pass needs probabilities in memory: on a CPU, in float32 or more, without gradients. The mass equals that of
    `mass` to the bit, the output that of `attend` up to rounding.
    """
    if queries.device.type != "cpu" or queries.dtype not in (torch.float32, torch.float64) or torch.is_grad_enabled():
        return None
    parts = _Parts.of(queries, keys, gate, scale, "probabilities")
    output, room = torch.empty_like(queries), parts.room()
    with torch.autocast(queries.device.type, enabled=False):
        received = torch.zeros_like(keys[:, 0, :, 0])
        for first, last in parts.blocks:
            weights = parts.weights(first, last, room)
            received[:, : weights.shape[-1]] += _received(weights)
            mixed = _product(parts.rows(weights), values[:, :, : weights.shape[-1]])
            output[:, :, first:last] = mixed.view(*output.shape[:2], last - first, -1)
    return output, received


def _received(weights: Float[Tensor, "batch heads queries keys"]) -> Float[Tensor, "batch keys"]:
    """Sum over queries, mean over heads."""
    return weights.flatten(1, 2).sum(dim=1) / weights.shape[1]


def _product(left: Tensor, right: Tensor, room: Tensor | None = None) -> Tensor:
    """left @ right of [batch, heads, ...]; `@` would copy a slice whose batch and heads it cannot join to one axis.

    With `room`, a flat tensor of at least its size, the result is written there.
    """
    shape = (*left.shape[:-1], right.shape[-1])
    one = left.shape[0] == 1
    left, right = (left[0], right[0]) if one else (left.flatten(0, 1), right.flatten(0, 1))
    if room is None:
        return torch.bmm(left, right).view(shape)
    rows = room[: math.prod(shape)].view(-1, *shape[2:])
    return torch.bmm(left, right, out=rows).view(shape)


def mass(
    queries: Float[Tensor, "batch heads queries dim"],
    keys: Float[Tensor, "batch kv_heads keys dim"],
    *,
    scale: float,
    gate: Float[Tensor, "batch keys"] | None = None,
    heads: HeadMean = "probabilities",
) -> Float[Tensor, "batch keys"]:
    """Attention mass per key, a_k = sum over queries of the mean over heads of A_qk (paper eq. 8).

    The result is float32, or float64 for float64 inputs. `heads="logits"` averages the scaled logits over the heads
    before one softmax per query, as the release does. Differentiable in queries, keys and gate: backward recomputes
    each block's softmax, so the graph stores nothing of size queries x keys. Autocast is disabled inside, so that
    training and evaluation select the same tokens.
    """
    return _Mass.apply(queries, keys, gate, scale, heads)


@cache
def fused_mass() -> Callable[..., Tensor] | None:
    """`omnimem.attention.fused.mass`, imported only when it is used; None without Triton (which comes with CUDA)."""
    return import_module("omnimem.attention.fused").mass if TRITON else None


@torch.library.custom_op("omnimem::mass", mutates_args=())
def captured_mass(queries: Tensor, keys: Tensor, scale: float, gate: Tensor | None) -> Tensor:
    """`fused_mass` as one operator of a captured graph: torch.compile does not look into it. Requires Triton."""
    kernels = fused_mass()
    assert kernels is not None, "chosen where there is Triton"
    return kernels(queries, keys, scale=scale, gate=gate)


@captured_mass.register_fake
def _(queries: Tensor, keys: Tensor, scale: float, gate: Tensor | None) -> Tensor:
    return keys.new_empty(keys.shape[0], keys.shape[2], dtype=torch.float32)


@final
class _Mass(torch.autograd.Function):
    """With A = softmax(L) and c the gradient of the mass: dL_qk = A_qk (c_k - sum_j A_qj c_j) / heads.

    Then dq = scale dL k, dk = scale dL^T q, and the gradient of the gate is the column sum of dL.
    """

    @staticmethod
    def forward(queries: Tensor, keys: Tensor, gate: Tensor | None, scale: float, heads: HeadMean) -> Tensor:
        on_gpu = queries.device.type == "cuda" and queries.dtype != torch.float64
        if heads == "probabilities" and on_gpu and TRITON and torch.compiler.is_compiling():
            return captured_mass(queries, keys, scale, gate)
        if heads == "probabilities" and on_gpu and (kernels := fused_mass()) is not None:
            return kernels(queries, keys, scale=scale, gate=gate)
        parts = _Parts.of(queries, keys, gate, scale, heads)
        received, room = torch.zeros_like(parts.keys[:, 0, :, 0]), parts.room()
        with torch.autocast(queries.device.type, enabled=False):
            for first, last in parts.blocks:
                weights = parts.weights(first, last, room)
                received[:, : weights.shape[-1]] += _received(weights)
        return received

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, float, HeadMean], output: Tensor) -> None:
        *tensors, ctx.scale, ctx.heads = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] # torch's own decorator
        queries, keys, gate = ctx.saved_tensors
        parts = _Parts.of(queries, keys, gate, ctx.scale, ctx.heads)
        with torch.autocast(queries.device.type, enabled=False):
            of_queries, of_keys, of_gate = parts.gradients(grad)
        return of_queries.to(queries.dtype), of_keys.to(keys.dtype), None if gate is None else of_gate, None, None


@final
@dataclass(frozen=True, kw_only=True)
class _Parts:
    """Inputs of the forward and backward pass, in the precision of the sum; keys are not repeated per query head."""

    queries: Tensor
    keys: Tensor
    gate: Tensor | None
    scale: float
    heads: HeadMean

    @classmethod
    def of(cls, queries: Tensor, keys: Tensor, gate: Tensor | None, scale: float, heads: HeadMean) -> "_Parts":
        exact = torch.promote_types(queries.dtype, torch.float32)
        bias = None if gate is None else gate.to(exact)[:, None, None, :]
        return cls(queries=queries, keys=keys.to(exact), gate=bias, scale=scale, heads=heads)

    @property
    def step(self) -> int:
        """Queries per block: ROWS rows of all heads of a group, or BLOCK where no cache matters."""
        heads = self.queries.shape[1]
        if self.queries.device.type == "cpu":
            return max(1, min(BLOCK, ROWS * (1 if self.heads == "logits" else self.keys.shape[1]) // heads))
        return max(1, BLOCK // (1 if self.heads == "logits" else heads))

    @property
    def blocks(self) -> Iterator[tuple[int, int]]:
        """(first, last) query of each block."""
        count = self.queries.shape[2]
        return ((first, min(first + self.step, count)) for first in range(0, count, self.step))

    @lazy_property
    def later(self) -> Tensor:
        """Of the queries of a block (rows) and their own keys (columns): which are later."""
        return torch.ones(self.step, self.step, dtype=torch.bool, device=self.queries.device).triu(1)

    def seen(self, last: int) -> int:
        """Number of keys that any query before `last` sees."""
        return self.keys.shape[2] - self.queries.shape[2] + last

    def rows(self, of_heads: Tensor) -> Tensor:
        """[batch, heads, queries, n] as [batch, kv_heads, group x queries, n]."""
        return of_heads.reshape(*self.keys.shape[:2], -1, of_heads.shape[-1])

    def scaled(self, first: int, last: int) -> Tensor:
        """Queries of a block multiplied by the scale, [batch, kv_heads, group x queries, dim]."""
        return self.rows(self.queries[:, :, first:last].to(self.keys.dtype) * self.scale)

    def room(self) -> Tensor:
        """Memory for the largest block of `weights`."""
        batch, heads, _, _ = self.queries.shape
        heads = 1 if self.heads == "logits" else heads
        return self.keys.new_empty(batch * heads * min(self.step, self.queries.shape[2]) * self.keys.shape[2])

    def weights(self, first: int, last: int, room: Tensor | None = None) -> Tensor:
        """A of a block, [batch, heads, queries, keys seen]; [batch, 1, ...] where logits are averaged.

        With `room`, they are written there, without gradient; the same place for all blocks stays in the cache.
        """
        batch, heads, _, _ = self.queries.shape
        count, seen = last - first, self.seen(last)
        if self.heads == "logits":
            logits = self._mean_logits(first, last)
        else:
            logits = _product(self.scaled(first, last), self.keys[:, :, :seen].mT, room)
            logits = logits.view(batch, heads, count, seen)
        if self.gate is not None:
            logits += self.gate[..., :seen]
        logits[..., seen - count :].masked_fill_(self.later[:count, :count], float("-inf"))  # all before is seen
        return logits.softmax(dim=-1) if room is None else torch.softmax(logits, dim=-1, out=logits)

    def _mean_logits(self, first: int, last: int) -> Tensor:
        """Mean over heads of the logits, [batch, 1, queries, keys]: one product of all heads concatenated."""
        batch, kv_heads, _, dim = self.keys.shape
        grouped = self.scaled(first, last).view(batch, kv_heads, -1, last - first, dim).sum(dim=2)
        joined = (grouped / self.queries.shape[1]).transpose(1, 2).flatten(2)
        return (joined @ self.joined_keys[:, : self.seen(last)].mT)[:, None]

    @lazy_property
    def joined_keys(self) -> Tensor:
        """The keys of all heads side by side, [batch, keys, kv_heads x dim]."""
        return self.keys.transpose(1, 2).flatten(2)

    def gradients(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, keys and gate, given that of the mass."""
        batch, heads, _, dim = self.queries.shape
        of_queries, of_keys, of_gate = [], torch.zeros_like(self.keys), torch.zeros_like(grad)
        for first, last in self.blocks:
            # 1. gradient of the logits
            weights, seen = self.weights(first, last), self.seen(last)
            part = grad[:, :seen]
            mean = (weights @ part[:, None, :, None]) / heads
            of_logits = (weights * (part / heads)[:, None, None, :]).addcmul_(weights, mean, value=-1)
            of_logits = self.rows(of_logits.expand(-1, heads, -1, -1))
            # 2. gradients of the inputs
            of_rows = _product(of_logits, self.keys[:, :, :seen]) * self.scale
            of_queries.append(of_rows.view(batch, heads, last - first, dim))
            of_keys[:, :, :seen] += _product(of_logits.mT, self.scaled(first, last))
            of_gate[:, :seen] += of_logits.sum(dim=(1, 2))
        return torch.cat(of_queries, dim=2), of_keys, of_gate
