"""What each step uses: a function of (seed, step) alone; lists in laps, ranges by their law; refused in one line."""

from collections import Counter
from contextlib import nullcontext
from itertools import pairwise
from math import log, sqrt

import pytest
import torch
from support.configs import loaded, problems
from support.gradients import opened
from support.thinkers import write_folder

from omnimem.backbones import LayoutError, ModelOptions, load_backbone
from omnimem.budget import AudioVisualBudget, Readings, Signals
from omnimem.config import ConfigError, MemoryOptions, load, refuse_unseen_budget
from omnimem.config.exported import policies_of
from omnimem.data import Message, Sample
from omnimem.recall.renderer import write_mp4
from omnimem.recall.worlds import draw_world
from omnimem.streaming.attach import attach
from omnimem.streaming.feeder import Feeder
from omnimem.streaming.options import StreamOptions
from omnimem.streaming.stream import Stream
from omnimem.tuning import BudgetRange, ChunkRange, Plan, TuningOptions
from omnimem.tuning.curriculum import log_uniform

RANGE = BudgetRange(low=12, high=64, full=0.25)


def plan_of(seed: int = 42, **options: object) -> Plan:
    return Plan(options=TuningOptions(**options), slots_per_layer=18, chunk_tokens=72, seed=seed)


MIXED = {"budgets": RANGE, "chunk_tokens": ChunkRange(low=36, high=144)}


def test_a_step_is_a_function_of_seed_and_step_in_any_order_and_any_plan() -> None:
    """So a resumed run goes on with what the unbroken one would have drawn."""
    first, second = plan_of(**MIXED), plan_of(**MIXED)
    forwards = [first(step, 40) for step in range(40)]
    assert [second(step, 40) for step in reversed(range(40))] == forwards[::-1]
    assert [first(step, 40) for step in range(40)] == forwards
    other = [plan_of(seed=43, **MIXED)(step, 40) for step in range(40)]
    assert sum(a.slots != b.slots for a, b in zip(forwards, other, strict=True)) > 20
    assert sum(a.chunk_tokens != b.chunk_tokens for a, b in zip(forwards, other, strict=True)) > 20


def test_each_lap_through_a_list_is_a_permutation_of_its_own() -> None:
    plan = plan_of(budgets=(18, 9, 36, "full"), chunk_tokens=(36, 72, 144))
    steps = [plan(step, 240) for step in range(240)]
    for drawn, choices in (
        ([s.slots for s in steps], (18, 9, 36, None)),
        ([s.chunk_tokens for s in steps], (36, 72, 144)),
    ):
        laps = [tuple(drawn[first : first + len(choices)]) for first in range(0, 240, len(choices))]
        assert all(Counter(lap) == Counter(choices) for lap in laps)
        assert len(set(laps)) > 4  # not one order for ever


def test_chunk_sizes_are_drawn_apart_from_budgets() -> None:
    """Lists of equal length in the same order would show each budget with one chunk size alone."""
    plan = plan_of(budgets=(9, 18), chunk_tokens=(36, 72))
    pairs = Counter((step.slots, step.chunk_tokens) for step in (plan(number, 400) for number in range(400)))
    assert len(pairs) == 4
    assert min(pairs.values()) > 60
    ranged = [plan_of(**MIXED)(step, 1500) for step in range(1500)]
    rows = torch.tensor([[log(s.slots), log(s.chunk_tokens)] for s in ranged if s.slots is not None]).T
    assert abs(float(torch.corrcoef(rows)[0, 1])) < 4 / sqrt(rows.shape[1])


def test_a_range_is_log_uniform_with_its_share_of_full_memory() -> None:
    """P(k) = log((k + 1) / k) / log((high + 1) / low) of the steps that are not full; within 4 standard deviations."""
    steps, plan = 6_000, plan_of(budgets=RANGE)
    drawn = Counter(plan(step, steps).slots for step in range(steps))
    assert set(drawn) == {None, *range(12, 65)}
    expected: dict[int | None, float] = {k: 0.75 * log((k + 1) / k) / log(65 / 12) for k in range(12, 65)}
    expected[None] = 0.25
    assert sum(expected.values()) == pytest.approx(1)
    for slots, share in expected.items():
        assert abs(drawn[slots] - share * steps) < 4 * sqrt(share * (1 - share) * steps), slots


def test_the_ends_of_a_range_are_drawn_and_nothing_outside() -> None:
    assert (log_uniform(12, 64, 0.0), log_uniform(12, 64, 1 - 2**-53)) == (12, 64)
    assert {ChunkRange(low=5, high=5).at(place / 10) for place in range(10)} == {5}
    assert BudgetRange(low=5, high=5, full=1.0).at(1 - 2**-53) is None
    places = [log_uniform(12, 64, number / 1000) for number in range(1000)]
    assert all(a <= b for a, b in pairwise(places))


def test_steps_of_a_range_belong_to_the_curve_of_their_doubling() -> None:
    assert [RANGE.band(slots) for slots in (12, 23, 24, 47, 48, 64)] == ["12-23"] * 2 + ["24-47"] * 2 + ["48-64"] * 2
    assert BudgetRange(low=1, high=4).band(1) == "1"
    assert BudgetRange(low=8, high=16).band(16) == "16"
    plan = plan_of(budgets=RANGE)
    names = {plan.budget(step) for step in range(200)}
    assert names == {"12-23", "24-47", "48-64", "full"}
    for step in range(200):
        slots = plan(step, 200).slots
        assert plan.budget(step) == ("full" if slots is None else RANGE.band(slots))


def test_a_budget_above_the_calibrated_one_keeps_the_shares_and_works(tmp_path) -> None:
    """Also one larger than the whole stream: then everything stays."""
    flat, low = (
        Readings(whole=(0.8, 0.6), audio=(0.8, 0.7), visual=(0.9, 0.6)),
        Readings(whole=(0.5, 0.6), audio=(0.5, 0.6), visual=(0.4, 0.6)),
    )
    wanted = AudioVisualBudget(visual_audio_ratio=2.0, layer_temperature=0.5)
    memory = MemoryOptions(slots_per_layer=6, budget=wanted)
    calibrated = wanted.build(2, 6, Signals(entropy=flat, similarity=low))
    policies = policies_of(memory, calibrated)
    backbone = load_backbone(ModelOptions(path=str(write_folder(tmp_path / "model", rates="tiny"))))
    backbone.model.double()
    feeder, batch = Feeder(backbone, StreamOptions(chunk_tokens=12)), [opened(1, (None,), ["red"])]
    entries = {}
    for slots in (6, 12, 1000, None):
        policy = policies(slots)
        if policy.budget is not None:
            assert policy.budget.total == 2 * (slots or 0)
        with torch.no_grad(), attach(backbone.text_model) as attached:
            stream = Stream(attached, policy)
            for chunk in feeder.chunks(batch):
                stream.feed(chunk)
        entries[slots] = stream.memory.entries
    assert entries == {6: 12, 12: 24, 1000: 96, None: 96}
    shares = [[layer[0] / sum(layer) for layer in policies(slots).budget.slots] for slots in (600, 6000)]
    assert shares[0] == pytest.approx(shares[1], abs=0.01)


def test_chunk_sizes_move_the_cuts_and_nothing_else_and_share_what_the_encoders_made(tmp_path) -> None:
    backbone = load_backbone(ModelOptions(path=str(write_folder(tmp_path / "model", rates="tiny"))))
    write_mp4(draw_world(3, 8), tmp_path / "film.mp4")
    messages = (Message(role="user", content="what ?"), Message(role="assistant", content="red"))
    sample = Sample(id="film", video=tmp_path / "film.mp4", audio=None, messages=messages)
    feeder = Feeder(backbone, StreamOptions(chunk_tokens=36, max_pixels=12544), tmp_path / "cache")
    made, kept = feeder.open(sample), feeder.open(sample)
    assert len(list((tmp_path / "cache").iterdir())) == 2  # an entry per track
    counts = {}
    whole = None
    for size in (None, 18, 72):
        for source in (made, kept):
            chunks = list(feeder.chunks([source], size))
            counts[size] = [chunk.count for chunk in chunks[1:]]
            joined = [torch.cat([chunk.embeddings for chunk in chunks], dim=1)]
            joined += [torch.cat([chunk.positions for chunk in chunks], dim=2)]
            joined += [torch.cat([chunk.modality for chunk in chunks], dim=1)]
            whole = whole or joined
            assert all(torch.equal(a, b) for a, b in zip(whole, joined, strict=True))
    assert counts == {None: [36, 36], 18: [18] * 4, 72: [72]}
    other = Feeder(backbone, StreamOptions(chunk_tokens=18, max_pixels=12544), tmp_path / "cache")
    other.open(sample)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_chunk_that_some_step_may_draw_too_small_is_refused_at_the_first_one() -> None:
    segments = opened(7, (None,), ["red"]).segments  # of 6 tokens
    TuningOptions().check_segments(segments)
    TuningOptions(chunk_tokens=(6, 72)).check_segments(segments)
    for sizes in ((72, 5), ChunkRange(low=5, high=72)):
        with pytest.raises(LayoutError, match=r"^tuning.chunk_tokens: a segment has 6 tokens, more than a chunk of 5;"):
            TuningOptions(chunk_tokens=sizes).check_segments(segments)


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("tuning.budgets=[64, ful]", "tuning.budgets.1: expected a whole number or a number or 'full' or 'self'"),
        ("tuning.budgets=[64, 0]", "tuning.budgets: tuning.budgets holds 0; a budget is at least 1 slot"),
        ("tuning.budgets=[64.0]", "tuning.budgets: tuning.budgets holds 64.0; a number with a point is a share of"),
        ("tuning.budgets=[self, 0.001]", "tuning.budgets.1: 0 is too small; each layer needs one slot"),
        ("tuning.budgets={low: 64, high: 12}", "tuning.budgets.high: high = 12 is below low = 64"),
        ("tuning.budgets={low: 3, high: 12, full: 25}", "tuning.budgets.full: full must be between 0 and 1, got 25"),
        ("tuning.budgets={low: 3, high: 12, ful: 0.2}", "tuning.budgets.ful: unknown key; did you mean 'full'?"),
        ("tuning.chunk_tokens=[72, 0]", "tuning.chunk_tokens: tuning.chunk_tokens holds 0; a chunk has at least 1"),
        ("tuning.loss.answer=0", "tuning.loss.answer: loss: all weights are 0"),
        ("tuning.loss.full_memory_kl=1", "tuning.loss.full_memory_kl: expected a section of key: value lines, got 1"),
        ("tuning.loss.full_memory_kl={temperature: 0}", "tuning.loss.full_memory_kl.temperature: temperature = 0 of"),
    ],
)
def test_each_wrong_curriculum_or_loss_is_one_line_at_its_key(override, what, tmp_path) -> None:
    (line,) = problems(tmp_path, overrides=[override])
    assert line.startswith(f"command line {what}")


def test_budgets_relative_to_the_evaluated_one_follow_it_and_are_drawn_as_numbers_were() -> None:
    relative, numbers = (plan_of(budgets=budgets) for budgets in (("self", "self", 0.5, "full"), (18, 18, 9, "full")))
    assert [relative(step, 40) for step in range(40)] == [numbers(step, 40) for step in range(40)]
    for name, slots in (("tiny.yaml", 36), ("budget8k.yaml", 4096)):
        run = load(name, [f"memory.slots_per_layer={slots}"])
        assert slots in run.tuning.budgets
        refuse_unseen_budget(run)
    assert load("tiny.yaml").tuning.budgets == (18, 18, "full")


@pytest.mark.parametrize(
    ("budgets", "drawn"),
    [
        ("[32, full]", "32, full"),
        ("[0.5]", "32"),
        ("{low: 12, high: 32}", "12 to 32"),
        ("{low: 12, high: 64, full: 1.0}", "12 to 64, full in 100% of the steps"),
        ("[]", None),
        ("[full]", None),
        ("[1.0, 0.5]", None),
        ("{low: 12, high: 64, full: 0.5}", None),
    ],
)
def test_a_run_that_never_trains_at_the_budget_of_its_evaluation_is_refused(budgets, drawn, tmp_path) -> None:
    run = loaded(tmp_path, f"tuning.budgets={budgets}")
    with nullcontext() if drawn is None else pytest.raises(ConfigError) as error:
        refuse_unseen_budget(run)
    if error is not None:
        (line,) = error.value.problems
        assert f"memory.slots_per_layer = 64, and no step trains at it (drawn: {drawn}); set" in line


@pytest.mark.parametrize(
    ("budgets", "steps"),
    [
        ((18, "full"), 2),
        (("self", 9, "full"), 3),
        ((), 1),
        (("full",), 0),
        (BudgetRange(low=12, high=64, full=0.9), 40),
    ],
)
def test_so_few_steps_that_none_draws_the_budget_of_evaluation_are_said(budgets, steps) -> None:
    """`steps`: from this number on every seed draws it; a control of full memory alone is for no budget."""
    for seed in range(6):
        plan = plan_of(seed, budgets=budgets)
        assert plan.untrained(max(1, steps)) == []
        for few in range(1, steps):
            drawn = {plan(step, few).slots for step in range(few)}
            hit = drawn != {None} if isinstance(budgets, BudgetRange) else 18 in drawn
            assert bool(plan.untrained(few)) is not hit


def test_the_least_of_a_range_leaves_each_modality_a_slot(tmp_path) -> None:
    split = "memory.budget={name: split, visual_audio_ratio: 2}"
    (line,) = problems(tmp_path, overrides=[split, "tuning.budgets={low: 1, high: 12}"])
    assert line == ("command line tuning.budgets.low: 1 is too small; each layer needs one audio and one visual slot")
    assert loaded(tmp_path, "tuning.budgets={low: 1, high: 12}").tuning.budgets == BudgetRange(low=1, high=12)
