"""A control: tokens spread evenly over the whole stream stay."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from omnimem.scoring.base import AbstractScorer
from omnimem.view import LayerView


@final
@dataclass(frozen=True, kw_only=True)
class Uniform(AbstractScorer):
    """Score = the van der Corput value of the arrival number (bit reversal, base 2), highest first.

    The tokens above any threshold are then nearly equally spaced in the stream, at every length and without knowing
    it beforehand: the age-unbiased form of uniform sampling (thinning the survivors again and again forgets the past).
    """

    def __call__(self, view: LayerView) -> Float[Tensor, "batch tokens"]:
        number, value = view.order.clone(), torch.zeros_like(view.order, dtype=torch.float32)
        for bit in range(1, 25):
            value = value + (number & 1).float() * 2.0**-bit
            number = number >> 1
        return 1 - value
