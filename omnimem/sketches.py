"""Sketches of layer inputs as they are carried: in 16 bits per number, or in 4 with two numbers to the byte.

A sketch of 4 bits holds whole numbers from -7 to 7, the vector in units of CLIP / LEVELS standard deviations. Only its
direction is used, so no scale is carried. Equal vectors have equal codes, hence the cosine 1.
"""

from typing import Literal

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

Bits = Literal[4, 16]  # per number of a sketch

SKETCHED = torch.bfloat16  # of 16 bits: bfloat16 for its range, as they may carry gradient
LEVELS = 7  # the largest code
CLIP = 2.5  # what it stands for, in standard deviations: 1 / sqrt(feature) for a vector of length 1
# Rounding adds 1.2 % to the squared length of a vector, as noise that lowers cosines between centred vectors. Half of
# it is taken off again: the errors of nearly equal vectors are nearly equal too. Of all shares tried (0, 1/2, 3/4, 1)
# it agrees best with exact cosines (docs/policies.md, "Copies by a sketch").
ROUNDING = 0.006


def stored(feature: int, bits: Bits, *, learns: bool) -> tuple[int, torch.dtype]:
    """Width and type in which a sketch of `feature` numbers is carried; one that `learns` always has 16 bits."""
    return (feature, SKETCHED) if bits == 16 or learns else (-(-feature // 2), torch.uint8)


def encoded(
    unit: Float[Tensor, "batch tokens feature"], bits: Bits, *, learns: bool
) -> Shaped[Tensor, "batch tokens stored"]:
    """Vectors of length 1 as they are carried; those that learn hold the same codes, with the gradient of `unit`."""
    if bits == 16:
        return unit.to(SKETCHED)
    scaled = unit * (unit.shape[-1] ** 0.5 * LEVELS / CLIP)
    codes = scaled.detach().round().clamp_(-LEVELS, LEVELS)
    if learns:
        return (scaled + (codes - scaled.detach())).to(SKETCHED)
    return packed(codes)


def packed(codes: Float[Tensor, "*axes feature"]) -> UInt8[Tensor, "*axes bytes"]:
    """Whole numbers from -7 to 7, two to a byte; an odd last one is followed by 0."""
    shifted = codes.add(LEVELS + 1).to(torch.uint8)
    half = -(-shifted.shape[-1] // 2)
    low, high = shifted[..., :half], shifted[..., half:]
    if high.shape[-1] < half:
        high = torch.cat([high, torch.full_like(low[..., :1], LEVELS + 1)], dim=-1)
    return low | (high << 4)


def vectors(held: Shaped[Tensor, "*axes stored"]) -> Float[Tensor, "*axes feature"]:
    """The carried vectors up to their lengths: the codes of packed bytes, anything else as it is."""
    if held.dtype != torch.uint8:
        return held
    return torch.cat([held & 15, held >> 4], dim=-1).to(torch.float32).sub_(LEVELS + 1)
