"""Selection: all text, the highest scores of each group, and the gates of softened selection."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from omnimem.scoring.topk import highest
from omnimem.selection import gates
from omnimem.selection.layer_slots import Group, LayerSlots, groups, text_of
from omnimem.selection.softness import Softness


@final
@dataclass(frozen=True, kw_only=True)
class Selected:
    """Indices of the kept tokens, and the gates that pass gradient to their scores."""

    index: Int[Tensor, "batch kept"]  # ascending: the order of arrival is kept
    gate: Float[Tensor, "batch kept"] | None  # additive attention bias; None when selection is hard


def select(
    scores: Float[Tensor, "batch tokens"],
    modality: Int8[Tensor, "batch tokens"],
    slots: LayerSlots,
    softness: Softness | None = None,
    carried: Float[Tensor, "batch tokens"] | None = None,
) -> Selected:
    """All text and the highest scores per modality (or of both together, unsplit); ties go to the most recent token.

    Every stream of the batch has the same number of tokens of each modality. In softened selection (docs/paper.md,
    "Softened selection") `carried` are the present gates of the tokens. Straight-through gates add up, as each eviction
    that a token survives has its own slope. A soft gate is computed again at every contested eviction, as hard
    selection ranks kept tokens again, so that a token near the threshold may recover and no token fades with the
    number of chunks. Where nothing is evicted, gates do not change.
    """
    contestants = groups(modality, slots)
    text = text_of(modality)
    if softness is None:
        index = [text, *(highest(scores, group.member, group.kept) for group in contestants)]
        return Selected(index=torch.cat(index, dim=1).sort(dim=1).values, gate=None)
    before = torch.zeros_like(scores) if carried is None else carried
    pairs = [(text, before.gather(1, text))]
    pairs += [_softened(scores, group, softness, before) for group in contestants]
    index, order = torch.cat([index for index, _ in pairs], dim=1).sort(dim=1)
    return Selected(index=index, gate=torch.cat([gate for _, gate in pairs], dim=1).gather(1, order))


def _softened(scores: Tensor, group: Group, softness: Softness, before: Tensor) -> tuple[Tensor, Tensor]:
    """Kept tokens of a group, and their gates."""
    count = softness.stay(group.kept, group.size)
    ranked = highest(scores, group.member, max(count, group.kept + 1))
    index = ranked[:, :count]
    if not group.contested or softness.temperature == 0:
        return index, before.gather(1, index)
    if softness.form == "soft":
        return index, gates.soft(scores, group, ranked, softness.temperature)[:, :count]
    return index, before.gather(1, index) + gates.straight_through(scores, group, ranked, softness.temperature)
