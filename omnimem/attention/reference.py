"""Attention with plain loops in float64: the oracle of the tests, never used in a run."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def attend(
    queries: Float[Tensor, "batch heads queries dim"],
    keys: Float[Tensor, "batch kv_heads keys dim"],
    values: Float[Tensor, "batch kv_heads keys dim"],
    *,
    scale: float,
    visible: Bool[Tensor, "batch queries keys"],
    gate: Float[Tensor, "batch keys"],
) -> tuple[Float[Tensor, "batch heads queries dim"], Float[Tensor, "batch heads queries keys"]]:
    """Output and probabilities of softmax(scale q k + gate) over the visible keys, one query at a time."""
    batch, heads, count, dim = queries.shape
    group = heads // keys.shape[1]
    output = torch.zeros(batch, heads, count, dim, dtype=torch.float64)
    probabilities = torch.zeros(batch, heads, count, keys.shape[2], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for q in range(count):
                seen = [k for k in range(keys.shape[2]) if visible[b, q, k]]
                logits = [
                    scale * float(queries[b, h, q].double() @ keys[b, h // group, k].double()) + float(gate[b, k])
                    for k in seen
                ]
                top = max(logits)
                weights = [math.exp(logit - top) for logit in logits]
                total = sum(weights)
                for k, weight in zip(seen, weights, strict=True):
                    probabilities[b, h, q, k] = weight / total
                    output[b, h, q] += weight / total * values[b, h // group, k].double()
    return output, probabilities


def mass_of_probabilities(probabilities: Float[Tensor, "batch heads queries keys"]) -> Float[Tensor, "batch keys"]:
    """a_k = sum over queries of the mean over heads of A_qk (paper eq. 8)."""
    return probabilities.mean(dim=1).sum(dim=1)
