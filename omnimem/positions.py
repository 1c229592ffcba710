"""Positions of kept tokens: ranks over the union of modalities, and rotation of keys to new positions."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from omnimem.tokens import ABSENT, Modality

Rotary = Callable[[Int[Tensor, "axes batch tokens"]], tuple[Tensor, Tensor]]


def rotate(
    keys: Float[Tensor, "batch kv_heads tokens dim"],
    cos: Float[Tensor, "batch tokens dim"],
    sin: Float[Tensor, "batch tokens dim"],
) -> Float[Tensor, "batch kv_heads tokens dim"]:
    """k cos + rotate_half(k) sin, in float32 or more (RoPE; angles add, so a difference of angles moves a key)."""
    half = keys.shape[-1] // 2
    exact = keys.to(torch.promote_types(keys.dtype, torch.float32))
    rotated = torch.cat([-exact[..., half:], exact[..., :half]], dim=-1)
    cos, sin = (part[:, None].to(exact.dtype) for part in (cos, sin))
    return (exact * cos + rotated * sin).to(keys.dtype)


def distinct(time: Int[Tensor, "batch tokens"], modality: Int8[Tensor, "batch tokens"], opening: int) -> list[int]:
    """Number of distinct times >= `opening` in each stream, without those of padding."""
    return [len(row[(row >= opening) & (kinds != ABSENT)].unique()) for row, kinds in zip(time, modality, strict=True)]


def ranks(
    time: Int[Tensor, "batch tokens"], modality: Int8[Tensor, "batch tokens"], opening: int, end: Sequence[int | None]
) -> Int[Tensor, "batch tokens"]:
    """New times: the distinct times >= `opening`, of both modalities, become consecutive and end before `end`.

    `end` holds one value per stream; None: the stream does not move. Times before `opening` and those of padding are
    unchanged; audio and video tokens with equal times keep equal times (ours).
    """
    moved = time.clone()
    for row, last in enumerate(end):
        if last is None:
            continue
        free = (time[row] >= opening) & (modality[row] != ABSENT)
        times, place = time[row][free].unique(return_inverse=True)
        moved[row, free] = (place + (last - len(times))).to(time.dtype)
    return moved


def earlier(
    positions: Int[Tensor, "batch axes tokens"],
    modality: Int8[Tensor, "batch tokens"],
    shift: int | Int[Tensor, "batch tokens"],
) -> Int[Tensor, "batch axes tokens"]:
    """Positions moved back by `shift`: the time axis of visual tokens, all axes of other tokens."""
    back = torch.as_tensor(shift, device=positions.device).expand(modality.shape)
    space = torch.where(Modality.VISUAL.mask(modality), 0, back)
    return positions - torch.stack([back, space, space], dim=1).to(positions.dtype)
