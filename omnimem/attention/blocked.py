"""Attention in blocks of queries, on any device: autograd never stores a matrix of all queries times all keys.

The queries are the last Q of the K key positions: query i sees key j when j <= K - Q + i (bottom-right causal). In a
packed pass over several questions the key must also belong to the memory or to the query's own segment.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, final

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
CACHED = 1 << 18  # numbers of such a block of all key-value heads; of a larger one they are processed one by one
TRITON = find_spec("triton") is not None

HeadMean = Literal["probabilities", "logits"]


class Every(NamedTuple):
    """The queries whose attention is measured: each `stride`-th from `first` on, in place of all of them."""

    stride: int = 1
    first: int = 0

    @classmethod
    def drawn(cls, stride: int, queries: int, *place: int) -> "Every":
        """Every `stride`-th of `queries`, at most `queries` apart, from one that a hash of `place` draws (ours).

        All first queries are equally likely, so each query is measured with probability 1 / stride, and at least one
        always is. Nothing but these numbers decides: neither the device, nor the batch, nor the state of a generator.
        """
        if (stride := min(stride, queries)) == 1:
            return ALL
        digest = hashlib.sha256(repr(place).encode()).digest()
        return cls(stride, int.from_bytes(digest[:8], "big") % stride)

    def of(self, queries: Float[Tensor, "batch heads queries *dims"]) -> Float[Tensor, "batch heads measured *dims"]:
        """The measured ones."""
        return queries if self.stride == 1 else queries[:, :, self.first :: self.stride]


ALL = Every()


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
    every: Every = ALL,
) -> tuple[Float[Tensor, "batch heads queries dim"], Float[Tensor, "batch keys"]] | None:
    """`attend` and `mass` of the same inputs together; None where two passes are better. Without gradients only.

    On a CPU, in float32 or more, in one pass that has the probabilities in memory: the mass of all queries equals that
    of `mass` to the bit; that of some, and the output, up to rounding. On a GPU with the flash kernel, whose
    log-sum-exp per query leaves one more pass over the keys: the output is that of `attend`, the mass equal up to
    rounding.
    """
    if torch.is_grad_enabled():
        return None
    if queries.device.type == "cuda":
        return _flash_measured(queries, keys, values, scale, gate, every)
    if queries.device.type != "cpu" or queries.dtype not in (torch.float32, torch.float64):
        return None
    parts = _Parts.of(queries, keys, gate, scale, keys.shape[2] - queries.shape[2] + 1)
    output, received, room = torch.empty_like(queries), torch.zeros_like(keys[:, 0, :, 0]), parts.room()
    with torch.autocast(queries.device.type, enabled=False):
        for part in parts.parts:
            of_values, of_output, of_mass = (
                part.matrices(values),
                output[part.streams, part.heads],
                received[part.streams],
            )
            for block, rows, weights in parts.weights(part, room):
                seen = weights.shape[-1]
                begin = (every.first - block.start) % every.stride
                measured = weights if every.stride == 1 else weights[:, :, begin :: every.stride]
                of_mass.narrow(1, 0, seen).add_(measured.sum(dim=(1, 2)))
                mixed = torch.bmm(weights.view(*rows.shape[:2], seen), of_values.narrow(1, 0, seen))
                of_output[:, :, block] = mixed.view(*weights.shape[:3], -1)
    received.div_(queries.shape[1])
    return output, received if every.stride == 1 else received * every.stride


def _flash_measured(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, gate: Tensor | None, every: Every
) -> tuple[Tensor, Tensor] | None:
    """`attend_measured` on a GPU."""
    wide = (queries, keys, values) if gate is None else _with_gate(queries, keys, values, gate, scale)
    if queries.shape[2] == 1 or not TRITON or not _flash_supports(*wide):
        return None
    output, sums = _flash(*wide, scale)
    seen = keys.shape[2] - queries.shape[2] + every.first + 1
    kernels = captured_mass if torch.compiler.is_compiling() else by_kernels
    received = kernels(every.of(queries), keys, scale, gate, seen, every.stride, every.of(sums))
    return output[..., : queries.shape[-1]], received if every.stride == 1 else received * every.stride


def _flash(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output of the flash kernel with the lower-right causal mask, and the log-sum-exp of each query."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention
    output, sums, *_ = kernel(queries, keys, values, 0.0, is_causal=True, return_debug_mask=False, scale=scale)
    return output, sums


def mass(
    queries: Float[Tensor, "batch heads queries dim"],
    keys: Float[Tensor, "batch kv_heads keys dim"],
    *,
    scale: float,
    gate: Float[Tensor, "batch keys"] | None = None,
    heads: HeadMean = "probabilities",
    every: Every = ALL,
) -> Float[Tensor, "batch keys"]:
    """Attention mass per key, a_k = sum over queries of the mean over heads of A_qk (paper eq. 8).

    With `every`, stride times the sum over every stride-th query: an unbiased estimate of the sum over all, in
    1 / stride of the operations (ours). The result is float32, or float64 for float64 inputs. `heads="logits"` averages
    the scaled logits over the heads before one softmax per query, as the release does. Differentiable in queries, keys
    and gate: backward recomputes each block's softmax, so the graph stores nothing of size queries x keys. Autocast is
    disabled inside, so that training and evaluation select the same tokens.
    """
    seen = keys.shape[2] - queries.shape[2] + every.first + 1
    queries, fused = every.of(queries), heads == "probabilities"
    if heads == "logits":
        queries, keys, scale = *_averaged(queries, keys, scale), 1.0
    received = _Mass.apply(queries, keys, gate, scale, seen, every.stride, fused)
    return received if every.stride == 1 else received * every.stride


def _averaged(
    queries: Float[Tensor, "batch heads queries dim"], keys: Float[Tensor, "batch kv_heads keys dim"], scale: float
) -> tuple[Float[Tensor, "batch 1 queries joined"], Float[Tensor, "batch 1 keys joined"]]:
    """One head whose logits are the mean of the scaled logits of all: the key-value heads side by side."""
    exact, group = torch.promote_types(queries.dtype, torch.float32), queries.shape[1] // keys.shape[1]
    means = (queries.to(exact) * scale).unflatten(1, (-1, group)).sum(dim=2) / queries.shape[1]
    joined = [tensor.transpose(1, 2).flatten(2)[:, None] for tensor in (means, keys.to(exact))]
    return joined[0], joined[1]


@cache
def fused_mass() -> Callable[..., Tensor] | None:
    """`omnimem.attention.fused.mass`, imported only when it is used; None without Triton (which comes with CUDA)."""
    return import_module("omnimem.attention.fused").mass if TRITON else None


def by_kernels(
    queries: Tensor, keys: Tensor, scale: float, gate: Tensor | None, seen: int, stride: int, sums: Tensor | None = None
) -> Tensor:
    """`fused_mass` of these arguments. Requires Triton."""
    kernels = fused_mass()
    assert kernels is not None, "chosen where there is Triton"
    return kernels(queries, keys, scale=scale, gate=gate, seen=seen, stride=stride, sums=sums)


# one operator of a captured graph: torch.compile does not look into it
captured_mass = torch.library.custom_op("omnimem::mass", by_kernels, mutates_args=())


@captured_mass.register_fake
def _(
    queries: Tensor, keys: Tensor, scale: float, gate: Tensor | None, seen: int, stride: int, sums: Tensor | None = None
) -> Tensor:
    return keys.new_empty(keys.shape[0], keys.shape[2], dtype=torch.float32)


@final
class _Mass(torch.autograd.Function):
    """With A = softmax(L) and c the gradient of the mass: dL_qk = A_qk (c_k - sum_j A_qj c_j) / heads.

    Then dq = scale dL k, dk = scale dL^T q, and the gradient of the gate is the column sum of dL.
    """

    @staticmethod
    def forward(
        queries: Tensor, keys: Tensor, gate: Tensor | None, scale: float, seen: int, stride: int, fused: bool
    ) -> Tensor:
        on_gpu = queries.device.type == "cuda" and queries.dtype != torch.float64
        if fused and on_gpu and TRITON:
            kernels = captured_mass if torch.compiler.is_compiling() else by_kernels
            return kernels(queries, keys, scale, gate, seen, stride)
        parts = _Parts.of(queries, keys, gate, scale, seen, stride)
        received, room = torch.zeros_like(parts.keys[:, 0, :, 0]), parts.room()
        with torch.autocast(queries.device.type, enabled=False):
            for part in parts.parts:
                for _, _, weights in parts.weights(part, room):
                    received[part.streams, : weights.shape[-1]] += weights.sum(dim=(1, 2))
        return received.div_(queries.shape[1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.settings = inputs[3:6]
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] # torch's own decorator
        queries, keys, gate = ctx.saved_tensors
        parts = _Parts.of(queries, keys, gate, *ctx.settings)
        with torch.autocast(queries.device.type, enabled=False):
            of_queries, of_keys, of_gate = parts.gradients(grad)
        of_inputs = of_queries.to(queries.dtype), of_keys.to(keys.dtype), None if gate is None else of_gate
        return *of_inputs, None, None, None, None


@final
@dataclass(frozen=True, kw_only=True)
class _Part:
    """Streams and heads that are processed together, with one matrix per stream and key-value head."""

    streams: slice
    kv_heads: slice
    heads: slice  # their query heads

    def matrices(self, of_heads: Float[Tensor, "batch kv_heads n dim"]) -> Float[Tensor, "matrices n dim"]:
        """The matrices of this part; a view, where their layout allows it."""
        return of_heads[self.streams, self.kv_heads].flatten(0, 1)


@final
@dataclass(frozen=True, kw_only=True)
class _Parts:
    """Inputs of the forward and backward pass, in the precision of the sum; keys are not repeated per query head."""

    queries: Tensor
    keys: Tensor
    gate: Tensor | None
    scale: float
    first_seen: int  # number of keys that the first query sees
    stride: int  # by which each query sees more than the one before it

    @classmethod
    def of(
        cls, queries: Tensor, keys: Tensor, gate: Tensor | None, scale: float, first_seen: int, stride: int = 1
    ) -> "_Parts":
        exact = torch.promote_types(queries.dtype, torch.float32)
        bias = None if gate is None else gate.to(exact)[:, None, None, :]
        return cls(queries=queries, keys=keys.to(exact), gate=bias, scale=scale, first_seen=first_seen, stride=stride)

    @lazy_property
    def step(self) -> int:
        """Queries per block: ROWS rows of all heads of a group, or BLOCK where no cache matters."""
        heads, kv_heads = self.queries.shape[1], self.keys.shape[1]
        on_cpu = self.queries.device.type == "cpu"
        return max(1, min(BLOCK, ROWS * kv_heads // heads) if on_cpu else BLOCK // heads)

    @lazy_property
    def alone(self) -> bool:
        """Whether each stream and key-value head is processed alone: on a CPU whose cache does not hold all heads."""
        on_cpu = self.queries.device.type == "cpu"
        return on_cpu and self.queries.shape[1] * self.step * self.keys.shape[2] > CACHED

    @property
    def parts(self) -> Iterator[_Part]:
        """All streams and heads, part by part."""
        batch, kv_heads = self.keys.shape[:2]
        group = self.queries.shape[1] // kv_heads
        streams, heads = (1, 1) if self.alone else (batch, kv_heads)
        for stream in range(0, batch, streams):
            for head in range(0, kv_heads, heads):
                yield _Part(
                    streams=slice(stream, stream + streams),
                    kv_heads=slice(head, head + heads),
                    heads=slice(head * group, (head + heads) * group),
                )

    @lazy_property
    def later(self) -> Tensor:
        """Of the queries of a block (rows) and the keys from that of the first on (columns): which are later."""
        rows = torch.arange(self.step, device=self.queries.device) * self.stride
        return torch.arange((self.step - 1) * self.stride + 1, device=self.queries.device) > rows[:, None]

    def room(self) -> Tensor:
        """Memory for the largest block of `weights`."""
        batch, heads, count, _ = self.queries.shape
        most = heads // self.keys.shape[1] if self.alone else batch * heads
        return self.keys.new_empty(most * min(self.step, count) * self.keys.shape[2])

    def weights(self, part: _Part, room: Tensor | None = None) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Of each block of queries: which they are, their scaled rows [matrices, group x queries, dim], and A.

        A is [streams, heads, queries, keys seen]. With `room`, it is written there; the same place for all blocks stays
        in the cache. Without gradient.
        """
        queries = self.queries.unflatten(1, (self.keys.shape[1], -1))[part.streams, part.kv_heads]
        keys, gate = part.matrices(self.keys).mT, None if self.gate is None else self.gate[part.streams]
        streams, total, (matrices, dim, _) = len(queries), queries.shape[3], keys.shape
        for first in range(0, total, self.step):
            # 1. shapes: the last query of the block sees `seen` keys, the first one all but the last `own` - 1 of these
            count = min(self.step, total - first)
            seen, own = self.first_seen + (first + count - 1) * self.stride, (count - 1) * self.stride + 1
            # 2. logits
            rows = (queries.narrow(3, first, count).to(keys.dtype) * self.scale).reshape(matrices, -1, dim)
            shape = (matrices, rows.shape[1], seen)
            place = None if room is None else room[: math.prod(shape)].view(shape)
            logits = torch.bmm(rows, keys.narrow(2, 0, seen), out=place).view(streams, -1, count, seen)
            # 3. gate, causal mask, softmax
            if gate is not None:
                logits += gate[..., :seen]
            logits.narrow(3, seen - own, own).masked_fill_(self.later[:count, :own], float("-inf"))
            yield slice(first, first + count), rows, torch.softmax(logits, dim=-1, out=logits)

    def gradients(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, keys and gate, given that of the mass."""
        heads = self.queries.shape[1]
        of_queries = torch.empty_like(self.queries, dtype=self.keys.dtype)
        of_keys, of_gate = self.keys.new_zeros(self.keys.shape), torch.zeros_like(grad)
        for part in self.parts:
            keys, of_part = part.matrices(self.keys), part.matrices(of_keys)
            for block, rows, weights in self.weights(part):
                # 1. gradient of the logits
                seen = weights.shape[-1]
                of_mass = grad[part.streams, :seen]
                mean = (weights @ of_mass[:, None, :, None]) / heads
                of_logits = (weights * (of_mass / heads)[:, None, None, :]).addcmul_(weights, mean, value=-1)
                # 2. gradients of the inputs
                of_gate[part.streams, :seen] += of_logits.sum(dim=(1, 2))
                of_logits = of_logits.view(len(keys), -1, seen)
                of_rows = torch.bmm(of_logits, keys[:, :seen]) * self.scale
                of_queries[part.streams, part.heads, block] = of_rows.view(*weights.shape[:3], -1)
                of_part[:, :seen] += torch.bmm(of_logits.mT, rows)
        return of_queries, of_keys, of_gate
