"""Attention mass on a GPU in two Triton kernels: logits are never written to GPU memory.

The first kernel computes the log-sum-exp of every query, unless the attention itself has given it; the second sums the
attention of each key over the queries.
Each block of keys is summed by one program over all query heads that share them, so that the order of additions is the
same in every run, and one number per key and key-value head is written.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

ROWS, COLUMNS = 128, 64  # queries and keys of a block


def mass(
    queries: Float[Tensor, "batch heads queries dim"],
    keys: Float[Tensor, "batch kv_heads keys dim"],
    *,
    scale: float,
    gate: Float[Tensor, "batch keys"] | None = None,
    seen: int | None = None,
    stride: int = 1,
    sums: Float[Tensor, "batch heads queries"] | None = None,
) -> Float[Tensor, "batch keys"]:
    """a_k = sum over queries of the mean over heads of softmax(scale q k + gate), float32, causal (paper eq. 8).

    The first query sees `seen` keys (None: the last one sees all), each further one `stride` more. `sums` is log
    sum_k exp(scale q k + gate) of each query over the keys that it sees, where it is known. Products of 16-bit
    numbers are exact in float32; float32 inputs are multiplied in full precision, never as TF32.
    """
    # 1. outputs and launch parameters
    batch, heads, count, dim = queries.shape
    kv_heads, total = keys.shape[1], keys.shape[2]
    exact = {"dtype": torch.float32, "device": queries.device}
    known = sums is not None
    sums = sums.contiguous() if sums is not None else torch.empty(batch, heads, count, **exact)
    received = torch.empty(batch, kv_heads, total, **exact)
    bias = received if gate is None else gate.to(torch.float32).contiguous()  # without a gate the pointer is not read
    rows, columns = (ROWS, COLUMNS) if queries.dtype != torch.float32 else (ROWS // 4, COLUMNS // 2)
    shape = (queries.contiguous(), keys.contiguous(), bias, sums)
    seen = total - count + 1 if seen is None else seen
    sizes = (scale, heads, heads // kv_heads, count, total, dim, seen, stride)
    settings = {
        "WIDTH": max(16, triton.next_power_of_2(dim)),
        "ROWS": rows,
        "COLUMNS": columns,
        "GATED": gate is not None,
    }
    # 2. log-sum-exp per query, then mass per key
    with torch.cuda.device(queries.device) if queries.is_cuda else nullcontext():  # Triton's interpreter uses the CPU
        if not known:
            _log_sums[(triton.cdiv(count, rows), batch * heads)](*shape, *sizes, **settings)
        _column_sums[(triton.cdiv(total, columns), batch * kv_heads)](*shape, received, *sizes, **settings)
    return received.sum(dim=1) / heads


@triton.jit
def _logits(q, k, gates, columns, total, scale, GATED: tl.constexpr):
    """Logits of a block of queries [ROWS, WIDTH] and a block of keys [WIDTH, COLUMNS]."""
    logits = tl.dot(q, k, input_precision="ieee") * scale
    if GATED:
        logits += tl.load(gates + columns, mask=columns < total, other=0.0)[None, :]
    return logits


@triton.jit
def _log_sums(
    q_all, k_all, gate_all, sums, scale, heads, group, count, total, dim, seen, stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """log sum_k exp(logit) for ROWS queries of one head."""
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    kv_row = batch * (heads // group) + head // group
    places, dims = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    q_mask = (places[:, None] < count) & (dims[None, :] < dim)
    q = tl.load(q_all + (row * count + places[:, None]) * dim + dims[None, :], mask=q_mask, other=0.0)
    limit = seen + places * stride  # number of keys that each query sees
    top = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    last = tl.minimum(count, (tl.program_id(0) + 1) * ROWS) - 1
    for first in range(0, seen + last * stride, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        k_mask = (columns[None, :] < total) & (dims[:, None] < dim)
        k = tl.load(k_all + (kv_row * total + columns[None, :]) * dim + dims[:, None], mask=k_mask, other=0.0)
        logits = _logits(q, k, gate_all + batch * total, columns, total, scale, GATED)
        logits = tl.where(columns[None, :] < limit[:, None], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        weight = weight * tl.exp(top - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        top = higher
    tl.store(sums + row * count + places, top + tl.log(weight), mask=places < count)


@triton.jit
def _column_sums(
    q_all, k_all, gate_all, sums, received, scale, heads, group, count, total, dim, seen, stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """sum_q exp(logit - log sum) for COLUMNS keys of one key-value head, over its query heads and what sees them."""
    kv_row = tl.program_id(1).to(tl.int64)
    batch = kv_row // (heads // group)
    columns, dims = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, WIDTH)
    k_mask = (columns[None, :] < total) & (dims[:, None] < dim)
    k = tl.load(k_all + (kv_row * total + columns[None, :]) * dim + dims[:, None], mask=k_mask, other=0.0)
    gathered = tl.zeros([COLUMNS], tl.float32)
    earliest = tl.maximum(0, tl.program_id(0) * COLUMNS - seen + stride) // stride // ROWS * ROWS
    for row in range(kv_row * group, (kv_row + 1) * group):
        for first in range(earliest, count, ROWS):
            places = first + tl.arange(0, ROWS)
            q_mask = (places[:, None] < count) & (dims[None, :] < dim)
            q = tl.load(q_all + (row * count + places[:, None]) * dim + dims[None, :], mask=q_mask, other=0.0)
            logits = _logits(q, k, gate_all + batch * total, columns, total, scale, GATED)
            sum_of = tl.load(sums + row * count + places, mask=places < count, other=float("inf"))
            visible = (columns[None, :] < seen + places[:, None] * stride) & (places[:, None] < count)
            gathered += tl.sum(tl.exp(tl.where(visible, logits - sum_of[:, None], float("-inf"))), 0)
    tl.store(received + kv_row * total + columns, gathered, mask=columns < total)
