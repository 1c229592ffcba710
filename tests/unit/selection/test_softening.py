"""Soft selection: who stays and behind which gates, against plain loops, gradcheck and hard selection as the limit."""

import math
from dataclasses import dataclass, replace
from typing import Literal, final

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference
from support.layer_views import LENGTHS, SCALE, Arrival, arrivals, run, tokens_of, view_of, with_states
from support.selection_cases import cases
from torch import Tensor
from torch.autograd import gradcheck

from omnimem.attention.blocked import mass
from omnimem.budget import Budget
from omnimem.policies import ControlOptions, PerturbationOptions
from omnimem.policies.base import ScoredPolicy
from omnimem.scoring import AbstractScorer
from omnimem.selection import LayerSlots, SelectionOptions, Softness, TemperatureOptions, select
from omnimem.tokens import Modality
from omnimem.tuning import Plan, TuningOptions
from omnimem.view import LayerView, Measures

TEMPERATURES = st.sampled_from([0.02, 0.05, 0.1, 0.2, 1.0, 3.0])
VANISHING = 1e-6
SOME, FEW = settings(max_examples=60, deadline=None), settings(max_examples=25, deadline=None)
AUDIO, VISUAL = Modality.AUDIO, Modality.VISUAL


def soft(temperature: float, gradient: str = "redundancy") -> Softness:
    return Softness(temperature=temperature, form="soft", gradient=gradient)


def visual_pool(scores: list[float] | Tensor) -> tuple[Tensor, Tensor]:
    """Scores in float64 of one stream, and their modality."""
    row = torch.as_tensor(scores, dtype=torch.float64)[None].clone()
    return row.requires_grad_(), torch.full(row.shape, int(VISUAL), dtype=torch.int8)


@given(case=cases(), temperature=TEMPERATURES, seed=st.integers(0, 9))
@SOME
def test_who_stays_and_every_gate_equal_plain_loops(case, temperature, seed) -> None:
    scores, room = case.scores.double(), case.room
    carried = -torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    selected = select(scores, case.modality, room, soft(temperature), carried)
    for stream in (0, 1):
        row, kinds, past = (part[stream].tolist() for part in (scores, case.modality, carried))
        slots = {"split": room.split, "lend": room.lend}
        expected = reference.soft_select(row, kinds, room.audio, room.visual, temperature, past, **slots)
        assert selected.index[stream].tolist() == list(expected)
        assert selected.gate[stream].tolist() == pytest.approx(list(expected.values()), rel=1e-9, abs=1e-9)


@given(case=cases(), temperature=TEMPERATURES)
@SOME
def test_what_hard_selection_keeps_stays_and_a_pool_holds_at_most_three_times_as_much(case, temperature) -> None:
    hard = select(case.scores, case.modality, case.room).index
    selected = select(case.scores, case.modality, case.room, soft(temperature))
    for stream in (0, 1):
        kinds = case.modality[stream]
        stays, kept = (set(index[stream].tolist()) for index in (selected.index, hard))
        assert kept <= stays
        for group in ([AUDIO], [VISUAL]) if case.room.split else ([AUDIO, VISUAL],):
            members = {k for k in range(len(kinds)) if int(kinds[k]) in group}
            assert len(stays & members) <= min(3 * len(kept & members), len(members))


@given(case=cases())
@SOME
def test_at_a_vanishing_temperature_it_is_hard_selection_ties_included(case) -> None:
    hard = select(case.scores, case.modality, case.room)
    selected = select(case.scores, case.modality, case.room, soft(VANISHING))
    assert torch.equal(selected.index, hard.index)
    assert float(selected.gate.abs().sum()) < 1e-30


@given(case=cases(), temperature=st.sampled_from([0.2, 1.0, 30.0]))
@SOME
def test_gates_decrease_with_scores_and_are_above_one_half_for_kept_tokens(case, temperature) -> None:
    hard = select(case.scores, case.modality, case.room).index
    selected = select(case.scores, case.modality, case.room, soft(temperature))
    for stream in (0, 1):
        rows = list(zip(selected.index[stream].tolist(), selected.gate[stream].tolist(), strict=True))
        inside = hard[stream].tolist()
        for k, gate in rows:
            assert (gate > math.log(0.5)) if k in inside else (gate < math.log(0.5))
            assert gate <= 0
        for kind in (AUDIO, VISUAL):
            of_kind = [(k, gate) for k, gate in rows if int(case.modality[stream, k]) == kind]
            mine = [(float(case.scores[stream, k]), gate) for k, gate in of_kind]
            if case.room.split:
                assert [gate for _, gate in sorted(mine)] == sorted(gate for _, gate in mine)


def test_where_nothing_has_to_go_gates_stay_as_they_were() -> None:
    scores, modality = visual_pool([3.0, 1.0, 2.0])
    carried = torch.tensor([[-0.3, 0.0, -0.1]], dtype=torch.float64)
    selected = select(scores, modality, LayerSlots(audio=4, visual=3, lend=False), soft(1.0), carried)
    assert selected.index.tolist() == [[0, 1, 2]]
    assert torch.equal(selected.gate, carried)
    empty = select(scores, modality, LayerSlots(audio=4, visual=0, lend=False), soft(1.0), carried)
    assert empty.index.shape == empty.gate.shape == (1, 0)


def test_surplus_shrinks_with_the_temperature_and_is_known_before() -> None:
    scores, modality = visual_pool(torch.randn(100, generator=torch.Generator().manual_seed(0)))
    counts = {
        T: select(scores, modality, LayerSlots(audio=0, visual=10), soft(T)).index.shape[1]
        for T in (5.0, 0.2, 0.1, 0.05, 0.011, 0.009, 1e-6)
    }
    assert counts == {5.0: 30, 0.2: 30, 0.1: 20, 0.05: 15, 0.011: 11, 0.009: 10, 1e-6: 10}
    assert SelectionOptions(softening="soft").most(10) == 30
    assert SelectionOptions(softening="soft", temperature=TemperatureOptions(start=0.1, end=0.05)).most(10) == 20
    assert SelectionOptions(softening="hard").most(10) == SelectionOptions().most(10) == 10


def test_what_the_surplus_leaves_out_weighs_under_three_thousandths_where_scores_are_bell_shaped() -> None:
    """The reason for T = 0.2: one in five stays of 5,000 normal scores."""
    scores, modality = visual_pool(torch.randn(5000, generator=torch.Generator().manual_seed(0)))
    for temperature in (0.02, 0.05, 0.1):
        gates = select(scores, modality, LayerSlots(audio=0, visual=1000), soft(temperature)).gate.detach()
        assert math.log(1e-5) < float(gates.min()) < math.log(3e-3), temperature


SCORES = st.lists(st.integers(-300, 300).map(lambda n: n / 100), min_size=4, max_size=10, unique=True)


@given(scores=SCORES, kept=st.integers(1, 9), temperature=st.sampled_from([0.1, 0.3, 1.0]))
@FEW
def test_gradcheck_of_soft_gates_threshold_and_deviation_included(scores, kept, temperature) -> None:
    row, modality = visual_pool(scores)
    room = LayerSlots(audio=0, visual=min(kept, len(scores) - 1))
    assert gradcheck(lambda s: select(s, modality, room, soft(temperature)).gate, (row,), eps=1e-7, atol=1e-4)


@given(scores=SCORES, kept=st.integers(1, 9), temperature=st.sampled_from([0.1, 0.3, 1.0]))
@FEW
def test_what_all_scores_have_in_common_moves_no_soft_gate(scores, kept, temperature) -> None:
    """Selection knows neither shift nor scale of the scores; nor does its gradient."""
    row, modality = visual_pool(scores)
    gate = select(row, modality, LayerSlots(audio=0, visual=min(kept, len(scores) - 1)), soft(temperature)).gate
    (slope,) = torch.autograd.grad((gate * torch.arange(1.0, gate.shape[1] + 1)).sum(), row)
    size = float(slope.abs().max()) + 1e-9
    assert abs(float(slope.sum())) <= 1e-9 * size * len(scores)
    assert abs(float((slope * row.detach()).sum())) <= 1e-7 * size * len(scores)


@given(scores=SCORES, kept=st.integers(1, 9), temperature=st.sampled_from([0.1, 0.3, 1.0]))
@FEW
def test_gradcheck_of_straight_through_s_surrogate(scores, kept, temperature) -> None:
    """The gate is 0 whatever the scores; its gradient is that of log(1 + g - g0) with threshold and spread fixed."""
    row, modality = visual_pool(scores)
    room = LayerSlots(audio=0, visual=min(kept, len(scores) - 1))
    hard, fixed = select(row, modality, room).index, row.detach().clone()  # gradcheck moves the row in place
    dropped = torch.ones_like(fixed, dtype=torch.bool).scatter(1, hard, False)
    tau = (fixed.gather(1, hard).min() + fixed[dropped].max()) / 2

    def g(score: Tensor) -> Tensor:
        return torch.sigmoid((score.gather(1, hard) - tau) / fixed.std(unbiased=False) / temperature)

    def surrogate(score: Tensor) -> Tensor:
        return torch.log1p(g(score) - g(fixed))

    assert gradcheck(surrogate, (row,), eps=1e-7, atol=1e-4)
    softened = Softness(temperature=temperature)
    jacobians = [
        torch.autograd.functional.jacobian(function, fixed)
        for function in (surrogate, lambda s: select(s, modality, room, softened).gate)
    ]
    torch.testing.assert_close(*jacobians, rtol=1e-12, atol=1e-15)


def heads(kv_heads: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of 4 heads and 3 positions, keys of 5, and a gate; float64, of two streams."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 4, 3, 4), (2, kv_heads, 5, 4), (2, 5)]
    queries, keys, gate = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    return queries.requires_grad_(), keys.requires_grad_(), gate.requires_grad_()


@pytest.mark.parametrize("of", ["sequence", "modality"])
@pytest.mark.parametrize("ends", ["present", "one"])
@pytest.mark.parametrize("neighbours", ["pool", "arrival"])
def test_gradcheck_of_novelty(of, ends, neighbours) -> None:
    first, second = arrivals([3, 4], width=5)
    memory, measures = tokens_of(first), Measures(of=of, ends=ends, neighbours=neighbours)

    def novelty(old: Tensor, carried: Tensor, new: Tensor) -> Tensor:
        past = replace(memory, feature=old, novelty=carried)
        return view_of(with_states(second, new), measures, past, fed=3).novelty

    carried = torch.rand(1, 3, dtype=torch.float64)
    leaves = [t.double().requires_grad_() for t in (first.states, carried, second.states)]
    assert gradcheck(novelty, leaves)


@pytest.mark.parametrize("preset", ["omnimem", "paper", "released"])
def test_gradcheck_of_a_score_through_attention_and_redundancy_together(preset) -> None:
    policy = PerturbationOptions(name=preset, sharpness=0.5).build(Budget(slots=((2, 4),)))
    (arrival,) = arrivals([6], width=4)

    def score(queries: Tensor, keys: Tensor, states: Tensor) -> Tensor:
        moved = replace(arrival, queries=queries, keys=keys, states=states)
        return policy.scorer(view_of(moved, policy.measures, gradient="both"))

    assert gradcheck(score, [t.double().requires_grad_() for t in (arrival.queries, arrival.keys, arrival.states)])


def by_loops(preset: str, chunks, stream: int, budget: Budget, temperature: float):
    """Arrival numbers and gates by tests/reference.py after each chunk."""
    audio, visual = budget.layer(0)
    layer = reference.SoftLayer(preset, audio, visual, split=budget.split, temperature=temperature)
    after = []
    for chunk in chunks:
        parts = (chunk.queries, chunk.keys, chunk.states, chunk.modality)
        layer.read(*(part[stream].tolist() for part in parts), SCALE)
        after.append((layer.order, layer.gates))
    return after


@pytest.mark.parametrize("preset", ["omnimem", "paper", "released"])
@pytest.mark.parametrize(("slots", "split"), [((4, 9), True), ((9, 4), True), ((0, 11), False)])
@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_memory_and_gates_equal_plain_loops_chunk_by_chunk(preset, slots, split, temperature) -> None:
    """Attention mass through the gates, neighbours among what stayed, lending: with all that the past left."""
    chunks, budget = arrivals(LENGTHS, batch=2, seed=sum(slots)), Budget(slots=(slots,), split=split)
    chunks = [doubled(chunk) for chunk in chunks]
    after = run(PerturbationOptions(name=preset).build(budget), chunks, soft(temperature))
    for stream in (0, 1):
        for memory, (order, gates) in zip(after, by_loops(preset, chunks, stream, budget, temperature), strict=True):
            assert memory.order[stream].tolist() == order
            assert memory.gate[stream].tolist() == pytest.approx(gates, rel=1e-6, abs=1e-6)
    assert any(len(memory.order[0]) > sum(slots) for memory in after)


def doubled(arrival: Arrival) -> Arrival:
    """The chunk in float64: plain loops and tensors then rank alike."""
    return replace(arrival, **{name: getattr(arrival, name).double() for name in ("queries", "keys", "states")})


@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=6),
    layout=st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=7),
    audio=st.integers(1, 9),
    visual=st.integers(1, 9),
    shared=st.tuples(st.booleans(), st.booleans()),
    temperature=st.sampled_from([0.05, 0.1, 1.0]),
)
@FEW
def test_soft_selection_holds_one_to_three_times_as_much(lengths, layout, audio, visual, shared, temperature) -> None:
    """Lending too: what soft selection counts as kept is what hard selection keeps, after any past."""
    chunks, (lend, split) = arrivals(lengths, layout=tuple(layout)), shared
    policy = PerturbationOptions().build(Budget(slots=((audio, visual),), lend=lend, split=split))
    softness = soft(temperature)
    for hard, softly in zip(run(policy, chunks), run(policy, chunks, softness), strict=True):
        for group in ([Modality.TEXT], [AUDIO], [VISUAL]) if split else ([Modality.TEXT], [AUDIO, VISUAL]):
            kept, stays = (sum(int((memory.modality[0] == kind).sum()) for kind in group) for memory in (hard, softly))
            assert kept <= stays <= (kept if group == [Modality.TEXT] else softness.stay(kept, 3 * kept))
            evicted = softly.gate[0, torch.isin(softly.modality[0], torch.tensor(group))] < math.log(0.5)
            assert int(evicted.sum()) == stays - kept


@final
@dataclass(frozen=True, kw_only=True)
class Scripted(AbstractScorer):
    """Scores written down: those of the arrival numbers at each chunk; 0 for any other."""

    chunks: list[dict[int, float]]
    length: int

    def __call__(self, view: LayerView) -> Tensor:
        script = self.chunks[int(view.order.max()) // self.length]
        return torch.tensor([[script.get(k, 0.0) for k in row] for row in view.order.tolist()])


def test_a_token_near_the_threshold_may_come_back_and_one_that_hard_selection_dropped_may_not() -> None:
    chunks = arrivals([6, 6], layout=(2,))
    script = [{0: 5.0, 1: 4.0, 2: 3.0}, {0: 1.0, 1: 4.0, 2: 6.0}]
    budget = Budget(slots=((0, 2),), split=False)
    policy = ScoredPolicy(name="scripted", scorer=Scripted(chunks=script, length=6), budget=budget)
    gates = [dict(zip(m.order[0].tolist(), m.gate[0].tolist(), strict=True)) for m in run(policy, chunks, soft(0.05))]
    assert list(gates[0]) == [0, 1, 2]
    assert gates[0][2] < math.log(0.5) < gates[0][1] < gates[0][0]
    assert list(gates[1]) == [0, 1, 2]
    assert gates[1][0] < math.log(0.5) < gates[1][1] < gates[1][2]
    hard = [memory.order[0].tolist() for memory in run(policy, chunks)]
    assert hard == [[0, 1], [0, 1]]
    assert [memory.order[0].tolist() for memory in run(policy, chunks, soft(VANISHING))] == hard


def test_gates_do_not_fade_with_the_number_of_chunks() -> None:
    """Recency: from the second chunk on every pool is the same but for its numbers, and so are the gates."""
    chunks = arrivals([6] * 8, layout=(2,))
    policy = ControlOptions(name="recency").build(Budget(slots=((0, 2),), split=False))
    after = run(policy, chunks, soft(1.0))
    for number, memory in enumerate(after):
        assert torch.equal(memory.order, 6 * number + torch.arange(6)[None])
    for memory in after[2:]:
        torch.testing.assert_close(memory.gate, after[1].gate, rtol=1e-5, atol=1e-6)
    assert float(after[1].gate.detach().min()) < math.log(0.5)


def test_attention_mass_saves_its_inputs_and_nothing_of_queries_times_keys() -> None:
    queries, keys, gate = heads(2)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        mass(queries, keys, scale=0.7, gate=gate)
    assert {tensor.data_ptr() for tensor in saved} == {tensor.data_ptr() for tensor in (queries, keys, gate)}


@pytest.mark.parametrize("mean", ["probabilities", "logits"])
def test_attention_mass_is_exact_under_autocast_forward_and_backward(mean) -> None:
    """So that training in mixed precision selects what evaluation selects."""
    queries, keys, gate = (t.detach().float().requires_grad_() for t in heads(2))
    found = []
    for mixed in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            received = mass(queries, keys, scale=0.7, gate=gate, heads=mean)
            found.append((received, *torch.autograd.grad((received * torch.arange(5)).sum(), (queries, keys, gate))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


CLOSED = {
    "constant": (0.8, 0.8, 0.8, 0.8, 0.8),
    "linear": (0.8, 0.8 - 0.7 / 4, 0.8 - 0.7 / 2, 0.8 - 0.7 * 3 / 4, 0.1),
    "cosine": tuple(0.1 + 0.7 * (1 + math.cos(math.pi * done)) / 2 for done in (0, 0.25, 0.5, 0.75, 1)),
}


@pytest.mark.parametrize("schedule", CLOSED)
@pytest.mark.parametrize("softening", ["straight_through", "soft"])
def test_temperatures_follow_their_closed_form_from_the_first_step_to_the_last(schedule, softening) -> None:
    """Five of 101 steps. A resumed run asks for the steps that are left, so it goes on where it was."""
    temperature = TemperatureOptions(start=0.8, end=0.1, schedule=schedule)
    selection = SelectionOptions(softening=softening, temperature=temperature, gradient="both")
    plan = plan_of(selection)
    found = [plan(step, 101).softness for step in (0, 25, 50, 75, 100)]
    assert [each.temperature for each in found] == pytest.approx(CLOSED[schedule], rel=1e-12)
    assert {(each.form, each.gradient) for each in found} == {(softening, "both")}
    whole = [plan(step, 101) for step in range(101)]
    resumed = [plan_of(selection)(step, 101) for step in range(60, 101)]
    assert resumed == whole[60:]


def plan_of(selection: SelectionOptions, *budgets: int | Literal["full"]) -> Plan:
    return Plan(options=TuningOptions(selection=selection, budgets=budgets), slots_per_layer=8, chunk_tokens=64, seed=0)


def test_hard_selection_and_full_memory_have_no_softness() -> None:
    assert plan_of(SelectionOptions(softening="hard"))(3, 10).softness is None
    steps = [plan_of(SelectionOptions(softening="soft"), 8, "full")(step, 10) for step in range(10)]
    assert {(step.slots is None) == (step.softness is None) for step in steps} == {True}
    assert any(step.slots is None for step in steps)
