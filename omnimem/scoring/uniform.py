"""A control: tokens spread evenly over the whole stream stay."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from omnimem.scoring.base import AbstractScorer
from omnimem.view import LayerView

BASE = 7  # of the digits: a stream repeats its layout every so many tokens, and 7 rarely divides that number
DIGITS = 8  # 7^8 = 5.8 million tokens; whole numbers below 2^24 are exact in float32


@final
@dataclass(frozen=True, kw_only=True)
class Uniform(AbstractScorer):
    """Score = the van der Corput value of the arrival number (its digits reversed), lowest first.

    The tokens above any threshold are then spread over the stream, at every length and without knowing it beforehand:
    the age-unbiased form of uniform sampling (thinning the survivors again and again forgets the past). Digits in base
    2 would alias with frames: of 16 visual tokens every 2 s, half the budget would go to the same half of each frame.
    """

    def __call__(self, view: LayerView) -> Float[Tensor, "batch tokens"]:
        number, reversed_number = view.order, torch.zeros_like(view.order)
        for _ in range(DIGITS):
            reversed_number = reversed_number * BASE + number % BASE
            number = number // BASE
        return -reversed_number.float()
