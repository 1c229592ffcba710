"""Sketches of layer inputs as they are carried: in 16 bits per number, or as codes of 4 or 2 that share bytes.

Equal vectors have equal codes, hence the cosine 1. In units of standard deviations of the numbers, which are
1 / sqrt(feature) of the length of the vector:

4 bits   whole numbers from -7 to 7, in units of CLIP / LEVELS; only the direction is carried
2 bits   -1.5, -0.5, 0.5 or 1.5, in units of STEP, of the difference of a direction from a reference (`References`), and
         a byte for the length of that. Most of a layer input is common to all tokens, and four values would not resolve
         the rest. Differences from their mean do not depend on the reference.
"""

from copy import copy
from functools import cache
from typing import Literal, final

import torch
from jaxtyping import Float, Int8, Shaped, UInt8
from torch import Tensor
from torch.nn import functional as F

from omnimem.tokens import EVICTABLE

Bits = Literal[2, 4, 16]  # per number of a sketch
Codes = Literal[2, 4]  # those of them that are codes

SKETCHED = torch.bfloat16  # of 16 bits: bfloat16 for its range, as they may carry gradient
LEVELS = 7  # the largest code of 4 bits
CLIP = 2.5  # what it stands for
STEP = 0.996  # the best width of four equal steps for normally distributed numbers
SIZES = 85  # of a length of 2; three times as much, the largest number, is exact in bfloat16
# Rounding adds 1.2 % to the squared length of a vector, as noise that lowers cosines between centred vectors. Half of
# it is taken off again: the errors of nearly equal vectors are nearly equal too. Of all shares tried (0, 1/2, 3/4, 1)
# it agrees best with exact cosines (docs/policies.md, "Copies by a sketch").
ROUNDING = 0.006
# 1 - c of numbers with the cosine c, from t = 1 - that of their codes of 2 bits, as t^2 (a + b t + ...): within 0.004
# of the expectation over pairs of normally distributed numbers
UNROUNDED = (4.128, -7.337, 6.207, -1.998)
OFFSETS: dict[Codes, float] = {4: LEVELS + 1.0, 2: 1.5}  # of a stored code above the number that it stands for


@cache
def _multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it; others are slower than in float32."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return supported is not None and supported()


def rough(bits: Bits | Literal[False] | None, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether sketches are made and compared in bfloat16, beside keys of this type.

    It resolves more than codes of 2 bits do, and takes a quarter of the time where a CPU has instructions for it.
    """
    return bits == 2 and device.type == "cpu" and dtype == torch.float32 and _multiplies_bfloat16()


@final
class References:
    """By layer, a vector for each modality: the mean direction of the tokens of the first chunk that has any.

    One of the few things of a stream that are not in its memory: it never changes once it is there, so a chunk that is
    read again finds it as it was.
    """

    def __init__(self) -> None:
        self._of: dict[int, Tensor] = {}  # batch, kinds, feature
        self._known: dict[int, Tensor] = {}  # of which modalities; absent: of all

    def beyond(
        self, layer: int, vector: Float[Tensor, "batch tokens feature"], modality: Int8[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch tokens feature"]:
        """v / |v| - r of every token of a chunk, r the reference of its modality; without r of text, which is not used.

        A modality that has not arrived before gets its reference.
        """
        unit = F.normalize(vector, dim=-1, eps=1e-12)
        kinds = torch.arange(EVICTABLE[0], EVICTABLE[0] + len(EVICTABLE), device=modality.device)
        member = (modality[..., None] == kinds).to(vector.dtype)
        if layer not in self._of or layer in self._known:
            self._learn(layer, unit.detach(), member)
        return torch.baddbmm(unit, member, self._of[layer], alpha=-1)

    def _learn(
        self, layer: int, unit: Float[Tensor, "batch tokens feature"], member: Float[Tensor, "batch tokens kinds"]
    ) -> None:
        """Set the references of modalities of which these directions are the first."""
        count = member.sum(dim=1)[..., None]
        mean, known = (member.mT @ unit).div_(count.clamp_min(1)), count > 0
        if layer in self._of:
            mean = torch.where(self._known[layer], self._of[layer], mean)
            known |= self._known[layer]
        self._of[layer], self._known[layer] = mean, known
        if unit.device.type == "cpu" and bool(known.all()):  # other devices would have to be asked
            del self._known[layer]

    @property
    def bytes(self) -> int:
        """Of one stream."""
        return sum(mean[0].numel() * mean.element_size() for mean in self._of.values())

    def fork(self) -> "References":
        """The same so far; what is added to one of them does not reach the other."""
        twin = copy(self)
        twin._of, twin._known = dict(self._of), dict(self._known)
        return twin


def stored(feature: int, bits: Bits, *, learns: bool) -> tuple[int, torch.dtype]:
    """Width and type in which a sketch of `feature` numbers is carried; one that `learns` always has 16 bits."""
    if bits == 16 or learns:
        return feature, SKETCHED
    length = bits == 2 and feature > 0
    return -(-feature * bits // 8) + length, torch.uint8


def encoded(
    vector: Float[Tensor, "batch tokens feature"], bits: Bits, *, learns: bool
) -> Shaped[Tensor, "batch tokens stored"]:
    """Vectors as they are carried; those that learn hold the same numbers (`vectors`), with gradient to `vector`.

    In 2 bits, `vector` is a difference from a reference. Where they do not learn, it is overwritten.
    """
    if bits == 16:
        return F.normalize(vector, dim=-1, eps=1e-12).to(SKETCHED)
    # 1. codes
    length = torch.linalg.vector_norm(vector, dim=-1, keepdim=True).clamp_min(1e-12)
    size = None if bits == 4 else (length.detach() * (SIZES / 2)).round_().clamp_(max=SIZES)
    least, most = (1, 2 * LEVELS + 1) if bits == 4 else (0, 3)
    scale = vector.shape[-1] ** 0.5 * (LEVELS / CLIP if bits == 4 else 1 / STEP) / length
    scaled = vector * scale if learns else vector.mul_(scale)
    number = scaled.detach().clone() if learns else scaled
    number = number.add_(OFFSETS[bits] + 0.5).clamp_(least, most).to(torch.uint8)
    # 2. as they are carried
    if not learns:
        held = packed(number, bits)
        return held if size is None else torch.cat([held, size.to(torch.uint8)], dim=-1)
    value = number - OFFSETS[bits]
    if size is not None:
        scaled, value = vector * enlarged(vector.shape[-1]), 2 * value * size
    return (scaled + (value - scaled.detach())).to(SKETCHED)


def packed(number: UInt8[Tensor, "*axes feature"], bits: Codes) -> UInt8[Tensor, "*axes bytes"]:
    """Stored codes, 8 / bits to a byte: the first byte has the first one of each of so many equal parts of the vector.

    In 4 bits, the last part is filled up with the code of 0, which 2 bits do not have: there all parts are full.
    """
    size = -(-number.shape[-1] * bits // 8)
    held = number[..., :size]
    for shift in range(bits, 8, bits):
        first = shift // bits * size
        part = number[..., first : first + size]
        if part.shape[-1] < size:
            part = F.pad(part, (0, size - part.shape[-1]), value=int(OFFSETS[bits]))
        held = torch.add(held, part, alpha=1 << shift)
    return held


def vectors(held: Shaped[Tensor, "*axes stored"], codes: Codes | None) -> Float[Tensor, "*axes feature"]:
    """The carried vectors, up to a common factor or, in 4 bits, their lengths; what holds no codes as it is."""
    if codes is None or held.dtype != torch.uint8:
        return held
    found = unpacked(held if codes == 4 else held[..., :-1], codes).float().sub_(OFFSETS[codes])
    return found if codes == 4 else found.mul_(2 * held[..., -1:].float())


def unpacked(held: UInt8[Tensor, "*axes bytes"], bits: Codes) -> UInt8[Tensor, "*axes feature"]:
    """The stored codes that `packed` put together, those that fill up the last part included.

    Eight bytes at a time where they come in eights: each is shifted with its neighbours, whose bits are then masked.
    """
    flat = held.flatten()  # a slice of one token or of none counts as contiguous, whatever its strides
    word = torch.int64 if held.shape[-1] % 8 == 0 and flat.storage_offset() % 8 == 0 else torch.uint8
    words = flat.view(word).view(*held.shape[:-1], held.shape[-1] // word.itemsize)
    least = int.from_bytes([(1 << bits) - 1] * word.itemsize)
    found = words.new_empty(*words.shape[:-1], 8 // bits, words.shape[-1])
    for number, shift in enumerate(range(0, 8, bits)):
        torch.bitwise_and(words >> shift, least, out=found[..., number, :])
    return found.view(torch.uint8).flatten(-2)


def enlarged(feature: int) -> float:
    """How many times as long the vectors of codes of 2 bits are as what they stand for."""
    return feature**0.5 * SIZES / STEP


def unrounded(apart: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """1 - c of vectors from that of their codes of 2 bits, whose cosines rounding brings nearer to 0."""
    near = torch.minimum(apart, 2 - apart).clamp_min(0)
    a, b, c, d = UNROUNDED
    found = near.square() * (((d * near + c) * near + b) * near + a)
    return torch.where(apart > 1, 2 - found, found)
