"""Recursive uniform: keeps every n-th token of the cache, repeatedly (the `uniform` of InfiniPot-V's release)."""

from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from omnimem.budget import Budget
from omnimem.policies.baselines.presets import Preset, allotted
from omnimem.policies.baselines.ranked import AbstractRanking, RankedPolicy
from omnimem.selection import LayerSlots
from omnimem.selection.layer_slots import groups
from omnimem.view import LayerView


@final
@dataclass(frozen=True, kw_only=True)
class EveryNth(AbstractRanking):
    """1 for the tokens at indices floor(i N / K), i = 0 .. K - 1, of the N that compete for K slots; else 0."""

    def __call__(self, view: LayerView, slots: LayerSlots, depth: float) -> Float[Tensor, "batch tokens"]:
        scores = torch.zeros_like(view.order, dtype=torch.float32)
        for group in groups(view.modality, slots):
            if group.kept:
                chosen = torch.arange(group.kept, device=scores.device) * group.size // group.kept
                place = (group.member.cumsum(dim=1) - 1).where(group.member, torch.full_like(view.order, -1))
                scores += torch.isin(place, chosen)
        return scores


@final
@dataclass(frozen=True, kw_only=True)
class RecursiveUniformOptions:
    """For comparison: kept tokens are thinned again and again, so the past is forgotten exponentially.

    `uniform` is the form that does not depend on age, `input_uniform` the one that samples before the model reads.
    as_published  one pool of audio and visual tokens per layer
    shared_split  each modality separately, in the budget's audio-visual split
    """

    name: Literal["recursive_uniform"] = "recursive_uniform"
    preset: Preset = "as_published"

    def build(self, budget: Budget | None) -> RankedPolicy:
        """The policy at a budget; None: full memory."""
        return RankedPolicy(name=self.name, ranking=EveryNth(), budget=allotted(budget, self.preset))
