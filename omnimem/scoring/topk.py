"""Top-k of scores with a fixed rule for ties."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def highest(
    scores: Float[Tensor, "batch tokens"], member: Bool[Tensor, "batch tokens"], count: int
) -> Int[Tensor, "batch count"]:
    """Indices of the `count` highest members, in falling order; ties go to the most recent token.

    A stable sort from the newest to the oldest breaks ties. A NaN can only come from a NaN of the model itself; it
    ranks last, not first as in torch.topk.
    """
    ranked = scores.detach().nan_to_num(nan=-torch.finfo(scores.dtype).max).masked_fill(~member, float("-inf"))
    newest_first = ranked.flip(1).argsort(dim=1, descending=True, stable=True)
    return scores.shape[1] - 1 - newest_first[:, :count]
