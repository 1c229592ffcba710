"""Slots of a layer, lending between modalities, and the groups of tokens that compete for slots."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Int, Int8
from torch import Tensor

from omnimem.tokens import EVICTABLE, Counts, Modality


@final
@dataclass(frozen=True, kw_only=True)
class LayerSlots:
    """How many audio and visual tokens one layer may keep after a chunk."""

    audio: int
    visual: int
    split: bool = True  # False: audio and visual compete for audio + visual slots
    lend: bool = True  # free slots of one modality go to the other one


@final
@dataclass(frozen=True, kw_only=True)
class Group:
    """Tokens that compete for the same slots; every stream of the batch has the same number."""

    member: Bool[Tensor, "batch tokens"]
    kept: int  # number of tokens, by hard selection
    size: int

    @property
    def contested(self) -> bool:
        """Whether some are kept and some evicted: otherwise there is no threshold."""
        return 0 < self.kept < self.size


def taken(available: dict[Modality, int], slots: LayerSlots) -> dict[Modality, int]:
    """Number of kept tokens of each modality, lending included.

    A modality exceeds its own slots only by what the other one cannot fill.
    """
    own = {Modality.AUDIO: slots.audio, Modality.VISUAL: slots.visual}
    kept = {kind: min(available[kind], own[kind]) for kind in EVICTABLE}
    if slots.lend:
        spare = sum(own.values()) - sum(kept.values())
        for kind in EVICTABLE:
            extra = min(spare, available[kind] - kept[kind])
            kept[kind] += extra
            spare -= extra
    return kept


def groups(modality: Int8[Tensor, "batch tokens"], slots: LayerSlots, counts: Counts | None = None) -> list[Group]:
    """The groups that compete: each modality by itself or, unsplit, both together; `counts` of them, where known."""
    if not slots.split and counts is not None:
        kept = min(counts.media, slots.audio + slots.visual)
        return [Group(member=modality > 0, kept=kept, size=counts.media)]
    if counts is None or counts.audio is None:
        available = {kind: int(kind.mask(modality[0]).sum()) for kind in Modality}
    else:
        available = {Modality.AUDIO: counts.audio, Modality.VISUAL: counts.media - counts.audio}
    if slots.split:
        staying = taken(available, slots)
        return [Group(member=kind.mask(modality), kept=staying[kind], size=available[kind]) for kind in EVICTABLE]
    size = sum(available[kind] for kind in EVICTABLE)
    kept = min(size, slots.audio + slots.visual)
    return [Group(member=modality > 0, kept=kept, size=size)]


def text_of(modality: Int8[Tensor, "batch tokens"], counts: Counts | None = None) -> Int[Tensor, "batch text"]:
    """Indices of the text tokens, and of padding, ascending."""
    if counts is not None and counts.text == 0:
        return torch.empty(len(modality), 0, dtype=torch.long, device=modality.device)
    text = modality <= 0
    size = int(text[0].sum()) if counts is None else counts.text
    return text.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :size]
