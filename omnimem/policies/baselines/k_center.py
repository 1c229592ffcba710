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
from omnimem.scoring.topk import highest
from omnimem.selection import LayerSlots
from omnimem.selection.layer_slots import groups
from omnimem.view import LayerView

PRESETS: dict[str, dict[str, Any]] = {"as_published": {"per_head": False}}


@final
@dataclass(frozen=True, kw_only=True)
class FarthestFirst(AbstractRanking):
    """K - i for the i-th token of farthest-first traversal, 0 for those not reached in K slots.

    Points are the normalised keys and values of all heads, concatenated. The traversal begins at the most recent token
    that competes; the next is the one whose nearest token so far is farthest away, the most recent of equals. One step
    per slot: K passes over the pool, so this is for comparisons, not for thousands of slots.
    """

    @torch.no_grad()
    def __call__(self, view: LayerView, slots: LayerSlots, depth: float) -> Float[Tensor, "batch tokens"]:
        both = torch.cat([F.normalize(part.float(), dim=-1) for part in (view.pool.keys, view.pool.values)], dim=-1)
        points = both.transpose(1, 2).flatten(2)
        scores = torch.zeros_like(points[..., 0])
        for group in groups(view.modality, slots):
            far = view.order.float()
            for step in range(group.kept):
                chosen = highest(far, group.member, 1)
                scores = scores.scatter(1, chosen, float(group.kept - step))
                center = points.gather(1, chosen[..., None].expand(-1, -1, points.shape[-1]))
                distance = (points - center).square().sum(dim=-1).scatter(1, chosen, -1.0)
                far = distance if step == 0 else torch.minimum(far, distance)
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
