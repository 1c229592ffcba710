"""Pixels to patches: equal to Qwen2VLVideoProcessor, without torchvision (see tests/recorded/record.py)."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import interpolate

MAX_ASPECT_RATIO = 200  # limit of the Qwen processors


def smart_resize(height: int, width: int, *, cell: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Nearest (height, width) with both sides multiples of `cell` and the area within the pixel limits.

    Rounds half to even. Outside the limits, scales by sqrt(area / limit), rounding down above the maximum and up below
    the minimum, as Qwen2-VL does. `cell` is patch x merge pixels. Raises ValueError for an aspect ratio above 200.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"aspect ratio above {MAX_ASPECT_RATIO} in a {width}x{height} frame; crop the video first")
    rows, columns = round(height / cell) * cell, round(width / cell) * cell
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(cell, math.floor(height / shrink / cell) * cell)
        columns = max(cell, math.floor(width / shrink / cell) * cell)
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / cell) * cell
        columns = math.ceil(width * grow / cell) * cell
    return rows, columns


def resize(
    frames: UInt8[Tensor, "frames 3 _ _"], height: int, width: int
) -> UInt8[Tensor, "frames 3 {height} {width}"]:
    """Bicubic antialiased resizing in uint8 arithmetic, with the same kernel as torchvision."""
    if frames.shape[-2:] == (height, width):
        return frames
    return interpolate(frames, size=(height, width), mode="bicubic", align_corners=False, antialias=True)


def patchify(
    frames: UInt8[Tensor, "frames 3 height width"],
    *,
    patch: int,
    merge: int,
    temporal_patch: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[Float[Tensor, "patches row"], tuple[int, int, int]]:
    """Normalised patches for the vision encoder, and their grid (time, height, width) in patches.

    Patches are ordered by (time, row of cells, column of cells, row in the cell, column in the cell); a row holds
    (channel, frame in the patch, y, x). The last frame is repeated up to a multiple of `temporal_patch`.
    Raises ValueError when the frame size is not a multiple of patch x merge.
    """
    # 1. pad the frames
    count, channels, height, width = frames.shape
    cell = patch * merge
    if height % cell or width % cell:
        raise ValueError(f"frames of {width}x{height} are not a multiple of {cell} pixels; resize with smart_resize")
    if missing := -count % temporal_patch:
        frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
    # 2. reorder to patches
    grid = (len(frames) // temporal_patch, height // patch, width // patch)
    rows = (
        frames.reshape(grid[0], temporal_patch, channels, height // cell, merge, patch, width // cell, merge, patch)
        .permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
        .reshape(math.prod(grid), channels, temporal_patch * patch * patch)
        .to(torch.float32)
    )
    # 3. normalise: scale mean and std instead of the pixels, as the processor does, for bitwise equal results
    shift = (torch.tensor(mean, device=frames.device) * 255.0)[:, None]
    scale = (torch.tensor(std, device=frames.device) * 255.0)[:, None]
    return rows.sub_(shift).div_(scale).flatten(1), grid
