"""Distance of a token's keys from the mean key: KeyDiff's score (arXiv 2504.15364)."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from omnimem.scoring.base import AbstractScorer
from omnimem.tokens import ABSENT
from omnimem.view import FLOOR, LayerView


@final
@dataclass(frozen=True, kw_only=True)
class KeyDifference(AbstractScorer):
    """1 - cos(k, mean of the normalised keys), mean over the key-value heads of a row; clamped to >= 1e-6.

    The source does not mention streams or text: here keys are as stored (after RoPE), and the mean is over the whole
    pool [memory ; chunk] with its text, as it is over the whole cache there. Needs no attention and no side state.
    """

    def __call__(self, view: LayerView) -> Float[Tensor, "batch tokens"]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and view.gradient != "none"):
            keys = F.normalize(view.pool.keys.to(torch.promote_types(view.pool.keys.dtype, torch.float32)), dim=-1)
            pooled = keys
            if view.padded:  # padding is no part of the mean, whose direction alone matters
                pooled = keys * (view.modality != ABSENT)[:, None, :, None]
            anchor = F.normalize(pooled.mean(dim=2, keepdim=True), dim=-1)
            return (1 - (keys * anchor).sum(dim=-1).mean(dim=1)).clamp_min(FLOOR)
