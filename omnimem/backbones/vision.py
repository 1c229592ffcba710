"""The vision encoders of transformers' Qwen models: frames of several segments in one pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from omnimem.media import Geometry, Segment


@final
@dataclass(frozen=True, kw_only=True)
class Look:
    """Visual tokens of a segment, and what the first decoder layers add to them, one tensor per layer."""

    tokens: Float[Tensor, "1 visual_tokens width"] | None = None
    grid: tuple[int, int, int] = (0, 0, 0)  # time, rows and columns of the tokens
    deepstack: tuple[Float[Tensor, "1 visual_tokens width"], ...] = ()


def look(model: Any, geometry: Geometry, block: Sequence[Segment], device: torch.device) -> list[Look]:
    """The frames of each segment after the vision encoder, which attends within a frame grid."""
    # 1. cut the frames into patches
    patched = [None if segment.frames is None else geometry.patches(segment.frames) for segment in block]
    present = [item for item in patched if item is not None]
    if not present:
        return [Look()] * len(block)
    # 2. encode all segments in one pass
    rows = torch.cat([row for row, _ in present]).to(device=device, dtype=model.dtype)
    grids = torch.tensor([grid for _, grid in present], device=device)
    output = model.get_video_features(rows, grids)
    # 3. split the tokens by segment; transformers 5.17 leaves deepstack features in one piece
    sizes, found = [len(each) for each in output.pooler_output], getattr(output, "deepstack_features", None) or ()
    levels = zip(*(each.split(sizes) if isinstance(each, Tensor) else each for each in found), strict=True)
    tokens, merge = iter(output.pooler_output), geometry.merge
    return [
        Look()
        if item is None
        else Look(
            tokens=next(tokens)[None],
            grid=(item[1][0], item[1][1] // merge, item[1][2] // merge),
            deepstack=tuple(level[None] for level in next(levels, ())),
        )
        for item in patched
    ]
