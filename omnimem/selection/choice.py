"""Selection: all text, the highest scores of each group, and the gates of softened selection."""

from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from omnimem.scoring.topk import highest
from omnimem.selection import gates
from omnimem.selection.layer_slots import Group, LayerSlots, groups, text_of
from omnimem.selection.softness import Softness
from omnimem.tokens import EVICTABLE, Counts


@final
@dataclass(frozen=True, kw_only=True)
class Selected:
    """Indices of the kept tokens, and the gates that pass gradient to their scores."""

    index: Int[Tensor, "batch kept"]  # ascending: the order of arrival is kept
    gate: Float[Tensor, "batch kept"] | None  # additive attention bias; None when selection is hard
    media: int  # how many of them are audio and visual tokens
    audio: int | None  # how many are audio tokens; None: both kinds competed for the same slots


def select(
    scores: Float[Tensor, "batch tokens"],
    modality: Int8[Tensor, "batch tokens"],
    slots: LayerSlots,
    softness: Softness | None = None,
    carried: Float[Tensor, "batch tokens"] | None = None,
    counts: Counts | None = None,
) -> Selected:
    """All text and the highest scores per modality (or of both together, unsplit); ties go to the most recent token.

    Every stream of the batch has the same number of tokens of each modality. In softened selection (docs/paper.md,
    "Softened selection") `carried` are the present gates of the tokens. Straight-through gates add up, as each eviction
    that a token survives has its own slope. A soft gate is computed again at every contested eviction, as hard
    selection ranks kept tokens again, so that a token near the threshold may recover and no token fades with the
    number of chunks. Where nothing is evicted, gates do not change. With the `counts` of the tokens, where they are
    known, nothing is asked of the device.
    """
    contestants = groups(modality, slots, counts)
    text = text_of(modality, counts)
    if softness is None:
        chosen = [highest(scores, group.member, group.kept) for group in contestants]
        index = torch.cat([text, *chosen], dim=1).sort(dim=1).values
        return Selected(index=index, gate=None, **_sizes(contestants, [part.shape[1] for part in chosen]))
    before = torch.zeros_like(scores) if carried is None else carried
    pairs = [(text, before.gather(1, text))]
    pairs += [_softened(scores, group, softness, before) for group in contestants]
    index, order = torch.cat([index for index, _ in pairs], dim=1).sort(dim=1)
    gate = torch.cat([gate for _, gate in pairs], dim=1).gather(1, order)
    return Selected(index=index, gate=gate, **_sizes(contestants, [part.shape[1] for part, _ in pairs[1:]]))


def _sizes(contestants: list[Group], kept: list[int]) -> dict[str, Any]:
    """How many audio and visual tokens are kept, and how many audio tokens: of the first of two groups."""
    return {"media": sum(kept), "audio": kept[0] if len(contestants) == len(EVICTABLE) else None}


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
