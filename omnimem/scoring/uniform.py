"""A control: tokens spread evenly over the whole stream are kept."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from omnimem.scoring.base import AbstractScorer
from omnimem.view import LayerView

BASE = 7  # of the digits: the layout of a stream is periodic, and 7 rarely divides the period
DIGITS = 8  # 7^8 = 5.8 million tokens; whole numbers below 2^24 are exact in float32


@final
@dataclass(frozen=True, kw_only=True)
class Uniform(AbstractScorer):
    """Score = the van der Corput value of the arrival number (its digits reversed), lowest first.

    The tokens above any threshold are then spread over the stream, whatever its length, which need not be known: the
    form of uniform sampling that does not depend on age (thinning the kept tokens repeatedly forgets the past). Digits
    in base 2 would alias with frames: of 16 visual tokens every 2 s, half the slots would go to one half of each frame.
    """

    def __call__(self, view: LayerView) -> Float[Tensor, "batch tokens"]:
        number, reversed_number = view.order, torch.zeros_like(view.order)
        for _ in range(DIGITS):
            reversed_number = reversed_number * BASE + number % BASE
            number = number // BASE
        return -reversed_number.float()
