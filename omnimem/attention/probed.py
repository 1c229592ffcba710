"""Full attention probabilities of a few queries: the windows and probes that many policies score a cache with."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def probabilities(
    queries: Float[Tensor, "batch heads queries dim"],
    keys: Float[Tensor, "batch kv_heads keys dim"],
    seen: Bool[Tensor, "#batch #queries keys"],
    *,
    scale: float,
    gate: Float[Tensor, "batch keys"] | None = None,
) -> Float[Tensor, "batch heads queries keys"]:
    """softmax(scale q k + gate) over the keys seen, float32; stores queries x keys, so pass few queries.

    The row of a query that sees no key is zero.
    """
    batch, heads, count, dim = queries.shape
    kv_heads = keys.shape[1]
    grouped = (queries.float() * scale).reshape(batch, kv_heads, heads // kv_heads * count, dim)
    logits = (grouped @ keys.float().mT).view(batch, heads, count, keys.shape[2])
    if gate is not None:
        logits = logits + gate.float()[:, None, None, :]
    hidden = ~seen[:, None]
    return logits.masked_fill(hidden, torch.finfo(logits.dtype).min).softmax(dim=-1).masked_fill(hidden, 0.0)


def until(places: Int[Tensor, "batch queries"], keys: int) -> Bool[Tensor, "batch queries keys"]:
    """Mask of the keys at or before the place of each query."""
    return torch.arange(keys, device=places.device) <= places[..., None]
