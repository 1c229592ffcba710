"""Selection: exact counts under every room (hypothesis), ties by recency, and softened forms whose forward is hard."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference
from support.selection_cases import cases
from torch import Tensor

from omnimem.selection import LayerSlots, Softness, TemperatureOptions, select, taken
from omnimem.tokens import Modality

QUICK = settings(max_examples=120, deadline=None)
AUDIO, VISUAL = Modality.AUDIO, Modality.VISUAL
COUNT = st.integers(0, 30)


@given(case=cases())
@QUICK
def test_selection_equals_plain_loops(case) -> None:
    room = case.room
    index = select(case.scores, case.modality, room).index
    for stream in (0, 1):
        scores, kinds = case.scores[stream].tolist(), case.modality[stream].tolist()
        expected = reference.select(scores, kinds, room.audio, room.visual, split=room.split, lend=room.lend)
        assert index[stream].tolist() == expected


@given(case=cases())
@QUICK
def test_the_room_is_never_exceeded_text_always_stays_and_order_is_kept(case) -> None:
    index = select(case.scores, case.modality, case.room).index
    available = case.available()
    kinds = case.modality.gather(1, index)
    for stream in (0, 1):
        kept = {kind: int((kinds[stream] == kind).sum()) for kind in Modality}
        both = kept[AUDIO] + kept[VISUAL]
        assert kept[Modality.TEXT] == available[Modality.TEXT]
        assert both <= case.slots()
        if not case.room.split or case.room.lend:
            assert both == min(case.slots(), available[AUDIO] + available[VISUAL])
        assert index[stream].tolist() == sorted(set(index[stream].tolist()))


@given(audio=COUNT, visual=COUNT, audio_slots=COUNT, visual_slots=COUNT, lend=st.booleans())
@QUICK
def test_a_modality_exceeds_its_slots_only_by_free_slots(audio, visual, audio_slots, visual_slots, lend) -> None:
    room = LayerSlots(audio=audio_slots, visual=visual_slots, lend=lend)
    kept = taken({Modality.TEXT: 3, AUDIO: audio, VISUAL: visual}, room)
    assert (kept[AUDIO], kept[VISUAL]) == reference.shares(audio, visual, audio_slots, visual_slots, lend)
    spare = {AUDIO: max(0, visual_slots - visual), VISUAL: max(0, audio_slots - audio)} if lend else {}
    assert kept[AUDIO] <= min(audio, audio_slots + spare.get(AUDIO, 0))
    assert kept[VISUAL] <= min(visual, visual_slots + spare.get(VISUAL, 0))
    assert min(audio, audio_slots) <= kept[AUDIO]  # lending never takes a slot that its owner can fill
    assert min(visual, visual_slots) <= kept[VISUAL]


@given(case=cases(), temperature=st.sampled_from([0.0, 1e-4, 0.05, 1.0, 30.0]))
@QUICK
def test_straight_through_keeps_what_hard_selection_keeps_behind_gates_of_zero(case, temperature) -> None:
    hard = select(case.scores, case.modality, case.room)
    soft = select(case.scores.requires_grad_(), case.modality, case.room, Softness(temperature=temperature))
    assert hard.gate is None
    assert torch.equal(hard.index, soft.index)
    assert soft.gate is not None
    assert torch.equal(soft.gate, torch.zeros_like(soft.gate))


@given(
    scores=st.lists(st.integers(-300, 300).map(lambda n: n / 100), min_size=3, max_size=12, unique=True),
    room=st.integers(1, 11),
    temperature=st.sampled_from([0.05, 0.3, 1.0]),
)
@QUICK
def test_the_gradient_of_the_gate_equals_finite_differences(scores, room, temperature) -> None:
    count = min(room, len(scores) - 1)
    leaf = torch.tensor([scores], dtype=torch.float64).requires_grad_()
    kinds = torch.full((1, len(scores)), int(VISUAL), dtype=torch.int8)
    selected = select(leaf, kinds, LayerSlots(audio=0, visual=count), Softness(temperature=temperature))
    kept = selected.index[0].tolist()
    weights = torch.linspace(1, 2, count, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((selected.gate[0] * weights).sum(), leaf)
    expected = [0.0] * len(scores)
    for k, slope, weight in zip(kept, reference.gate_slopes(scores, kept, temperature), weights.tolist(), strict=True):
        expected[k] = slope * weight
    loops = torch.tensor([expected], dtype=torch.float64)
    torch.testing.assert_close(gradient, loops, rtol=1e-4, atol=1e-6 * max(1.0, float(loops.abs().max())))


def test_scores_are_standardised_within_their_modality() -> None:
    """Ten times the spread among the visual tokens leaves the audio tokens' gradient as it was."""
    audio, visual = torch.randn(2, 10, generator=torch.Generator().manual_seed(0))
    kinds = torch.tensor([[1] * 10 + [2] * 10], dtype=torch.int8)

    def slopes(spread: float) -> Tensor:
        leaf = torch.cat([audio, spread * visual])[None].requires_grad_()
        selected = select(leaf, kinds, LayerSlots(audio=4, visual=4), Softness(temperature=0.3))
        return torch.autograd.grad(selected.gate.sum(), leaf)[0]

    once, ten = slopes(1.0), slopes(10.0)
    torch.testing.assert_close(once[:, :10], ten[:, :10])
    torch.testing.assert_close(once[:, 10:], 10 * ten[:, 10:])


def test_text_and_pools_that_fit_carry_no_gradient() -> None:
    leaf = torch.randn(1, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    kinds = torch.tensor([[0, 0, 1, 1, 2, 2, 2, 2, 0]], dtype=torch.int8)
    selected = select(leaf, kinds, LayerSlots(audio=2, visual=2), Softness(temperature=1.0))
    (gradient,) = torch.autograd.grad(selected.gate.sum(), leaf)
    assert torch.equal(gradient[0, [0, 1, 2, 3, 8]], torch.zeros(5))
    assert int((gradient != 0).sum()) == 2


@given(case=cases())
@QUICK
def test_equal_scores_fall_to_the_most_recent(case) -> None:
    index = select(torch.zeros_like(case.scores), case.modality, case.room).index
    for stream in (0, 1):
        kinds = case.modality[stream]
        groups = [[AUDIO], [VISUAL]] if case.room.split else [[AUDIO, VISUAL]]
        for group in groups:
            members = [k for k in range(len(kinds)) if int(kinds[k]) in group]
            kept = [k for k in index[stream].tolist() if k in members]
            assert kept == members[len(members) - len(kept) :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [1e-6, 0.0, 1.0])
def test_a_pool_of_equal_scores_has_finite_gates_and_gradients(dtype, value) -> None:
    leaf = torch.full((1, 12), value, dtype=dtype).requires_grad_()
    kinds = torch.full((1, 12), 2, dtype=torch.int8)
    selected = select(leaf, kinds, LayerSlots(audio=0, visual=5), Softness(temperature=0.05))
    assert selected.index.tolist() == [list(range(7, 12))]
    (gradient,) = torch.autograd.grad(selected.gate.sum(), leaf)
    assert bool(selected.gate.isfinite().all())
    assert bool(gradient.isfinite().all())


def test_a_nan_ranks_last_where_topk_would_rank_it_first() -> None:
    scores = torch.tensor([[0.1, math.nan, 0.3, 0.2, math.nan, -5.0]])
    kinds = torch.full((1, 6), 2, dtype=torch.int8)
    assert int(scores.topk(1).indices) in (1, 4)
    assert select(scores, kinds, LayerSlots(audio=0, visual=4)).index.tolist() == [[0, 2, 3, 5]]


@pytest.mark.parametrize("softness", [None, Softness(temperature=0.0), Softness(temperature=1.0)])
def test_rooms_that_crash_the_release_are_served(softness) -> None:
    """Method 8.9: no audio token, an audio room of 0, text alone, and a batch of 2."""
    scores = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    text, visual = (torch.full((2, 6), kind, dtype=torch.int8) for kind in (0, 2))
    mixed = torch.tensor([[1, 2, 2, 1, 2, 0]] * 2, dtype=torch.int8)
    assert select(scores, visual, LayerSlots(audio=3, visual=2, lend=False), softness).index.shape == (2, 2)
    assert select(scores, visual, LayerSlots(audio=3, visual=2), softness).index.shape == (2, 5)
    assert select(scores, mixed, LayerSlots(audio=0, visual=2, lend=False), softness).index.shape == (2, 3)
    assert select(scores, text, LayerSlots(audio=1, visual=1), softness).index.tolist() == [list(range(6))] * 2
    assert select(scores[:, :0], text[:, :0], LayerSlots(audio=1, visual=1), softness).index.shape == (2, 0)


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.1), (1.0, 0.0), (-1.0, 0.1)])
def test_a_temperature_of_zero_or_below_is_refused(start, end) -> None:
    with pytest.raises(ValueError, match="must both be finite numbers above 0"):
        TemperatureOptions(start=start, end=end)
