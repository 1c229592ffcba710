"""Pixels to patches: the numbers of Qwen2VLVideoProcessor without torchvision (tests/recorded/record.py proves it)."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import interpolate

MAX_ASPECT_RATIO = 200  # what the Qwen processors accept


def smart_resize(height: int, width: int, *, cell: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) nearest to the given one with both sides multiples of `cell` and the area within the pixel caps.

    Rounds half to even, scales by sqrt(area / cap) with floor above and ceil below, as Qwen2-VL does.
    `cell` is patch x merge pixels. Raises ValueError for an aspect ratio above 200.
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
    """Bicubic, antialiased, in uint8 arithmetic: torchvision's kernel, which is torch's own."""
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
    """Normalised patches for the vision encoder and their grid (time, height, width), in patches.

    Patches are ordered (time, row of cells, column of cells, row in the cell, column in the cell), a row holds
    (channel, frame in the patch, y, x). A frame count that is no multiple of `temporal_patch` repeats the last frame.
    Raises ValueError when the frame size is no multiple of patch x merge.
    """
    count, channels, height, width = frames.shape
    cell = patch * merge
    if height % cell or width % cell:
        raise ValueError(f"frames of {width}x{height} are no multiple of {cell} pixels; resize them by smart_resize")
    if missing := -count % temporal_patch:
        frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
    grid = (len(frames) // temporal_patch, height // patch, width // patch)
    rows = (
        frames.reshape(grid[0], temporal_patch, channels, height // cell, merge, patch, width // cell, merge, patch)
        .permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
        .reshape(math.prod(grid), channels, temporal_patch * patch * patch)
        .to(torch.float32)
    )
    # mean and std are scaled instead of the pixels, as the processor does: the order decides the last bit
    shift = (torch.tensor(mean, device=frames.device) * 255.0)[:, None]
    scale = (torch.tensor(std, device=frames.device) * 255.0)[:, None]
    return rows.sub_(shift).div_(scale).flatten(1), grid
