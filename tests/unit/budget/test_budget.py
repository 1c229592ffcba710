"""Budgets against a slow reference, exact to the slot, the facts known of the released tables, every refusal."""

import itertools
import json
import math
from dataclasses import replace

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from support import reference_budget as reference

from omnimem.budget import (
    AudioVisualBudget,
    Budget,
    BudgetError,
    Readings,
    ReleasedBudget,
    SharedBudget,
    Shares,
    Signals,
    SplitBudget,
)
from omnimem.budget.apportion import apportion
from omnimem.config import MemoryOptions
from omnimem.config.exported import policies_of

QUICK = settings(max_examples=60, deadline=None)


def signals_of(layers: int = 36) -> Signals:
    """Smooth signals of a made-up model: entropy falls, similarity rises with depth, the last layers turn back."""
    depth = [layer / layers for layer in range(layers)]
    bend = [x - 0.9 * max(0.0, x - 0.8) ** 2 * 8 for x in depth]

    def bent(start: float, slope: float) -> tuple[float, ...]:
        return tuple(start + slope * x for x in bend)

    return Signals(
        entropy=Readings(whole=bent(0.95, -0.3), audio=bent(0.9, -0.1), visual=bent(0.95, -0.35)),
        similarity=Readings(whole=bent(0.45, 0.3), audio=bent(0.5, 0.1), visual=bent(0.45, 0.35)),
        streams=8,
        chunks=40,
    )


@st.composite
def measured(draw: st.DrawFn) -> list[tuple[float, ...]]:
    """Any rows a calibration can give; `made` turns them into Signals outside the strategy, where beartype may draw."""
    layers = draw(st.integers(1, 8))
    unit = st.lists(st.floats(0.05, 1.0), min_size=layers, max_size=layers).map(tuple)
    cosine = st.lists(st.floats(-0.5, 0.95), min_size=layers, max_size=layers).map(tuple)
    return [draw(unit) for _ in range(3)] + [draw(cosine) for _ in range(3)]


def made(rows: list[tuple[float, ...]]) -> Signals:
    """Signals of the rows of `measured`."""
    return Signals(
        entropy=Readings(whole=rows[0], audio=rows[1], visual=rows[2]),
        similarity=Readings(whole=rows[3], audio=rows[4], visual=rows[5]),
    )


@st.composite
def apportionments(draw: st.DrawFn) -> tuple[list[float], int, list[int], list[int]]:
    """Weights, bounds and a total between the bounds; zero weights and equal weights included."""
    size = draw(st.integers(1, 10))
    weights = draw(st.lists(st.sampled_from([0.0, 0.25, 0.5]) | st.floats(0.001, 5.0), min_size=size, max_size=size))
    low = draw(st.lists(st.integers(0, 20), min_size=size, max_size=size))
    high = [a + draw(st.integers(0, 60)) for a in low]
    return weights, draw(st.integers(sum(low), sum(high))), low, high


@pytest.mark.parametrize("form", ["printed", "released"])
@given(rows=measured(), ratio=st.floats(0.2, 20.0), temperature=st.floats(0.05, 5.0))
@QUICK
def test_shares_equal_the_slow_reference(form, rows, ratio, temperature) -> None:
    signals = made(rows)
    shares = signals.shares(visual_audio_ratio=ratio, layer_temperature=temperature, form=form)
    expected = reference.fractions_of(signals, ratio, temperature, form)
    for got, want in zip(shares.fractions, expected, strict=True):
        assert got == pytest.approx(tuple(want), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("form", ["printed", "released"])
def test_layer_totals_do_not_depend_on_the_ratio(form) -> None:
    """Fact of the released r = 5 and r = 10 tables (docs/paper.md, "Budget allocation")."""
    few, many = (signals_of().shares(visual_audio_ratio=ratio, form=form) for ratio in (5.0, 10.0))
    for one, other in zip(few.fractions, many.fractions, strict=True):
        assert sum(one) == pytest.approx(sum(other), rel=1e-12)
        assert one[0] > other[0]


def test_temperature_times_log_of_layer_totals_is_the_same_capacity_up_to_a_constant() -> None:
    """Fact of the released T = 0.2 and T = 0.5 tables (docs/paper.md, "Budget allocation"): B = softmax(C / T)."""
    signals = signals_of()
    for temperature in (0.2, 0.5):
        shares = signals.shares(layer_temperature=temperature)
        offsets = [
            temperature * math.log(sum(pair)) - capacity
            for pair, capacity in zip(shares.fractions, signals.capacity("released"), strict=True)
        ]
        assert max(offsets) - min(offsets) < 1e-12


def test_temperature_moves_memory_between_layers_and_never_between_modalities() -> None:
    sharp, mild = (signals_of().shares(layer_temperature=temperature) for temperature in (0.2, 2.0))
    for one, other in zip(sharp.fractions, mild.fractions, strict=True):
        assert one[0] / sum(one) == pytest.approx(other[0] / sum(other), rel=1e-12)
    assert sum(sharp.fractions[0]) > sum(mild.fractions[0]) > 1 / 36


def test_infinite_temperature_gives_every_layer_the_same() -> None:
    shares = signals_of().shares(layer_temperature=math.inf)
    assert all(sum(pair) == pytest.approx(1 / 36, rel=1e-12) for pair in shares.fractions)


def test_printed_times_entropy_equals_released_squared_by_modality() -> None:
    """H-only x (1 - s) / (sqrt form)^2 = const: the square root in the released tables
    (docs/paper.md, "Budget allocation").
    """
    signals = signals_of()
    for entropy, printed, released in zip(
        zip(signals.entropy.audio, signals.entropy.visual, strict=True),
        signals.capacities("printed"),
        signals.capacities("released"),
        strict=True,
    ):
        for h, p, r in zip(entropy, printed, released, strict=True):
            assert h * p == pytest.approx(r * r, rel=1e-12)


def test_equal_capacities_give_audio_one_part_in_one_plus_r() -> None:
    flat = Readings(whole=(0.8,) * 4, audio=(0.8,) * 4, visual=(0.8,) * 4)
    shares = Signals(entropy=flat, similarity=flat).shares(visual_audio_ratio=5.0)
    assert shares.fractions == ((pytest.approx(1 / 24), pytest.approx(5 / 24)),) * 4


def test_a_modality_without_capacity_keeps_one_slot_a_layer() -> None:
    signals = signals_of(4)
    silent = replace(signals, entropy=replace(signals.entropy, audio=(0.0,) * 4))
    budget = Budget(slots=silent.shares().slots(16))
    assert [audio for audio, _ in budget.slots] == [1] * 4
    assert budget.total == 64


@given(case=apportionments())
@QUICK
def test_apportionment_is_exact_keeps_every_bound_and_equals_the_slow_reference(case) -> None:
    _, total, low, high = case
    counts = apportion(*case)
    assert counts == reference.apportion(*case)
    assert sum(counts) == total
    assert all(a <= count <= b for a, count, b in zip(low, counts, high, strict=True))


@given(weights=st.lists(st.floats(0.001, 5.0), min_size=2, max_size=8), spare=st.integers(0, 300))
@QUICK
def test_more_weight_never_means_fewer_slots(weights, spare) -> None:
    counts = apportion(weights, spare + len(weights), [1] * len(weights), [400] * len(weights))
    for (one, a), (other, b) in itertools.permutations(zip(weights, counts, strict=True), 2):
        assert a <= b or one >= other


@given(
    weights=st.lists(st.floats(0.001, 5.0), min_size=2, max_size=8, unique=True),
    spare=st.integers(0, 300),
    random=st.randoms(use_true_random=False),
)
@QUICK
def test_the_order_of_the_layers_does_not_matter(weights, spare, random) -> None:
    order = list(range(len(weights)))
    random.shuffle(order)
    low, high = [1] * len(weights), [400] * len(weights)
    straight = apportion(weights, spare + len(weights), low, high)
    shuffled = apportion([weights[i] for i in order], spare + len(weights), low, high)
    assert shuffled == [straight[i] for i in order]


@given(weights=st.lists(st.floats(0.001, 5.0), min_size=1, max_size=8), total=st.integers(0, 5000))
@QUICK
def test_without_bounds_every_part_is_within_one_slot_of_its_share(weights, total) -> None:
    counts = apportion(weights, total, [0] * len(weights), [total] * len(weights))
    for weight, count in zip(weights, counts, strict=True):
        assert abs(count - total * weight / math.fsum(weights)) < 1 + 1e-9


@given(rows=measured(), slots=st.integers(2, 20000), ratio=st.floats(0.2, 20.0), temperature=st.floats(0.05, 5.0))
@QUICK
def test_a_budget_sums_to_the_slot_for_any_slots_per_layer(rows, slots, ratio, temperature) -> None:
    signals = made(rows)
    budget = Budget(slots=signals.shares(visual_audio_ratio=ratio, layer_temperature=temperature).slots(slots))
    assert budget.total == slots * signals.layers
    assert min(min(pair) for pair in budget.slots) >= 1


@given(rows=measured(), slots=st.integers(64, 9000), low=st.floats(0.0, 0.6), high=st.floats(1.2, 2.0))
@QUICK
def test_clipped_budgets_are_exact_and_inside_their_clip(rows, slots, low, high) -> None:
    ratio = 5.0
    shares = made(rows).shares(visual_audio_ratio=ratio, clip=(low, high))
    assume(low * (1 + 1 / ratio) < 0.95)
    table = shares.slots(slots)
    assert sum(map(sum, table)) == slots * shares.layers
    for audio, visual in table:
        assert low * slots <= visual <= high * slots
        assert low * slots / ratio <= audio <= high * slots / ratio


def test_exact_budgets_equal_the_slow_reference_under_the_released_clips() -> None:
    for clip, slots in itertools.product([(0.5, 1.5), (0.2, 2.0)], [64, 4096, 8192]):
        shares = signals_of().shares(clip=clip)
        low = [math.ceil(clip[0] * slots / 5), math.ceil(clip[0] * slots)]
        high = [math.floor(clip[1] * slots / 5), math.floor(clip[1] * slots)]
        flat = [value for pair in shares.fractions for value in pair]
        expected = reference.apportion(flat, slots * 36, low * 36, high * 36)
        assert [count for pair in shares.slots(slots) for count in pair] == expected


@given(rows=measured(), slots=st.integers(500, 9000), low=st.floats(0.1, 0.6), high=st.floats(1.2, 2.0))
@QUICK
def test_truncated_budgets_equal_the_release(rows, slots, low, high) -> None:
    shares = made(rows).shares(visual_audio_ratio=2.0, clip=(low, high))
    table = shares.slots(slots, "truncated")
    assert [list(pair) for pair in table] == reference.truncated(shares.fractions, slots, 2.0, low, high)


def test_truncated_budgets_are_not_iso_budget_and_exact_ones_are() -> None:
    """The release's r = 2 table holds 8.7 % more than the others; ours cannot."""
    totals = {}
    for ratio in (2.0, 5.0, 20.0):
        shares = signals_of().shares(visual_audio_ratio=ratio, clip=(0.5, 1.5))
        totals[ratio] = sum(map(sum, shares.slots(8192, "truncated")))
        assert sum(map(sum, shares.slots(8192))) == 8192 * 36
    assert len(set(totals.values())) == 3


@given(layers=st.integers(1, 40), slots=st.integers(2, 9000), share=st.floats(0.01, 0.99))
@example(layers=2, slots=3, share=0.5)
@QUICK
def test_a_split_gives_every_layer_exactly_slots_per_layer(layers, slots, share) -> None:
    budget = SplitBudget(audio_share=share).build(layers, slots)
    assert {sum(pair) for pair in budget.slots} == {slots}


MEASURED = AudioVisualBudget(clip=(0.5, 1.5)).build(36, 8192, signals_of())


@pytest.mark.parametrize(
    "budget", [Budget.full(3), SharedBudget().build(3, 7), SplitBudget(lend=False).build(3, 12), MEASURED]
)
def test_every_kind_of_budget_reads_back_equal(budget, tmp_path) -> None:
    budget.write(tmp_path / "budget.json")
    assert Budget.read(tmp_path / "budget.json") == budget


def test_released_tables_are_read_and_written_as_lists_of_audio_and_visual(tmp_path) -> None:
    table = [[1419, 6772], [300, 2497], [1800, 16769]]
    (tmp_path / "released.json").write_text(json.dumps(table))
    budget = Budget.read(tmp_path / "released.json")
    assert [list(pair) for pair in budget.slots] == table
    assert budget.split
    assert not budget.lend
    budget.write(tmp_path / "again.json", released=True)
    assert json.loads((tmp_path / "again.json").read_text()) == table


@pytest.mark.parametrize("row", [[10, 50], 60])
def test_a_table_of_too_many_layers_is_refused_at_once(row) -> None:
    assert Budget.of([row] * 4096).layers == 4096
    with pytest.raises(BudgetError, match=r"layers = .*4,096"):
        Budget.of([row] * 200_000)


def test_a_released_table_scales_exactly_or_stays_as_it_is(tmp_path) -> None:
    path = tmp_path / "released.json"
    path.write_text(json.dumps([[1000, 7000], [1000, 7190]]))
    assert AudioVisualBudget(table=str(path)).build(2, 8192).total == 2 * 8192
    kept = AudioVisualBudget(table=str(path), rounding="truncated", lend=False).build(2, 8192)
    assert kept.slots == ((1000, 7000), (1000, 7190))
    assert not kept.lend
    with pytest.raises(
        BudgetError, match=r"8,095 slots per layer, slots_per_layer is 4096; set budget.rounding: exact"
    ):
        AudioVisualBudget(table=str(path), rounding="truncated").build(2, 4096)


@pytest.mark.parametrize(("table", "split"), [([[1000, 7000], [1000, 7190]], True), ([8000, 8190], False)])
def test_a_table_as_released_is_kept_to_the_slot_and_scales_for_other_sizes_only(table, split, tmp_path) -> None:
    path = tmp_path / "released.json"
    path.write_text(json.dumps(table))
    budget = ReleasedBudget(table=str(path)).build(2, 8192)
    assert [list(slots) if split else sum(slots) for slots in budget.slots] == table
    assert (budget.split, budget.lend) == (split, False)
    memory = MemoryOptions(budget=ReleasedBudget(table=str(path)), slots_per_layer=8192)
    path.unlink()  # an export holds the table itself
    assert policies_of(memory, budget)(8192).budget == budget
    smaller = policies_of(memory, budget)(64).budget
    assert smaller is not None
    assert (smaller.total, smaller.lend) == (128, False)


@pytest.mark.parametrize(
    ("text", "slots", "message"),
    [
        (
            "[[1000, 7000], [1000, 7190]]",
            4096,
            r"holds 8,095 slots per layer, slots_per_layer is 4096; set slots_per_layer",
        ),
        ("[8000, 8190, 1]", 8192, r"measured on 3 layers, the model has 2"),
        ("[[1, 2], [3]]", 8192, r"layer 1 is \[3\], not two whole numbers"),
        ("[0, 8190]", 4096, r"layer 0 would have slots for 0 audio and 0 visual"),
        (json.dumps(Budget.full(2).json()), 8192, r"holds no shares of a memory"),
    ],
)
def test_a_table_that_cannot_run_as_released_is_named(text, slots, message, tmp_path) -> None:
    (tmp_path / "released.json").write_text(text)
    with pytest.raises(BudgetError, match=message):
        ReleasedBudget(table=str(tmp_path / "released.json")).build(2, slots)


def test_signals_of_a_file_are_allocated_again_by_this_configs_ratio(tmp_path) -> None:
    path = tmp_path / "budget.json"
    AudioVisualBudget(visual_audio_ratio=5.0).build(36, 8192, signals_of()).write(path)
    again = AudioVisualBudget(visual_audio_ratio=2.0, table=str(path)).build(36, 64)
    assert again.slots == AudioVisualBudget(visual_audio_ratio=2.0).build(36, 64, signals_of()).slots


def test_released_tables_of_whole_numbers_are_one_pool_per_layer(tmp_path) -> None:
    path = tmp_path / "released.json"
    path.write_text("[8000, 4000, 12576]")
    budget = Budget.read(path)
    assert [sum(slots) for slots in budget.slots] == [8000, 4000, 12576]
    assert not budget.split
    budget.write(tmp_path / "again.json", released=True)
    assert json.loads((tmp_path / "again.json").read_text()) == [8000, 4000, 12576]
    kept = AudioVisualBudget(table=str(path), rounding="truncated").build(3, 8192)
    assert (kept.slots, kept.split) == (budget.slots, False)
    scaled = AudioVisualBudget(table=str(path)).build(3, 4096)
    assert [sum(slots) for slots in scaled.slots] == [4000, 2000, 6288]
    assert not scaled.split


def test_a_full_budget_does_not_fit_the_released_format(tmp_path) -> None:
    with pytest.raises(BudgetError, match="write a full budget in ours"):
        Budget.full(3).write(tmp_path / "budget.json", released=True)
    Budget.full(3).write(tmp_path / "budget.json")
    with pytest.raises(BudgetError, match="holds no shares of a memory"):
        AudioVisualBudget(table=str(tmp_path / "budget.json")).build(3, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("{}", "no key 'format'"),
        ('{"format": "omnimem budget 9"}', "format is 'omnimem budget 9'"),
        ("[[1, 2, 3]]", r"layer 0 is \[1, 2, 3\], not two whole numbers"),
        ("[[0, 2]]", "layer 0 would have slots for 0 audio and 2 visual"),
        ("[]", "holds no layers"),
    ],
)
def test_a_file_that_is_no_budget_is_named_with_its_reason(text, message, tmp_path) -> None:
    (tmp_path / "budget.json").write_text(text)
    with pytest.raises(BudgetError, match=message) as caught:
        Budget.read(tmp_path / "budget.json")
    assert str(caught.value).startswith(str(tmp_path / "budget.json"))


@pytest.mark.parametrize(
    ("options", "slots", "message"),
    [
        (SharedBudget(), 0, "slots_per_layer: 0 is too small, each layer needs one slot; set slots_per_layer to 1"),
        (SplitBudget(), 1, "slots_per_layer: 1 is too small.*set slots_per_layer to 2 or more.*name: shared"),
        (AudioVisualBudget(clip=(0.9, 1.5)), 100, r"clip asks for 108 to 180 slots per layer.*widen budget\.clip"),
        (AudioVisualBudget(clip=(0.81, 0.82), visual_audio_ratio=5.0), 10, "no whole number of audio slots"),
        (AudioVisualBudget(rounding="truncated"), 4, "layer 1 would have slots for 0 audio.*raise slots_per_layer"),
    ],
)
def test_a_budget_that_cannot_be_given_is_refused_with_its_cure(options, slots, message) -> None:
    with pytest.raises(BudgetError, match=message):
        options.build(4, slots, signals_of(4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SplitBudget(audio_share=1.0), "audio_share is 1.0; give a number between 0 and 1"),
        (lambda: AudioVisualBudget(layer_temperature=0.0), "layer_temperature is 0.0"),
        (lambda: AudioVisualBudget(clip=(1.5, 0.5)), r"clip is \[1.5, 0.5\]; give \[lowest, highest\]"),
        (lambda: AudioVisualBudget().build(4, 16), "needs measured signals; run `omnimem calibrate"),
        (lambda: AudioVisualBudget().build(5, 16, signals_of(4)), "measured on 4 layers, the model has 5"),
        (lambda: Readings(whole=(1.0,), audio=(1.0, 1.0), visual=(1.0,)), "list 1, 2 and 1 layers"),
        (lambda: Shares(fractions=((0.5, 0.6),)), "sum to 1, got 1.1"),
        (lambda: made([(0.5, 0.5)] * 3 + [(0.5, 1.0)] * 3).shares(), "layer 1 has no capacity"),
    ],
)
def test_wrong_options_are_refused_when_they_are_made(make, message) -> None:
    with pytest.raises(BudgetError, match=message):
        make()
