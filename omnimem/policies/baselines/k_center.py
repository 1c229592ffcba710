"""k-center: keeps tokens that are far apart, so that every evicted one is near a kept one (Gonzalez 1985)."""

from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from omnimem.budget import Budget
from omnimem.policies.baselines.presets import Preset, allotted, part, settings
from omnimem.policies.baselines.ranked import AbstractRanking, RankedPolicy
from omnimem.selection import LayerSlots
from omnimem.selection.layer_slots import groups
from omnimem.view import LayerView

EQUAL = 1e-12  # squared distance below which two points are one
PRESETS: dict[str, dict[str, Any]] = {"as_published": {"per_head": False}}


@final
@dataclass(frozen=True, kw_only=True)
class FarthestFirst(AbstractRanking):
    """K - i for the i-th token of farthest-first traversal, 0 for those not reached in K slots.

    Points are the normalised keys and values of all heads, concatenated. The traversal begins at the most recent token
    that competes; the next is the one whose nearest token so far is farthest away, the most recent of equals. All
    distances are computed once, in float64 (8 tokens² bytes), then one step per slot looks up a row; points closer
    than 1e-6 are equal. For comparisons, not for thousands of slots.
    """

    @torch.no_grad()
    def __call__(self, view: LayerView, slots: LayerSlots, depth: float) -> Float[Tensor, "batch tokens"]:
        # 1. squared distances of all pairs
        both = torch.cat([F.normalize(part.float(), dim=-1) for part in (view.pool.keys, view.pool.values)], dim=-1)
        points = both.transpose(1, 2).flatten(2).double()
        products = points @ points.mT
        squares = products.diagonal(dim1=1, dim2=2)
        distances = squares[:, :, None] + squares[:, None, :] - 2 * products
        distances = distances.masked_fill(distances < EQUAL, 0.0).nan_to_num(nan=-0.5)  # after all others
        # 2. traverse each group
        scores = torch.zeros_like(points[..., 0], dtype=torch.float32)
        for group in groups(view.modality, slots):
            far = view.order.double().masked_fill(~group.member, float("-inf"))
            for step in range(group.kept):
                chosen = far.shape[1] - 1 - far.flip(1).argmax(dim=1, keepdim=True)  # the most recent of equals
                scores = scores.scatter(1, chosen, float(group.kept - step))
                row = distances.gather(1, chosen[..., None].expand(-1, -1, far.shape[1]))[:, 0]
                row = row.masked_fill(~group.member, float("-inf"))
                far = (row if step == 0 else torch.minimum(far, row)).scatter(1, chosen, -1.0)
        return scores


@final
@dataclass(frozen=True, kw_only=True)
class KCenterOptions:
    """Coverage without a score per token, as in coresets of a cache (CoRDS, arXiv 2605.14310).

    as_published  one set of tokens for all heads, of one pool of audio and visual tokens per layer
    shared_split  the same with the audio-visual split of the budget
    """

    name: Literal["k_center"] = "k_center"
    preset: Preset = "as_published"
    per_head: bool | None = None  # every key-value head keeps tokens of its own

    def build(self, budget: Budget | None) -> RankedPolicy:
        """The policy at a budget; None: full memory."""
        chosen = settings(self, PRESETS) | {"budget": allotted(budget, self.preset)}
        return part(RankedPolicy, {**chosen, "ranking": FarthestFirst()})
