"""A layer over many chunks: the policy keeps, chunk by chunk, the very tokens that plain loops keep."""

import itertools
from dataclasses import replace

import pytest
import torch
from support import reference
from support.layer_views import LENGTHS, SCALE, arrivals, run, view_of, with_states

from omnimem import view
from omnimem.attention import blocked
from omnimem.budget import Budget
from omnimem.policies import ControlOptions, PerturbationOptions
from omnimem.policies.base import projection
from omnimem.selection import Softness
from omnimem.tokens import Modality
from omnimem.view import Measures

SLOTS = [(4, 9), (1, 3), (9, 4)]  # audio, visual; audio falls short of 9 until the last chunks


def run_by_loops(preset: str, chunks, stream: int, budget: Budget, of: str, sharpness: float):
    """Arrival numbers and carried scores by tests/reference.py after each chunk."""
    audio, visual = budget.layer(0)
    layer = reference.Layer(preset, audio, visual, split=budget.split, of=of, sharpness=sharpness)
    after = []
    for chunk in chunks:
        parts = (chunk.queries, chunk.keys, chunk.states, chunk.modality)
        layer.read(*(part[stream].tolist() for part in parts), SCALE)
        after.append((layer.order, layer.importance, layer.novelty))
    return after


@pytest.mark.parametrize("preset", ["paper", "released", "omnimem"])
@pytest.mark.parametrize("of", ["sequence", "modality"])
@pytest.mark.parametrize(("slots", "split"), [*((slots, True) for slots in SLOTS), ((0, 11), False)])
def test_kept_tokens_equal_plain_loops_chunk_by_chunk(preset, of, slots, split):
    chunks = arrivals(LENGTHS, batch=2, seed=sum(slots))
    options = PerturbationOptions(name=preset, of=of)
    budget = Budget(slots=(slots,), split=split)
    after = run(options.build(budget), chunks)
    for stream in (0, 1):
        by_loops = run_by_loops(preset, chunks, stream, budget, of, 0.02)
        for memory, (order, importance, novelty) in zip(after, by_loops, strict=True):
            assert memory.order[stream].tolist() == order
            for got, expected in ((memory.importance, importance), (memory.novelty, novelty)):
                loops = torch.tensor(expected, dtype=torch.float64)
                torch.testing.assert_close(got[stream].double(), loops, rtol=1e-4, atol=2e-6)
    assert not torch.equal(after[-1].order[0], after[-1].order[1])  # each stream of a batch keeps its own


@pytest.mark.parametrize("preset", ["paper", "released", "omnimem"])
def test_kept_tokens_equal_plain_loops_where_attention_decides(preset) -> None:
    """At the printed exponent of 0.02 attention hardly matters; at 1 an error in mass or carry cannot hide."""
    chunks = arrivals(LENGTHS, batch=2, seed=5)
    options = PerturbationOptions(name=preset, sharpness=1.0)
    budget = Budget(slots=((4, 9),))
    after = run(options.build(budget), chunks)
    similar = run(PerturbationOptions(name=preset, sharpness=0.0).build(budget), chunks)
    for stream in (0, 1):
        by_loops = run_by_loops(preset, chunks, stream, budget, "sequence", 1.0)
        assert [memory.order[stream].tolist() for memory in after] == [order for order, _, _ in by_loops]
    assert not torch.equal(after[-1].order, similar[-1].order)
    for temperature in (1.0, 0.05, 1e-4, 0.0):  # straight-through keeps what hard selection keeps
        for a, b in zip(after, run(options.build(budget), chunks, Softness(temperature=temperature)), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


def test_presets_keep_different_tokens() -> None:
    chunks = arrivals(LENGTHS, seed=5)
    kept = {}
    for preset in ("paper", "released", "omnimem"):
        options = PerturbationOptions(name=preset)
        kept[preset] = run(options.build(Budget(slots=((4, 9),))), chunks)[-1].order[0].tolist()
    assert all(a != b for a, b in itertools.combinations(kept.values(), 2))


def test_the_released_score_ranks_as_twice_the_printed_exponent() -> None:
    """Method 1.8: a^0.02 sqrt(1 - s) orders tokens as a^0.04 (1 - s) does."""
    chunks = arrivals(LENGTHS, seed=5)
    budget = Budget(slots=((4, 9),), lend=False)
    released = run(PerturbationOptions(name="released").build(budget), chunks)
    twice = run(PerturbationOptions(name="released", sharpness=0.04, novelty_power=1.0).build(budget), chunks)
    assert [memory.order.tolist() for memory in released] == [memory.order.tolist() for memory in twice]


def refuse(*args: object, **kwargs: object) -> None:
    """Stands in for what must not be called."""
    raise AssertionError("the content was looked at")


def test_lambda_zero_is_similarity_only_and_measures_no_attention(monkeypatch) -> None:
    chunks = arrivals(LENGTHS, seed=5)
    budget = Budget(slots=((4, 9),))
    monkeypatch.setattr(blocked, "mass", refuse)
    with pytest.raises(AssertionError, match="looked at"):
        run(PerturbationOptions(name="paper").build(budget), chunks)
    policy = PerturbationOptions(name="paper", sharpness=0.0).build(budget)
    view = view_of(chunks[0], policy.measures)
    assert torch.equal(policy.scorer(view), view.novelty)
    after = run(policy, chunks)
    by_loops = run_by_loops("paper", chunks, 0, budget, "sequence", 0.0)
    assert [memory.order[0].tolist() for memory in after] == [order for order, _, _ in by_loops]
    assert torch.equal(after[-1].importance, torch.zeros_like(after[-1].importance))


@pytest.mark.parametrize("preset", ["paper", "released", "omnimem"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stream_of_exact_duplicates_keeps_the_latest_and_no_nan(preset, dtype) -> None:
    """The release ranks NaN first (docs/paper.md, "Differences between paper and release"); here the latest stay."""
    chunks = [with_states(c, c.states[:, :1].expand_as(c.states).to(dtype)) for c in arrivals([18, 18], layout=(2,))]
    copy = chunks[0].states[:, :1]
    chunks = [with_states(c, copy.expand(-1, 18, -1)) for c in chunks]
    options = PerturbationOptions(name=preset, sharpness=0.0)
    after = run(options.build(Budget(slots=((1, 5),))), chunks)
    assert all(bool(tensor.isfinite().all()) for memory in after for tensor in memory.tensors())
    slots = 5 if preset == "released" else 6  # the audio slot is lent
    assert after[-1].order[0].tolist() == list(range(36 - slots, 36))


@pytest.mark.parametrize("preset", ["paper", "released", "omnimem"])
def test_a_copy_ranks_below_a_token_that_nothing_replaces(preset) -> None:
    """Theory: a token beside its copies can be replaced by them, one unlike its neighbours cannot."""
    (chunk,) = arrivals([9], layout=(2,))
    states = chunk.states[:, :1].repeat(1, 9, 1)
    states[:, 4] = torch.randn(12, generator=torch.Generator().manual_seed(1))
    policy = PerturbationOptions(name=preset).build(Budget(slots=((1, 8),)))
    scores = policy.scorer(view_of(with_states(chunk, states), policy.measures))[0]
    assert int(scores.argmax()) == 4
    copies = [k for k in range(9) if k not in (3, 4, 5)]
    assert float(scores[copies].max()) < 1e-2 * float(scores[4])


def test_copies_of_one_needle_are_redundant_in_the_pool_but_not_as_they_arrived() -> None:
    """Design 3: copies that became neighbours in the memory are judged redundant again only with `neighbours: pool`."""
    hay, needle = torch.eye(12)[:2]
    chunks = []
    for chunk in arrivals([4, 4, 4], layout=(2,)):
        states = hay.repeat(1, 4, 1) + 1e-3 * torch.randn(1, 4, 12, generator=torch.Generator().manual_seed(2))
        states[:, 1] = needle
        chunks.append(with_states(chunk, states))
    options = PerturbationOptions(name="omnimem", sharpness=0.0, coverage=0.0)
    memory = run(options.build(Budget(slots=((1, 2),), lend=False)), chunks)[1]
    assert memory.order[0].tolist() == [1, 5]
    pooled, frozen = (
        view_of(chunks[2], Measures(neighbours=neighbours), memory, fed=8) for neighbours in ("pool", "arrival")
    )
    assert float(pooled.novelty[0, 0]) < 1e-5
    assert float(frozen.novelty[0, :2].min()) > 0.9
    once = run(replace(options, coverage=0.5).build(Budget(slots=((1, 2),), lend=False)), chunks)
    assert [int((memory.order[0] % 4 == 1).sum()) for memory in once] == [1, 1, 1]  # of copies one stays, and only one


@pytest.mark.parametrize("name", ["random", "recency", "uniform"])
def test_controls_neither_measure_attention_nor_redundancy(name, monkeypatch) -> None:
    monkeypatch.setattr(blocked, "mass", refuse)
    monkeypatch.setattr(view, "similarity", refuse)
    after = run(ControlOptions(name=name).build(Budget(slots=((4, 9),))), arrivals(LENGTHS))
    assert int((after[-1].modality == Modality.VISUAL).sum()) == 9


@pytest.mark.parametrize("options", [PerturbationOptions(), ControlOptions(name="random")])
def test_full_memory_keeps_everything_unjudged(options) -> None:
    after = run(options.build(None), arrivals(LENGTHS))
    assert after[-1].order[0].tolist() == list(range(sum(LENGTHS)))
    assert torch.equal(after[-1].importance, torch.zeros(1, sum(LENGTHS)))
    limited = run(options.build(Budget.full(1)), arrivals(LENGTHS))[-1]  # a budget that the stream does not fill
    assert torch.equal(after[-1].order, limited.order)
    assert torch.equal(after[-1].keys, limited.keys)


def test_a_gate_keeps_the_gradient_of_every_eviction_it_survived() -> None:
    """Gates add up: the slope of a token kept twice is the sum of two single slopes."""
    chunks = arrivals([20, 20], layout=(2,))
    leaf = chunks[0].states.clone().requires_grad_()
    policy = PerturbationOptions(name="paper", sharpness=0.0).build(Budget(slots=((1, 9),), lend=False))
    after = run(policy, [with_states(chunks[0], leaf), chunks[1]], softness=Softness(temperature=1.0))
    survivors = [k for k in after[1].order[0].tolist() if k < 20]
    assert survivors
    first = {int(k): n for n, k in enumerate(after[0].order[0])}
    last = {int(k): n for n, k in enumerate(after[1].order[0])}

    def slope(gate: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(gate, leaf, retain_graph=True)[0]

    token = survivors[0]
    once, twice = slope(after[0].gate[0, first[token]]), slope(after[1].gate[0, last[token]])
    memory = after[0].gather(torch.arange(9)[None])
    detached = replace(memory, gate=memory.gate.detach())
    again = policy.keep(0, view_of(chunks[1], policy.measures, detached, fed=20), Softness(temperature=1.0))
    torch.testing.assert_close(twice, once + slope(again.gate[0, last[token]]))
    assert float(once.abs().max()) > 1e-3


def of_varied_steps(count: int, width: int) -> torch.Tensor:
    """States of which some repeat the one before nearly and others hardly: cosines spread over 0.05 to 1."""
    generator = torch.Generator().manual_seed(4)
    states = torch.randn(1, count, width, generator=generator)
    for k in range(1, count):
        alike = float(torch.rand((), generator=generator)) * 0.95 + 0.05
        states[:, k] = alike * states[:, k - 1] + (1 - alike**2) ** 0.5 * states[:, k]
    return states


@pytest.mark.parametrize(("preset", "share"), [("paper", 0.75), ("omnimem", 0.8)])
def test_a_random_projection_keeps_cosines_and_most_of_the_exact_selection(preset, share) -> None:
    """Johnson-Lindenstrauss: a cosine is off by (1 - cos^2) / sqrt(width) in the mean square; chance is 0.23."""
    width = 128
    chunks = arrivals([60] * 5, seed=4, layout=(2, 2, 2, 2, 1))
    states = of_varied_steps(300, 1024)
    projected = states @ projection(1024, width, dtype=torch.float32, device=torch.device("cpu"))
    cosines = [torch.nn.functional.cosine_similarity(t[0, :-1], t[0, 1:], dim=-1) for t in (states, projected)]
    theory = float(((1 - cosines[0] ** 2) ** 2).mean().sqrt()) / width**0.5
    assert float((cosines[0] - cosines[1]).pow(2).mean().sqrt()) == pytest.approx(theory, rel=0.2)
    policy = PerturbationOptions(name=preset).build(Budget(slots=((8, 60),)))
    kept = [
        set(run(policy, [with_states(c, part) for c, part in zip(chunks, parts, strict=True)])[-1].order[0].tolist())
        for parts in (states.split(60, dim=1), projected.split(60, dim=1))
    ]
    assert len(kept[0]) == len(kept[1]) == 68
    assert len(kept[0] & kept[1]) >= share * 68, f"{len(kept[0] & kept[1])} of 68"
