"""Scores against plain loops, and controls against what they claim: a window, an unbiased draw, an even spread."""

import math
from dataclasses import dataclass, fields, replace
from typing import final

import pytest
import torch
from support import reference
from support.layer_views import Arrival, arrivals, view_of
from torch import Tensor

from omnimem.budget import Budget
from omnimem.memory import Memory, Shape
from omnimem.policies import ControlOptions
from omnimem.policies.base import sketch
from omnimem.scoring import AbstractScorer, Covered, KeyDifference, Perturbation, Random, Recency, Uniform, covered
from omnimem.scoring.hashing import uniform_of
from omnimem.selection import LayerSlots, groups, select
from omnimem.sketches import encoded
from omnimem.tokens import ABSENT, Counts, Modality, Tokens
from omnimem.view import FLOOR, Contest, LayerView, Measures, ScoreGradient

TINY = (2,) * 16 + (1,) * 2  # the tiny checkpoint's layout: 16 cells and 2 seconds of sound every 2 seconds
OMNI = (2,) * 225 + (1,) * 50  # Qwen2.5-Omni at 420 x 420
SHAPE = Shape(layers=1, kv_heads=1, dim=1, width=1, feature=0, dtype=torch.float32, device=torch.device("cpu"))

DISTINCT = Covered(inner=KeyDifference(), compared="values")


def bare(layout: tuple[int, ...], first: int, count: int, batch: int = 1) -> Tokens:
    """Tokens `first` to `first + count` of a stream that repeats `layout`, without contents."""
    order = torch.arange(first, first + count).expand(batch, count)
    zeros = torch.zeros(batch, count)
    return Tokens(
        keys=zeros[:, None, :, None],
        values=zeros[:, None, :, None],
        positions=order[:, None].expand(batch, 3, count),
        place=order[:, None].expand(batch, 3, count)[:, :0].int(),
        group=order.int(),
        modality=torch.tensor(layout, dtype=torch.int8)[order % len(layout)],
        order=order,
        importance=zeros,
        novelty=zeros,
        feature=zeros[..., :0][..., None].reshape(batch, count, 0),
        gate=zeros,
        states=zeros[..., None][..., :0],
        owner=torch.zeros(batch, 0, count, dtype=torch.int8),
    )


def streamed(name: str, layout: tuple[int, ...], count: int, slots: tuple[int, int], seed: int = 0, chunk: int = 90):
    """What the control keeps of a stream of `count` tokens fed in chunks, one memory a chunk."""
    policy = ControlOptions(name=name, seed=seed).build(Budget(slots=(slots,), lend=False))
    memory, after = Memory.empty(SHAPE, 1).layers[0], []
    for first in range(0, count, chunk):
        fresh = bare(layout, first, min(chunk, count - first))
        pool = memory.cat(fresh)
        queries = torch.zeros(1, 1, fresh.count, 1)
        memory = policy.keep(0, LayerView(pool=pool, new=fresh.count, queries=queries, scale=1.0, measures=Measures()))
        after.append(memory)
    return after


def kept(memory: Tokens, kind: Modality) -> list[int]:
    """Arrival numbers of one modality, ascending."""
    return memory.order[0][memory.modality[0] == kind].tolist()


@pytest.mark.parametrize("sharpness", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_psi_equals_plain_loops(sharpness, power) -> None:
    (arrival,) = arrivals([20], batch=2)
    view = view_of(arrival)
    scores = Perturbation(sharpness=sharpness, novelty_power=power)(view)
    expected = [
        [reference.psi(float(a), float(n), sharpness, power) for a, n in zip(*row, strict=True)]
        for row in zip(view.importance, view.novelty, strict=True)
    ]
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-7)


SCORERS = [Recency(), Random(seed=3), Uniform(), Perturbation(), Covered(inner=Perturbation()), DISTINCT]


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_stream_s_scores_do_not_depend_on_the_batch_it_shares(scorer):
    (arrival,) = arrivals([40], batch=3)
    together = scorer(view_of(arrival))
    for b in range(3):
        one = Arrival(**{field.name: getattr(arrival, field.name)[b : b + 1] for field in fields(Arrival)})
        torch.testing.assert_close(scorer(view_of(one)), together[b : b + 1], rtol=1e-6, atol=0)


def test_recency_is_a_window_of_each_modality() -> None:
    for number, memory in enumerate(streamed("recency", TINY, 900, (7, 40))):
        arrived = range(min(900, 90 * (number + 1)))
        for kind, slots in ((Modality.AUDIO, 7), (Modality.VISUAL, 40)):
            assert kept(memory, kind) == [k for k in arrived if TINY[k % 18] == kind][-slots:]


@pytest.mark.parametrize("name", ["random", "uniform"])
def test_what_stays_does_not_depend_on_where_the_stream_was_cut(name) -> None:
    ends = [streamed(name, TINY, 900, (7, 40), chunk=chunk)[-1].order.tolist() for chunk in (5, 90, 450, 900)]
    assert all(end == ends[0] for end in ends)


def test_random_is_repeatable_and_another_seed_is_another_draw() -> None:
    draws = [streamed("random", TINY, 900, (7, 40), seed=seed)[-1].order.tolist() for seed in (5, 5, 6)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


@pytest.mark.parametrize("seed", [0, -1, 2**31, 2**40])
def test_random_numbers_are_uniform_and_independent_for_any_seed(seed) -> None:
    """10,000 draws: chi-squared over 20 bins below the 99.99 % point, neighbours uncorrelated to 4 deviations."""
    draws = uniform_of(torch.arange(10_000), seed)
    assert float(draws.min()) >= 0
    assert float(draws.max()) < 1
    counts = torch.histc(draws, bins=20, min=0, max=1)
    assert float(((counts - 500) ** 2 / 500).sum()) < 50.8
    for lag in (1, 2, 18):
        correlation = float(torch.corrcoef(torch.stack([draws[:-lag], draws[lag:]]))[0, 1])
        assert abs(correlation) < 4 / math.sqrt(10_000)


def test_random_keeps_old_tokens_as_often_as_new_ones() -> None:
    """60 seeds, 72 of 360 tokens kept after 6 evictions: each tenth of the stream holds a tenth to 4 deviations."""
    tenths = torch.zeros(10)
    for seed in range(60):
        memory = streamed("random", (2,), 360, (1, 72), seed=seed, chunk=60)[-1]
        tenths += torch.histc(memory.order.float(), bins=10, min=0, max=360)
    expected = 60 * 72 / 10
    deviation = math.sqrt(expected * 0.9)  # without replacement it is smaller still
    assert float((tenths - expected).abs().max()) < 4 * deviation, tenths.tolist()


@pytest.mark.parametrize("layout", [TINY, OMNI, (2,) * 16, (2, 2, 2, 2, 1, 0)])
def test_uniform_is_spread_evenly_at_every_length(layout) -> None:
    """No gap is over 5 times the mean one, in either modality, ends of the stream included; a random draw's is 8."""
    repeats = 200
    number = torch.arange(len(layout) * repeats)
    kinds = torch.tensor(layout * repeats)
    scores = Uniform()(LayerView(**_view(bare(layout, 0, len(number)))))[0]
    for kind in sorted({*layout} - {0}):
        for length in (repeats // 5, repeats // 2, repeats):
            of_kind = number[: length * len(layout)][kinds[: length * len(layout)] == kind]
            for share in (0.1, 0.25, 0.4, 0.5, 0.75):
                slots = int(share * len(of_kind))
                chosen = scores[of_kind].argsort(descending=True)[:slots].sort().values
                places = torch.cat([torch.tensor([-1]), chosen, torch.tensor([len(of_kind)])])
                assert int(places.diff().max()) <= 5 * len(of_kind) / slots, (kind, length, share)


def _view(pool: Tokens) -> dict[str, object]:
    queries = torch.zeros(1, 1, pool.count, 1)
    return {"pool": pool, "new": pool.count, "queries": queries, "scale": 1.0, "measures": Measures()}


@pytest.mark.parametrize("layout", [TINY, (2,) * 16, (2,) * 16 + (1,) * 4, OMNI])
def test_uniform_visits_every_cell_of_a_frame_and_every_moment_of_sound_equally_often(layout) -> None:
    """A control that is blind to half of each frame would be easy to beat: bits reversed kept 0 to 2 times the mean."""
    repeats = 400
    whole = bare(layout, 0, len(layout) * repeats)
    scores = Uniform()(LayerView(**_view(whole)))[0]
    for kind in sorted({*layout}):
        of_kind = whole.order[0][whole.modality[0] == kind]
        for share in (0.25, 0.5):
            slots = int(share * len(of_kind))
            cells = of_kind[scores[of_kind].argsort(descending=True)[:slots]] % len(layout)
            visits = torch.bincount(cells, minlength=len(layout))[torch.tensor(layout) == kind]
            mean = share * repeats
            assert 0.9 * mean <= int(visits.min()) <= int(visits.max()) <= 1.1 * mean, (kind, share, visits.tolist())


@pytest.mark.parametrize("gradient", ["redundancy", "none"])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("block", [5, 1024])
@pytest.mark.parametrize("above", [-1.0, 0.5])
def test_coverage_equals_plain_loops(gradient, centred, block, above, monkeypatch) -> None:
    monkeypatch.setattr(covered, "BLOCK", block)
    (arrival,) = arrivals([24], batch=2)
    view, inner = replace(view_of(arrival), gradient=gradient), Perturbation(sharpness=0.5)
    scores = inner(view)
    found = Covered(inner=inner, power=0.7, above=above, centred=centred)(view)
    for b in range(2):
        row = scores[b].double().tolist()
        alone = reference.uncovered(arrival.states[b].tolist(), arrival.modality[b].tolist(), row, centred)
        parts = alone if above == -1 else [min(1.0, part / (1 - above)) for part in alone]
        assert above == -1 or 0 < parts.count(1.0) < len(parts)  # some are discounted, some are not
        expected = [score * part**0.7 for score, part in zip(row, parts, strict=True)]
        torch.testing.assert_close(found[b].double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-7)


@final
@dataclass(frozen=True, kw_only=True)
class Fixed(AbstractScorer):
    """Given scores."""

    scores: Tensor

    def __call__(self, view: LayerView) -> Tensor:
        return self.scores


LAYOUTS = {"mixed": (2, 2, 1, 0), "one modality": (2,), "text": (0,), "text and few": (0, 0, 0, 0, 0, 1), "none": ()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("copies", [1.0, 0.3, 0.02])  # noise beside the few events: none, some, most are copies
def test_what_is_surely_evicted_is_not_compared_and_nothing_else_is_kept(layout, split, ties, copies) -> None:
    """Beside the full comparison, for every number of slots, in a batch; and less is compared."""
    draw, count = torch.Generator().manual_seed(7), 400 if layout != "none" else 0
    kinds = torch.tensor(LAYOUTS[layout] or (2,), dtype=torch.int8).repeat(400)[:count].expand(2, -1)
    events = torch.randn(6, 16, generator=draw)[torch.randint(0, 6, (2, count), generator=draw)]
    states = events + copies * torch.randn(2, count, 16, generator=draw)
    scores = torch.rand(2, count, generator=draw)
    scores = (4 * scores).round() / 4 if ties else scores
    pool = replace(bare((2,), 0, count, batch=2), feature=states, modality=kinds)
    view = LayerView(pool=pool, new=count, queries=states[:, None], scale=1.0, measures=Measures(), gradient="none")
    scorer = Covered(inner=Fixed(scores=scores), above=0.5)
    full, compared = scorer(view), []
    for slots in (0, 1, 7, 60, 150, 400):
        layer = LayerSlots(audio=slots // 3, visual=slots - slots // 3, split=split)
        contests = tuple(Contest(group.member, group.kept) for group in groups(kinds, layer))
        pruned = scorer(replace(view, contests=contests))
        assert torch.equal(select(pruned, kinds, layer).index, select(full, kinds, layer).index)
        compared.append(int((pruned != scores).sum()))
    assert compared[0] == compared[-1] == 0
    assert max(compared) <= int((full != scores).sum())


def contested(vectors: Tensor, scores: Tensor, keeps: int, *, centred: bool = True) -> Tensor:
    """`uncovered_contested` of visual tokens of which `keeps` stay, each discounted by 1 - c itself, at most 1."""
    kinds = torch.full(scores.shape, int(Modality.VISUAL), dtype=torch.int8)
    contest, factor = Contest(kinds > 0, keeps), lambda alone: alone.clamp(max=1)
    return covered.uncovered_contested(vectors, kinds, scores, [contest], factor, centred=centred)


PAIRS = torch.randn(1, 40, 37, generator=torch.Generator().manual_seed(2)).repeat(1, 2, 1)
UNDIRECTED = {
    "zeros": torch.cat([torch.zeros(1, 3, 4), torch.eye(4)[None]], dim=1),
    "all the same": torch.tensor([2.0, 0, 0, 0]).expand(1, 6, 4),
    "copies": PAIRS,  # whose cosine is rounded to more than 1
}


@pytest.mark.parametrize("name", UNDIRECTED)
@pytest.mark.parametrize("centred", [True, False])
def test_vectors_of_length_zero_and_copies_are_covered_by_finite_numbers_in_every_way(name, centred) -> None:
    vectors, count = UNDIRECTED[name], UNDIRECTED[name].shape[1]
    scores, kinds = torch.ones(1, count), torch.full((1, count), int(Modality.VISUAL), dtype=torch.int8)
    expected = covered.uncovered(vectors, kinds, scores, centred=centred)
    assert ((expected >= FLOOR) & (expected <= 2)).all()
    for found in (
        covered.uncovered_values(vectors, kinds, scores, centred=centred),
        contested(vectors, scores, count - 1, centred=centred),
    ):
        assert (found >= FLOOR).all()
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_a_token_that_ties_with_a_discounted_one_is_compared() -> None:
    """8, 4 halved to 2, and 2: the last one, a copy of the first, would take the place of the second in a tie."""
    vectors = torch.tensor([[[1.0, 0, 0, 0], [0.5, 0.5, 0.5, 0.5], [1, 0, 0, 0]]])
    found = contested(vectors, torch.tensor([[8.0, 4, 2]]), 2, centred=False)
    assert found.tolist() == [[2.0, 0.5, pytest.approx(FLOOR)]]


def test_every_token_is_compared_where_a_discount_may_be_above_one() -> None:
    (arrival,) = arrivals([24])
    view = replace(view_of(arrival), gradient="none")
    scorer = Covered(inner=Perturbation(sharpness=0.5), power=0.5, above=-1.0)
    kinds = view.modality
    layer = LayerSlots(audio=1, visual=2)
    contests = tuple(Contest(group.member, group.kept) for group in groups(kinds, layer))
    assert torch.equal(scorer(replace(view, contests=contests)), scorer(view))


@pytest.mark.parametrize("bits", [16, 4])
def test_a_sketch_keeps_cosines_and_passes_gradient_to_the_layer_input(bits) -> None:
    """Of unrelated vectors with the stated deviation, of copies exactly; gradient in 16 bits as that of the input."""
    draw, matrix = torch.Generator().manual_seed(1), sketch(256, 64)
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(64), rtol=0, atol=1e-5)
    states = torch.randn(1, 300, 256, generator=draw)
    found = []
    for held in (states, (states @ matrix)):
        unit = torch.nn.functional.normalize(held[0], dim=-1)
        found.append(unit @ unit.T)
    error = (found[1] - found[0])[~torch.eye(300, dtype=torch.bool)]
    assert 0.9 < float(error.std()) / (1 / 64 - 1 / 256) ** 0.5 < 1.1
    # gradient through the sketch as it is carried, and without rounding
    kinds, scores = torch.full((1, 300), 2, dtype=torch.int8), torch.rand(1, 300, generator=draw)
    slopes = []
    for rounded in (True, False):
        read = states.clone().requires_grad_()
        unit = torch.nn.functional.normalize(read @ matrix, dim=-1)
        carried = encoded(unit, bits, learns=True) if rounded else unit
        codes = bits if rounded and bits < 16 else None
        covered.uncovered(carried, kinds, scores, product=torch.float32, codes=codes).sum().backward()
        slopes.append(read.grad)
    apart = (slopes[0] - slopes[1]).norm(dim=-1) / slopes[1].norm(dim=-1)
    assert float(apart.median()) < {16: 0.01, 4: 0.25}[bits]  # of few tokens another one is nearest


def test_distinct_carries_gradient_to_keys_and_values_and_equals_differences() -> None:
    """In float64 by central differences; without gradient for scores it has none."""
    (arrival,) = arrivals([9])
    view = view_of(arrival)
    parts = [part.double().requires_grad_() for part in (view.pool.keys, view.pool.values)]

    def scored(keys: Tensor, values: Tensor, gradient: ScoreGradient = "redundancy") -> Tensor:
        return DISTINCT(replace(view, pool=replace(view.pool, keys=keys, values=values), gradient=gradient))

    assert torch.autograd.gradcheck(scored, tuple(parts))
    assert scored(*parts).requires_grad
    assert not scored(*parts, "none").requires_grad
    assert not DISTINCT.needs_novelty
    assert not DISTINCT.needs_importance


@pytest.mark.parametrize("measure", [covered.uncovered, covered.uncovered_values])
def test_streams_of_unequal_modalities_are_covered_as_each_alone(measure) -> None:
    """In one pool of both modalities: many and one, none and all, and places that hold nothing."""
    (arrival,) = arrivals([20], batch=4)
    modality = torch.full((4, 20), int(Modality.VISUAL), dtype=torch.int8)
    modality[0, ::2], modality[1, 7], modality[3, 12:] = Modality.AUDIO, Modality.AUDIO, ABSENT
    scores = torch.rand(4, 20, generator=torch.Generator().manual_seed(3))
    found = measure(arrival.states, modality, scores)
    for b in range(4):
        there = modality[b] != ABSENT
        one = (part[b : b + 1, there] for part in (arrival.states, modality, scores))
        alone = measure(*one)
        torch.testing.assert_close(found[b, there], alone[0])
        assert (found[b, ~there] == 1).all()
    assert found[1, 7] == 2


def test_under_autocast_the_same_tokens_are_found_nearest() -> None:
    ranked = torch.randn(2, 400, 8, generator=torch.Generator().manual_seed(4))
    plain = covered.nearest_before(ranked)[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(covered.nearest_before(ranked)[1], plain)
    assert not torch.equal(covered.nearest_before(ranked.bfloat16())[1], plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_that_do_not_learn_are_covered_as_those_that_do(dtype, monkeypatch) -> None:
    """Over several blocks, in the precision of the feature; under autocast the same."""
    draw = torch.Generator().manual_seed(5)
    feature = (torch.randn(1, 700, 24, generator=draw) + 1).to(dtype)
    modality, scores = torch.randint(0, 3, (1, 700), generator=draw).to(torch.int8), torch.rand(1, 700, generator=draw)
    found = covered.uncovered_values(feature, modality, scores)
    torch.testing.assert_close(found, covered.uncovered(feature, modality, scores), rtol=1e-5, atol=2e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(covered.uncovered_values(feature, modality, scores), found)
    monkeypatch.setattr(covered, "COUNTED", ())
    counts = Counts.of(modality, torch.zeros(1, 4, 700))
    for known in (counts, counts._replace(audio=None)):  # with both kinds apart, and in one go
        again = covered.uncovered_values(feature, modality, scores, known)
        torch.testing.assert_close(again, found, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("measure", [covered.uncovered, covered.uncovered_values])
def test_of_equal_tokens_only_the_newest_keeps_its_score(measure) -> None:
    """Copies of one event: the best one is worth as much as without them, the others nothing beside it."""
    (arrival,) = arrivals([18])
    visual = (arrival.modality[0] == Modality.VISUAL).nonzero()[:, 0].tolist()
    states = arrival.states.clone()
    states[:, visual[2:5]] = states[:, visual[2:3]]
    scores = torch.ones(1, 18)
    found = measure(states, arrival.modality, scores)[0]
    assert (found[visual[2:4]] == FLOOR).all()
    assert found[visual[4]] > 0.1
    assert found[visual[-1]] == 2.0
    assert (found[arrival.modality[0] == Modality.TEXT] == 1).all()


def test_what_all_tokens_share_does_not_count_as_covered() -> None:
    (arrival,) = arrivals([30])
    scores = torch.rand(1, 30, generator=torch.Generator().manual_seed(0))
    shared = torch.nn.functional.normalize(arrival.states, dim=-1) + 50 * torch.ones(12)
    near = covered.uncovered(shared, arrival.modality, scores, centred=False)
    assert near[0][arrival.modality[0] > 0].median() < 1e-3
    assert covered.uncovered(shared, arrival.modality, scores)[0][arrival.modality[0] > 0].median() > 0.1


def test_what_is_next_to_the_mean_learns_nothing_from_its_direction() -> None:
    """Of a still picture what is left after centring is noise, whose gradient would go with 1 / its length."""
    noise = torch.randn(1, 9, 6, generator=torch.Generator().manual_seed(3))
    modality, scores = torch.full((1, 9), 2, dtype=torch.int8), torch.linspace(1, 2, 9)[None]
    for apart, learns in ((1e-4, False), (1.0, True)):
        states = (torch.ones(6) + apart * noise).requires_grad_()
        (slope,) = torch.autograd.grad(covered.uncovered(states, modality, scores).sum(), states)
        assert bool((slope != 0).any()) == learns
        assert float(slope.abs().max()) < 10


def test_coverage_carries_gradient_to_both_tokens_and_equals_differences() -> None:
    """In float64 by central differences; which token is nearest does not change on the way."""
    states = torch.randn(1, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    modality = torch.tensor([[2, 2, 1, 2, 1, 2, 0]], dtype=torch.int8)
    scores = torch.linspace(1, 2, 7, dtype=torch.float64)[None]
    assert torch.autograd.gradcheck(lambda x: covered.uncovered(x, modality, scores), (states,))
