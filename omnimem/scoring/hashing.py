"""Random numbers as a function of integers: a draw does not depend on earlier draws."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

MASK = 0xFFFFFFFF


def uniform_of(numbers: Int[Tensor, "*shape"], seed: int) -> Float[Tensor, "*shape"]:
    """Uniform in [0, 1), one per number: two rounds of a 32-bit multiply-xorshift mixer keyed by `seed`."""
    mixed = (numbers.long() + ((seed * 0x9E3779B9 + 0x7F4A7C15) & MASK)) & MASK
    for factor in (0x21F0AAAD, 0x735A2D97):
        mixed = ((mixed ^ (mixed >> 16)) * factor) & MASK
    mixed = mixed ^ (mixed >> 15)
    return (mixed >> 8).to(torch.float32) / (1 << 24)
