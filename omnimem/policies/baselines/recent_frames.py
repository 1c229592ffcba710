"""Recent-N frames: only the latest whole frames and their audio (SimpleStream, arXiv 2604.02317)."""

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from omnimem.budget import Budget
from omnimem.policies.base import Policy, Traits, slots_of_layer
from omnimem.policies.baselines.presets import Preset, allotted
from omnimem.scoring.topk import highest
from omnimem.selection import Softness
from omnimem.selection.layer_slots import groups, text_of
from omnimem.tokens import Modality, Tokens
from omnimem.view import LayerView


@final
@dataclass(frozen=True, kw_only=True)
class RecentFramesPolicy(Policy):
    """As many of the latest frames as fit the slots, each with the audio from its own time on."""

    frames: int | None  # at most this many; None: as many as fit

    @property
    def traits(self) -> Traits:
        """Frames are known by their number."""
        return Traits(needs_place=True)

    def keep(self, layer: int, view: LayerView, softness: Softness | None = None) -> Tokens:
        """The layer's memory after the chunk in `view`; selection has no gradient."""
        if self.budget is None:
            return view.pool
        kinds = view.modality
        index = [text_of(kinds)]
        for group in groups(kinds, slots_of_layer(self.budget, layer)):
            count = self._whole(view, group.member[0], group.kept)
            index.append(highest(view.order.float(), group.member, count))
        return view.pool.gather(torch.cat(index, dim=1).sort(dim=1).values)

    def _whole(self, view: LayerView, member: Tensor, slots: int) -> int:
        """How many of the latest members are whole frames; as many members as fit if no frame fits or exists."""
        visual = member & (view.modality[0] == Modality.VISUAL)
        if not bool(visual.any()):
            return slots
        times = view.pool.place[0, 0]
        starts = times[visual].unique().flip(0)[: self.frames]
        counts = [int((member & (times >= start)).sum()) for start in starts]
        return max((count for count in counts if count <= slots), default=slots)


@final
@dataclass(frozen=True, kw_only=True)
class RecentFramesOptions:
    """Perception without memory: every memory method should beat it.

    as_published  whole frames in one pool of audio and visual tokens; slots that no whole frame fits into stay empty,
                  so there may be fewer entries than with other methods. The source encodes the frames again; here
                  their keys and values were computed when older frames were still in memory.
    shared_split  whole frames in the visual slots and the latest audio in the audio slots of the budget's split
    The window of tokens that fills every slot is the policy `recency`.
    """

    name: Literal["recent_frames"] = "recent_frames"
    preset: Preset = "as_published"
    frames: int | None = None  # at most this many (best in the source: 4); None: as many as fit

    def __post_init__(self) -> None:
        if self.frames is not None and self.frames < 1:
            raise ValueError(f"policy.frames = {self.frames} must be at least 1")

    def build(self, budget: Budget | None) -> RecentFramesPolicy:
        """The policy at a budget; None: full memory."""
        return RecentFramesPolicy(name=self.name, budget=allotted(budget, self.preset), frames=self.frames)
