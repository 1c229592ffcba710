"""Memory of a training step, counted tensor by tensor: one chunk at a time, and nothing left when it is over."""

from importlib import import_module
from typing import Any

import pytest
from support.paths import ROOT

from omnimem.budget import SplitBudget
from omnimem.policies import PerturbationOptions

TOKENS, WIDTH, LAYERS, SLOTS = 24, 64, 2, 12


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows() -> dict[str, list[Any]]:
    """By way: streams of 4, 8 and 12 chunks of one size, measured by benchmarks/activations.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        activations = import_module("activations")
    model = activations.text_model(WIDTH, LAYERS)
    policy = PerturbationOptions().build(SplitBudget(visual_audio_ratio=5.0).build(LAYERS, SLOTS))
    activations.measure(model, policy, activations.WAYS[0], 1, TOKENS)
    return {
        way.name: [activations.measure(model, policy, way, count, TOKENS) for count in (4, 8, 12)]
        for way in activations.WAYS
    }


def test_a_step_needs_one_chunk_at_a_time_and_leaves_nothing_behind(rows: dict[str, list[Any]]) -> None:
    embeddings, scalars = TOKENS * WIDTH * 4, 1024  # of losses and positions, a chunk
    for name, (few, some, many) in rows.items():
        assert few.left == some.left == many.left == 0, name
        growth = [(second.peak - first.peak) / 4 for first, second in ((few, some), (some, many))]
        if name == "no recomputation":
            assert min(growth) > 10 * many.memory
        elif "offload" in name:
            assert max(growth) <= scalars, name
            assert many.host - some.host == 4 * (many.memory + embeddings)
        elif "horizon" in name or name == "states":
            assert max(growth) == 0, name  # chunks out of reach leave nothing
        elif name in ("released", "paper"):  # the lower of two layers: its input and memory
            waiting = embeddings + many.memory // 2
            assert waiting <= min(growth) <= max(growth) <= waiting + scalars, name
        else:
            assert many.memory + embeddings <= min(growth) <= max(growth) <= many.memory + embeddings + scalars, name


def test_recomputing_layers_too_needs_less_at_the_peak(rows: dict[str, list[Any]]) -> None:
    for name in ("full", "full, offload"):
        assert rows[f"{name}, by layer"][0].peak < 0.8 * rows[name][0].peak
