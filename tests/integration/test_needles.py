"""benchmarks/softening.py and gates.py: which token is which, what is kept of it, and what learning gates cost."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from types import ModuleType

import numpy as np
import pytest
import torch
from support.paths import ROOT
from support.thinkers import write_folder

from omnimem.backbones import ModelOptions, Qwen25Omni
from omnimem.budget import SharedBudget
from omnimem.commands.synthesize import Stream, manifest_line
from omnimem.config import ConfigError
from omnimem.data import Sample, read_manifest
from omnimem.policies import PerturbationOptions
from omnimem.recall.renderer import CELL, SAMPLE_RATE, render_audio, render_frames, write_mp4
from omnimem.recall.worlds import GRID, World, draw_world
from omnimem.streaming.attach import attach
from omnimem.streaming.feeder import Feeder
from omnimem.streaming.options import StreamOptions
from omnimem.tokens import Modality

PER_GRID = GRID * GRID + 2  # tokens of 2 s


def benchmark(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return import_module(name)


@pytest.fixture(scope="module")
def softening() -> ModuleType:
    return benchmark("softening")


@pytest.fixture(scope="module")
def gates() -> ModuleType:
    return benchmark("gates")


def marked(softening: ModuleType, world: World, *kinds: str) -> set[int]:
    """Places of the tokens of these kinds."""
    return {place for place, token in enumerate(softening.tokens_of(world)) if token.kind in kinds}


def seen(world: World) -> np.ndarray:
    """Pixels of every visual token: [stretch of 2 s, cell, ...]."""
    frames = render_frames(world).astype(np.int16)
    cells = frames.reshape(-1, 2, 3, GRID, CELL, GRID, CELL)
    return cells.transpose(0, 3, 5, 1, 2, 4, 6).reshape(len(frames) // 2, GRID * GRID, -1)


@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize(
    ("kinds", "without"),
    [
        (("symbol", "decoy"), lambda world: replace(world, events=())),
        (("decoy",), lambda world: replace(world, events=tuple(e for e in world.events if e.utterance))),
        (("flicker",), lambda world: replace(world, flickers=())),
    ],
    ids=["events", "decoys", "flickers"],
)
def test_a_token_is_marked_exactly_when_the_renderer_shows_it_so(
    softening: ModuleType, seed: int, kinds: tuple[str, ...], without: Callable[[World], World]
) -> None:
    """Its pixels change when what it is marked for is left out of the world; a symbol hides flicker before or after."""
    world = draw_world(seed, 64)
    changed = (seen(world) != seen(without(world))).any(axis=-1)
    found = {PER_GRID * grid + cell for grid, cell in zip(*changed.nonzero(), strict=True)}
    hidden = marked(softening, world, "symbol", "decoy") if kinds == ("flicker",) else set()
    assert marked(softening, world, *kinds) == found - hidden
    assert len(found) > 5


@pytest.mark.parametrize("seed", [3, 4])
def test_an_audio_token_is_a_word_exactly_when_its_second_is_spoken_in(softening: ModuleType, seed: int) -> None:
    world = draw_world(seed, 64)
    difference = np.abs(render_audio(world) - render_audio(replace(world, utterances=())))
    spoken = difference.reshape(64, SAMPLE_RATE).mean(axis=1) > 1e-3
    found = {PER_GRID * (second // 2) + GRID * GRID + second % 2 for second in spoken.nonzero()[0].tolist()}
    assert marked(softening, world, "word") == found
    assert len(found) == len(world.utterances)


def test_every_question_has_its_needle_and_no_decoy_is_asked_about(softening: ModuleType) -> None:
    world = draw_world(3, 64)
    tokens = softening.tokens_of(world)
    asked = {question.key for question in world.questions if question.kind != "auditory"}
    shapes = {kind: {world.events[t.needle].shape for t in tokens if t.kind == kind} for kind in ("symbol", "decoy")}
    assert shapes["symbol"] == asked
    assert shapes["decoy"]
    assert not shapes["decoy"] & asked


def test_needles_count_once_and_their_tokens_each(softening: ModuleType) -> None:
    tokens = [
        softening.Token(Modality.VISUAL, "symbol", 0),
        softening.Token(Modality.VISUAL, "symbol", 0),
        softening.Token(Modality.VISUAL, "symbol", 1),
        softening.Token(Modality.AUDIO, "word", 0),
        softening.Token(Modality.AUDIO, "babble"),
    ]
    found = softening.counts(frozenset({0, 1, 3, 4}), tokens)
    assert (found["symbols"], found["symbol tokens"], found["words"], found["babble tokens"]) == (1, 2, 1, 1)
    first, second = frozenset({0, 1, 3}), frozenset({0, 2, 3})
    assert softening.overlap(first, second, tokens, Modality.VISUAL) == 0.5
    assert softening.overlap(first, second, tokens, Modality.AUDIO) == 1.0
    read = softening.Read(name="a", tokens=tokens, before=[first, second], after=[second, second])
    row = softening.summary([read, replace(read, name="b")])["rows"]["symbol tokens"]
    assert row["there"] == 3
    cell = row["kept"]["0"]
    assert (cell["before"], cell["after"], cell["diff"], cell["low"], cell["high"]) == (2, 2, 0, 0, 0)
    assert row["kept"]["any layer"]["before"] == 3


def test_a_paired_difference_has_the_interval_of_its_streams(softening: ModuleType) -> None:
    change = np.random.default_rng(0).normal(1.0, 2.0, 400)
    cell = softening.paired([str(n) for n in range(400)], [0.0] * 400, change.tolist())
    half = 1.96 * change.std() / 20
    assert cell.diff == pytest.approx(change.mean())
    assert (cell.low, cell.high) == pytest.approx((change.mean() - half, change.mean() + half), abs=0.03)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Feeder, Sample]:
    """A random thinker of the tiny checkpoint's rates, and a stream of the recall task."""
    folder = tmp_path_factory.mktemp("needles")
    world = draw_world(3, 12)
    write_mp4(world, folder / "videos.mp4")
    line = {**manifest_line(Stream(id="one", world=world)), "video": "videos.mp4"}
    (folder / "test.jsonl").write_text(f"{json.dumps(line)}\n")
    (sample,) = read_manifest(folder / "test.jsonl")
    backbone = Qwen25Omni.load(ModelOptions(path=str(write_folder(folder / "model", rates="tiny"))))
    return Feeder(backbone, StreamOptions(chunk_tokens=40)), sample


def test_places_kept_are_those_of_the_worlds_tokens(softening: ModuleType, recorded: tuple[Feeder, Sample]) -> None:
    feeder, sample = recorded
    opened, tokens = feeder.open(sample), softening.tokens_of(softening.world_of(sample))
    with attach(feeder.backbone.text_model) as attached:
        softening.check_layout(attached, feeder, opened, tokens)
        for slots in (None, 7):
            policy = PerturbationOptions().build(slots and SharedBudget().build(attached.shape.layers, slots))
            (places,) = softening.places_of(attached, feeder, policy, [opened])
            assert [len(layer) for layer in places] == [slots or len(tokens)] * attached.shape.layers
            assert set().union(*places) <= set(range(len(tokens)))
        with pytest.raises(ConfigError, match="the worlds know 107"):
            softening.check_layout(attached, feeder, opened, tokens[:-1])
    with pytest.raises(ConfigError, match="drawn by other rules"):
        softening.world_of(replace(sample, meta={**sample.meta, "seed": 4}))


# ------------------------------------------------------------------------------------------ what gates that learn cost


def test_a_gate_costs_an_eighth_and_the_naive_ways_queries_times_keys_for_all_heads(gates: ModuleType) -> None:
    rows = {}
    for queries in (64, 128):
        inputs = gates.drawn(queries, 3 * queries, 8, 2, 64)
        rows |= {(way, queries): gates.measure(way, inputs) for way in gates.WAYS}
        q, k, _, gate = (tensor.numel() * 4 for tensor in inputs)
        everything = 8 * queries * 3 * queries * 4
        assert rows["mass: ours", queries].saved == q + k + gate
        plain, gated = rows["attention, no gate", queries], rows["attention, gate: ours", queries]
        assert gated.saved <= plain.saved * 9 / 8 + gate
        for naive in ("attention, gate: naive", "mass: naive"):
            assert rows[naive, queries].saved > everything
    assert math.isclose(rows["mass: ours", 128].saved / rows["mass: ours", 64].saved, 2, rel_tol=0.01)


def test_the_ways_compared_compute_the_same(gates: ModuleType) -> None:
    inputs = gates.drawn(32, 96, 8, 2, 64)
    for ours, naive in ((gates.gated, gates.biased), (gates.received, gates.stored)):
        found = []
        for way in (ours, naive):
            leaves = [tensor.clone().requires_grad_() for tensor in inputs]
            output = way(*leaves)
            slopes = torch.autograd.grad(output.square().sum(), leaves, allow_unused=True)
            found.append([output, *(slope for slope in slopes if slope is not None)])
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_soft_step_holds_three_memories_and_a_straight_through_one_what_a_hard_one_holds(gates: ModuleType) -> None:
    found = {step.selection: step for step in gates.steps(2)}
    hard = found["hard"]
    for name, step in found.items():
        assert step.memory == (3 if name.startswith("soft") else 1) * hard.memory
        assert step.seconds > 0
    assert found["soft"].peak > found["straight_through"].peak > hard.peak
