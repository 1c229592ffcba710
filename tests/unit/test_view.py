"""What a scorer sees: importance and redundancy against plain loops, clamped, never NaN, with gradient where asked."""

import itertools
from dataclasses import fields, replace

import pytest
import torch
from support import reference
from support.layer_views import SCALE, Arrival, arrivals, tokens_of, view_of, with_states
from torch import Tensor

from omnimem import view
from omnimem.tokens import Tokens
from omnimem.view import FLOOR, LayerView, Measures, similarity

OF = ["sequence", "modality"]
ENDS = ["present", "one"]


def close(got: Tensor, expected: list[list[float]]) -> None:
    """Equal to the loops as far as float32 can be."""
    torch.testing.assert_close(got.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=2e-6)


def remembered(first: Arrival) -> Tokens:
    """A memory that carries made-up importance and novelty."""
    tokens = tokens_of(first)
    generator = torch.Generator().manual_seed(9)
    carried = torch.rand(2, *tokens.modality.shape, generator=generator)
    return replace(tokens, importance=carried[0], novelty=carried[1])


@pytest.mark.parametrize(("of", "ends"), list(itertools.product(OF, ENDS)))
def test_similarity_equals_plain_loops(of, ends) -> None:
    for count in (1, 2, 3, 26):
        (arrival,) = arrivals([count], batch=2)
        got = similarity(arrival.states, arrival.modality, Measures(of=of, ends=ends))
        close(got, [reference.similarity(arrival.states[b].tolist(), [*arrival.modality[b]], of, ends) for b in (0, 1)])


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 40])
def test_cosines_of_neighbours_in_blocks_equal_those_in_one(count, monkeypatch) -> None:
    """To the bit: training measures them in one piece where they have gradient, and must keep the same tokens."""
    feature = torch.randn(2, count, 33, generator=torch.Generator().manual_seed(count))
    whole = view._adjacent(feature.clone().requires_grad_())
    monkeypatch.setattr(view, "ROWS", 7)
    assert torch.equal(view._adjacent(feature), whole)
    assert whole.shape == (2, max(0, count - 1))


def test_a_last_token_counts_a_missing_neighbour_as_a_copy_in_the_release_only() -> None:
    """Method 8.5: there, 1 - s of the last token is half of 1 - cos."""
    (arrival,) = arrivals([9])
    present, released = (similarity(arrival.states, arrival.modality, Measures(ends=ends)) for ends in ENDS)
    torch.testing.assert_close(1 - released[:, -1], (1 - present[:, -1]) / 2)
    torch.testing.assert_close(released[:, 1:-1], present[:, 1:-1])


def test_a_token_without_any_neighbour_is_not_redundant() -> None:
    (arrival,) = arrivals([3])
    kinds = torch.tensor([[0, 1, 2]], dtype=torch.int8)
    assert torch.equal(similarity(arrival.states, kinds, Measures(of="modality")), torch.zeros(1, 3))


@pytest.mark.parametrize("heads", ["probabilities", "logits"])
@pytest.mark.parametrize("carry", ["sum", "halve"])
def test_importance_equals_plain_loops(heads, carry) -> None:
    first, second = arrivals([11, 8], batch=2)
    memory = remembered(first)
    view = view_of(second, Measures(heads=heads, carry=carry), memory, fed=11)
    expected = []
    for b in (0, 1):
        keys = torch.cat([first.keys, second.keys], dim=2)[b].tolist()
        received = reference.mass(second.queries[b].tolist(), keys, SCALE, heads)
        half = 2 if carry == "halve" else 1
        old = [(a + new) / half for a, new in zip(memory.importance[b].tolist(), received, strict=False)]
        expected.append(old + received[11:])
    close(view.importance, expected)


@pytest.mark.parametrize("of", OF)
def test_novelty_is_judged_in_the_pool_or_once_at_arrival(of) -> None:
    first, second = arrivals([11, 8], batch=2)
    memory = remembered(first)
    pooled = view_of(second, Measures(neighbours="pool", of=of), memory, fed=11)
    frozen = view_of(second, Measures(neighbours="arrival", of=of), memory, fed=11)
    in_pool, at_arrival = [], []
    for b in (0, 1):
        kinds = [*pooled.modality[b].tolist()]
        states = pooled.pool.feature[b].tolist()
        in_pool.append([1 - s for s in reference.similarity(states, kinds, of, "present")])
        alone = [1 - s for s in reference.similarity(states[11:], kinds[11:], of, "present")]
        at_arrival.append(memory.novelty[b].tolist() + alone)
    close(pooled.novelty, in_pool)
    close(frozen.novelty, at_arrival)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("neighbours", ["pool", "arrival"])
@pytest.mark.parametrize(("of", "ends"), list(itertools.product(OF, ENDS)))
def test_exact_duplicates_are_clamped_never_nan(dtype, neighbours, of, ends) -> None:
    (arrival,) = arrivals([40], width=24)
    copies = arrival.states[:, :1].expand(-1, 40, -1).to(dtype)
    view = view_of(with_states(arrival, copies), Measures(neighbours=neighbours, of=of, ends=ends))
    assert view.novelty.dtype == torch.float32
    assert torch.equal(view.novelty, torch.full((1, 40), FLOOR))
    assert bool((view.novelty**0.5).isfinite().all())


def test_cosines_of_exact_duplicates_do_exceed_one_in_float32() -> None:
    """The reason for the clamp: unclamped, some of these would be NaN under the release's square root."""
    states = torch.randn(400, 24, generator=torch.Generator().manual_seed(0))
    pairs = states[:, None].expand(-1, 2, -1)
    cosines = similarity(pairs, torch.full((400, 2), 2, dtype=torch.int8), Measures())
    assert float(cosines.max()) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_and_states_of_zero_have_finite_novelty_and_gradient_under_powers_below_one(dtype) -> None:
    (arrival,) = arrivals([9])
    copies, zeros = arrival.states[:, :1].expand(-1, 9, -1).to(dtype).clone(), arrival.states.to(dtype).clone()
    zeros[:, 3:5] = 0
    for states in (copies.requires_grad_(), zeros.requires_grad_()):
        novelty = view_of(with_states(arrival, states)).novelty
        assert bool(novelty.isfinite().all())
        (gradient,) = torch.autograd.grad((novelty**0.5).sum(), states)
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("asked", ["redundancy", "both", "none"])
def test_gradient_flows_through_the_parts_of_the_score_that_are_asked_for(asked) -> None:
    (arrival,) = arrivals([12])
    leaves = replace(
        arrival, queries=arrival.queries.clone().requires_grad_(), states=arrival.states.clone().requires_grad_()
    )
    view = view_of(leaves, gradient=asked)
    assert view.novelty.requires_grad == (asked in ("redundancy", "both"))
    assert view.importance.requires_grad == (asked == "both")
    with torch.no_grad():
        assert not view_of(leaves, gradient="both").importance.requires_grad


def test_the_gradient_of_novelty_equals_finite_differences_of_the_loops() -> None:
    (arrival,) = arrivals([7])
    states = arrival.states.clone().requires_grad_()
    weight = torch.linspace(-1, 2, 7)
    (gradient,) = torch.autograd.grad((view_of(with_states(arrival, states)).novelty[0] * weight).sum(), states)
    rows, step = arrival.states[0].double().tolist(), 1e-6
    for token, axis in ((0, 3), (3, 0), (6, 11)):
        sums = []
        for side in (1, -1):
            moved = [list(row) for row in rows]
            moved[token][axis] += side * step
            judged = reference.similarity(moved, [0] * 7, "sequence", "present")
            sums.append(sum(w * (1 - s) for w, s in zip(weight.tolist(), judged, strict=True)))
        assert float(gradient[0, token, axis]) == pytest.approx((sums[0] - sums[1]) / (2 * step), abs=1e-5)


def test_a_view_has_no_place_for_a_question() -> None:
    """All that a scorer can reach is the pool, queries of the chunk and of the policy's own probes (token ids that are
    fixed before the stream starts), and how they are measured."""
    own = {"pool", "new", "queries", "scale", "rotary", "heads", "measured", "every", "settles", "padded", "arrived"}
    assert {field.name for field in fields(LayerView)} == own | {"measures", "gradient", "probes", "contests", "once"}
