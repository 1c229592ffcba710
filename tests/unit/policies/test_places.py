"""Frame, row and column of tokens: carried where a policy reads them, and not elsewhere."""

from dataclasses import dataclass
from typing import final

import pytest
import torch
from support.models import text_model
from support.policy_streams import OPTIONS, SPLIT, cut, opened, whole_stream

from omnimem.policies import PerturbationOptions
from omnimem.policies.base import ScoredPolicy
from omnimem.scoring import AbstractScorer, Covered
from omnimem.streaming.attach import attach
from omnimem.streaming.stream import Stream
from omnimem.tokens import Modality
from omnimem.view import LayerView

READERS = {"infinipot_v", "recent_frames", "streammem"}


@final
@dataclass(frozen=True, kw_only=True)
class LowestRow(AbstractScorer):
    """A score of a third party: minus the row of a token."""

    @property
    def needs_place(self) -> bool:
        return True

    def __call__(self, view: LayerView) -> torch.Tensor:
        return 1 / (2.0 + view.pool.place[:, 1])


def fed(policy) -> Stream:
    with attach(text_model("qwen2_5_omni")) as attached, torch.no_grad():
        stream = opened(attached, policy)
        for chunk in cut(whole_stream()):
            stream.feed(chunk)
    return stream


@pytest.mark.parametrize(
    "name", sorted(name for name in OPTIONS if name not in ("oracle", "input_uniform", "input_uniform_split"))
)
def test_numbers_of_32_bits_are_carried_and_places_only_where_they_are_read(name) -> None:
    policy = OPTIONS[name].build(SPLIT)
    for layer in fed(policy).memory.layers:
        assert (layer.positions.dtype, layer.order.dtype, layer.group.dtype) == (torch.int32,) * 3, name
        assert layer.place.dtype == torch.int32
        assert layer.place.shape[1] == (3 if policy.traits.needs_place else 0)
    assert policy.traits.needs_place <= (OPTIONS[name].name in READERS)


@pytest.mark.parametrize("discounted", [False, True])
def test_a_score_of_a_third_party_reads_places_that_it_asks_for(discounted) -> None:
    scorer = Covered(inner=LowestRow(), compared="values") if discounted else LowestRow()
    stream = fed(ScoredPolicy(name="lowest_row", scorer=scorer, budget=SPLIT))
    kept = stream.memory.layers[0]
    assert kept.place.shape[1] == 3
    if not discounted:
        whole = whole_stream()
        rows = whole.places[0, 1][whole.modality[0] == Modality.VISUAL]
        found = kept.place[0, 1][kept.modality[0] == Modality.VISUAL]
        assert sorted(found.tolist()) == sorted(rows.tolist())[: len(found)]
    assert fed(PerturbationOptions().build(SPLIT)).memory.layers[0].place.numel() == 0
