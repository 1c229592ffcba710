"""benchmarks/softening.py and gates.py: which token is which, what is kept of it, and what learning gates cost."""

import math
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from types import ModuleType

import numpy as np
import pytest
from support.paths import ROOT

from omnimem.recall.renderer import CELL, SAMPLE_RATE, render_audio, render_frames
from omnimem.recall.worlds import GRID, World, draw_world

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
