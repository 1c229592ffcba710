"""Rivals that rank one layer: each keeps what plain loops keep, chunk by chunk, and passes its own oracle."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import combinations

import pytest
import torch
from support import reference_policies as loops
from support.grid_streams import chunks_of, evictable, kept_by, row_of, view_after

from omnimem.budget import Budget
from omnimem.policies import DistinctOptions
from omnimem.policies.base import ScoredPolicy
from omnimem.policies.baselines.h2o import H2OOptions
from omnimem.policies.baselines.infinipot_v import InfiniPotVOptions, TemporalAndValue, slot_cells, true_cells
from omnimem.policies.baselines.k_center import KCenterOptions
from omnimem.policies.baselines.keydiff import KeyDiffOptions
from omnimem.policies.baselines.pyramidkv import Pyramid, PyramidKVOptions
from omnimem.policies.baselines.ranked import RankedPolicy
from omnimem.policies.baselines.recursive_uniform import RecursiveUniformOptions
from omnimem.policies.baselines.snapkv import SnapKVOptions
from omnimem.policies.baselines.streaming_llm import StreamingLLMOptions
from omnimem.policies.baselines.value_norm import ValueNorm, ValueNormOptions
from omnimem.selection import LayerSlots
from omnimem.tokens import Modality

LENGTHS = [3, 17, 9, 28, 1, 12, 20]  # the opening, then cuts anywhere
LAYERS = 4
BUDGETS = {
    "pool": Budget(slots=((0, 11),) * LAYERS, split=False),
    "split": Budget(slots=((4, 9),) * LAYERS),
    "short": Budget(slots=((9, 4),) * LAYERS),
    "alone": Budget(slots=((2, 8),) * LAYERS, lend=False),
}
CELLS = {"slot": slot_cells, "true": true_cells}
RIVALS: dict[str, tuple[Callable[..., object], Callable[..., list[float]]]] = {
    "value_norm": (ValueNormOptions, loops.value_norm),
    "keydiff": (KeyDiffOptions, loops.key_difference),
    "distinct": (DistinctOptions, loops.distinct),
    "distinct_strict": (
        partial(DistinctOptions, coverage=1.5, centred=False),
        partial(loops.distinct, power=1.5, centred=False),
    ),
    "k_center": (KCenterOptions, loops.farthest_first),
    "h2o": (H2OOptions, loops.heavy_hitters),
    "h2o_observers": (
        partial(H2OOptions, recent_share=0.25, per_observer=True),
        partial(loops.heavy_hitters, recent_share=0.25, per_observer=True),
    ),
    "snapkv": (SnapKVOptions, loops.snapkv),
    "snapkv_released": (partial(SnapKVOptions, preset="as_released"), partial(loops.snapkv, kernel=5)),
    "snapkv_small": (
        partial(SnapKVOptions, window=3, kernel=3, pooling="max"),
        partial(loops.snapkv, window=3, kernel=3, pooling="max"),
    ),
    "streaming_llm": (StreamingLLMOptions, loops.sinks_and_window),
    "recursive_uniform": (RecursiveUniformOptions, loops.every_nth),
    "infinipot_v": (InfiniPotVOptions, loops.infinipot_v),
    "infinipot_v_released": (
        partial(InfiniPotVOptions, preset="as_released"),
        partial(loops.infinipot_v, recent_share=0.25, grid="slot", smoothing="none"),
    ),
    "infinipot_v_smoothed": (
        partial(InfiniPotVOptions, grid="slot", smoothing="release", temporal_share=0.7),
        partial(loops.infinipot_v, alpha=0.7, grid="slot", smoothing="release"),
    ),
}


@pytest.mark.parametrize("kind", sorted(BUDGETS))
@pytest.mark.parametrize("name", sorted(RIVALS))
def test_kept_tokens_equal_plain_loops_chunk_by_chunk(name, kind) -> None:
    options, score = RIVALS[name]
    budget = BUDGETS[kind]
    policy = replace(options().build(budget), budget=budget)  # the pool or the split, whatever the preset
    slots = loops.Slots(*budget.layer(0), split=budget.split, lend=budget.lend)
    for layer in (0, 1, 2) if "infinipot" in name else (1,):
        for kv_heads in (1, 2):
            chunks = chunks_of(LENGTHS, batch=2, kv_heads=kv_heads, heads=4, seed=len(name))
            memory = None
            for chunk, after in zip(chunks, kept_by(policy, chunks, layer), strict=True):
                view = view_after(memory, chunk, policy.measures)
                for number in range(2):
                    row = row_of(view, number)
                    if loops.VISUAL in row.kinds:
                        scores = score(row, slots, layer / LAYERS)
                        assert after.order[number].tolist() == [row.order[k] for k in loops.keep(row, scores, slots)]
                memory = after
            assert bool((after.order.diff(dim=1) > 0).all())
            held = int((after.modality[0] != Modality.TEXT).sum())
            assert held == min(budget.layer(0)[0] + budget.layer(0)[1], held)
            assert evictable(after, 0) != evictable(after, 1) or "uniform" in name or "streaming" in name


def test_other_rivals_keep_other_tokens() -> None:
    """A score that did nothing would still fill the budget: no two rivals agree, and none is recency."""
    chunks = chunks_of(LENGTHS, kv_heads=1, heads=4, seed=3)
    policies = {name: options().build(BUDGETS["pool"]) for name, (options, _) in RIVALS.items()}
    kept = {name: evictable(kept_by(policy, chunks)[-1]) for name, policy in policies.items()}
    for one, other in combinations(kept, 2):
        assert kept[one] != kept[other], (one, other)
    assert all(mine[0] < sum(LENGTHS) - 14 for mine in kept.values())  # more than the latest


def test_value_norm_a_long_value_ranks_first() -> None:
    """Baselines, section 12: scale one V, rank 1."""
    (chunk,) = chunks_of([30])
    view = view_after(None, chunk)
    values = view.pool.values.clone()
    values[:, :, 17] *= 50
    scores = ValueNorm()(replace(view, pool=replace(view.pool, values=values)), LayerSlots(audio=2, visual=5), 0.0)
    assert int(scores.argmax()) == 17


@pytest.mark.parametrize("grid", ["slot", "true"])
def test_infinipot_v_copies_of_recent_frames_score_lowest(grid) -> None:
    """Baselines, section 12: duplicate a frame (keys alike): its copies score -1, the lowest there is."""
    chunk = chunks_of([3, 34])[1]
    view = view_after(None, chunk)
    visual = (view.modality[0] == Modality.VISUAL).nonzero()[:, 0].view(-1, 6)  # frames x cells
    keys = view.pool.keys.clone()
    keys[:, :, visual[1]] = keys[:, :, visual[3]]
    ranking = TemporalAndValue(temporal_share=0.5, recent_share=0.125, grid=grid, smoothing="none", keys="stored")
    cells = {"slot": loops.slot_places, "true": loops.true_places}[grid](row_of(view, 0))[0]
    assert {cells[int(k)][0] for k in visual[3]} == {0}
    copied = replace(view, pool=replace(view.pool, keys=keys))
    distinct, recent = ranking._temporal(copied, CELLS[grid](copied))
    assert recent[0].nonzero()[:, 0].tolist()[:6] == visual[3].tolist()
    torch.testing.assert_close(distinct[0, visual[1]], torch.full((6,), -1.0))
    others = [int(k) for frame in (0, 2) for k in visual[frame]]
    assert float(distinct[0, others].min()) > -0.99999


def test_slots_take_survivors_for_whole_frames_and_true_cells_do_not() -> None:
    """Baselines, section 1: after an eviction slots fall off their cells; positions never do."""
    policy = ValueNormOptions().build(BUDGETS["pool"])
    chunks = chunks_of([3, 17, 17, 17])  # chunks end with whole frames, as a backbone cuts them
    memory = kept_by(policy, chunks)[-2]
    view = view_after(memory, chunks[-1])
    visual = (view.modality[0] == Modality.VISUAL).nonzero()[:, 0]
    by_slot, by_place = (CELLS[grid](view).cell[0, visual] for grid in ("slot", "true"))
    height, width = view.pool.positions[0, 1:, visual]
    assert torch.equal(by_place, (height - height.min()) * 3 + width - width.min())
    fresh = visual >= view.pool.count - view.new
    assert torch.equal(by_slot[fresh], by_place[fresh])
    assert not torch.equal(by_slot[~fresh], by_place[~fresh])


def test_snapkv_scores_equal_the_formula_that_kvpress_states() -> None:
    """Mean over the window's queries, avg_pool1d (zeros count), mean over the group: the same order of old tokens."""
    window, kernel = 4, 5
    (chunk,) = chunks_of([40], heads=4)
    queries, fresh = chunk
    keep = torch.tensor([[k for k in range(40) if fresh.modality[0, k] != Modality.TEXT]])  # kvpress knows no text
    queries, fresh = queries[:, :, keep[0]], fresh.gather(keep)
    view = view_after(None, (queries, fresh))
    options = SnapKVOptions(window=window, kernel=kernel)
    scores = options.build(BUDGETS["pool"]).ranking(view, LayerSlots(audio=0, visual=20, split=False), 0.0)
    count = fresh.count
    logits = queries[:, :, -window:] @ fresh.keys.mT * view.scale
    logits += torch.full((window, count), float("-inf")).triu(count - window + 1)
    past = logits.softmax(dim=-1)[..., :-window].mean(dim=-2)
    expected = torch.nn.functional.avg_pool1d(past, kernel, padding=kernel // 2, stride=1).mean(dim=1)
    torch.testing.assert_close(scores[:, :-window] / window, expected)
    assert float(scores[:, -window:].min()) > float(scores[:, :-window].max())


@pytest.mark.parametrize(("slots", "arrived"), [(100, 4000), (100, 150), (100, 210), (18, 600), (7, 50)])
def test_pyramidkv_layers_sum_to_the_budget_and_fall_linearly(slots, arrived) -> None:
    layers, window, beta = 6, 32, 20.0
    budget = Pyramid(window=window, beta=beta)(Budget.shared(layers, slots), arrived)
    sizes = [sum(pair) for pair in budget.slots]
    past, inside = loops.pyramid(layers, slots * layers, window, beta, arrived)
    assert sum(sizes) == slots * layers
    assert all(abs(size - inside - wanted) < 1 for size, wanted in zip(sizes, past, strict=True))
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) <= max(arrived, slots + 1)


def test_pyramidkv_keeps_a_pyramid_with_snapkv_s_score() -> None:
    chunks = chunks_of(LENGTHS, heads=4)
    policy = PyramidKVOptions(window=3).build(Budget.shared(LAYERS, 12))
    assert isinstance(policy, RankedPolicy)
    held = [[len(evictable(memory)) for memory in kept_by(policy, chunks, layer)] for layer in range(LAYERS)]
    ends = [column[-1] for column in held]
    assert sum(ends) == 12 * LAYERS
    assert ends == sorted(ends, reverse=True)
    assert ends[0] > 2 * ends[-1]


def test_pyramidkv_takes_over_the_audio_visual_split_within_its_layers() -> None:
    given = Budget(slots=((2, 10), (4, 8), (6, 6), (3, 9)))
    shaped = PyramidKVOptions(preset="shared_split", window=4).build(given)
    assert shaped.reshape is not None
    budget = shaped.reshape(given, 1000)
    assert budget.total == given.total
    for (audio, visual), (a, v) in zip(given.slots, budget.slots, strict=True):
        assert abs(a / (a + v) - audio / (audio + visual)) <= 1 / (a + v)


def test_sinks_stay_for_ever_and_the_rest_is_a_window() -> None:
    chunks = chunks_of(LENGTHS)
    whole = [k for _, fresh in chunks for k in evictable(fresh)]
    policy = StreamingLLMOptions().build(BUDGETS["pool"])
    for memory, arrived in zip(kept_by(policy, chunks), ends(chunks), strict=True):
        seen = [k for k in whole if k < arrived]
        expected = seen if len(seen) <= 11 else seen[:4] + seen[-7:]
        assert evictable(memory) == expected


def ends(chunks) -> list[int]:
    return torch.tensor([fresh.count for _, fresh in chunks]).cumsum(0).tolist()


def test_recursive_thinning_forgets_the_past() -> None:
    """Baselines, section 1: thinning survivors again and again is no uniform sample."""
    chunks = chunks_of([12] * 40)
    memory = kept_by(RecursiveUniformOptions().build(Budget(slots=((0, 24),) * LAYERS, split=False)), chunks)[-1]
    early = [k for k in evictable(memory) if k < 240]
    assert len(early) <= 4


@pytest.mark.parametrize("name", sorted(RIVALS))
def test_exact_duplicates_in_bfloat16_give_no_nan(name) -> None:
    options, _ = RIVALS[name]
    policy = options().build(BUDGETS["pool"])
    chunks = []
    for queries, fresh in chunks_of(LENGTHS, kv_heads=2, heads=4):
        still = {part: getattr(fresh, part)[:, :, :1].expand_as(getattr(fresh, part)) for part in ("keys", "values")}
        halved = {part: tensor.to(torch.bfloat16) for part, tensor in still.items()}
        chunks.append((queries.to(torch.bfloat16), replace(fresh, **halved)))
    memory = None
    for chunk in chunks:
        view = view_after(memory, chunk, policy.measures)
        scored = isinstance(policy, ScoredPolicy)
        scores = policy.scorer(view) if scored else policy.ranking(view, policy.layer_slots(0), 0.0)
        assert bool(scores.isfinite().all())
        memory = policy.keep(0, view)
    assert len(evictable(memory)) == 11
