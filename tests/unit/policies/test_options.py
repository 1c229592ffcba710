"""Policies in a config: named, with presets of their source; what cannot be is refused on one line, exit code 2."""

from pathlib import Path

import pytest
from support.configs import written_out
from support.policy_streams import OPTIONS

from omnimem.budget import Budget
from omnimem.config import ConfigError, RunConfig, dump, load
from omnimem.policies import PerturbationOptions
from omnimem.policies.baselines.presets import allotted

CONFIG = """\
name: small
model: {path: Qwen/Qwen2.5-Omni-7B}
memory: {policy: {name: NAME}, slots_per_layer: 64, budget: {name: split}}
"""
KINDS = sorted({options.name for options in OPTIONS.values()})


def loaded(folder: Path, name: str, *overrides: str) -> RunConfig:
    file = folder / "my.yaml"
    file.write_text(CONFIG.replace("NAME", name))
    return load(file, overrides)


def refused(folder: Path, name: str, *overrides: str) -> str:
    """The one line that `load` complains with."""
    with pytest.raises(ConfigError) as error:
        loaded(folder, name, *overrides)
    (line,) = error.value.problems
    return line


@pytest.mark.parametrize("name", KINDS)
def test_every_policy_is_chosen_by_name_and_survives_being_written_and_read(name, tmp_path) -> None:
    run = loaded(tmp_path, name)
    assert run.memory.policy.name == name
    assert run.memory.policy.build(Budget.shared(4, 8)).name == name
    (tmp_path / "again.yaml").write_text(dump(run))
    assert written_out(load(tmp_path / "again.yaml")) == written_out(run)


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("distinct", "omnimem")])
def test_an_unknown_preset_is_refused_with_those_there_are(name, tmp_path) -> None:
    line = refused(tmp_path, name, "memory.policy.preset=as_publishd")
    assert line.startswith("command line memory.policy.preset: expected 'as_published'")
    assert "got 'as_publishd'; did you mean 'as_published'?" in line


@pytest.mark.parametrize(
    ("name", "override", "what"),
    [
        ("snapkv", "kernel=4", "policy.kernel = 4 must be odd and at least 1"),
        ("pyramidkv", "beta=0.5", "policy.beta = 0.5 must be at least 1; at 1 all layers have the same slots"),
        ("h2o", "recent_share=2.0", "policy.recent_share = 2 must be between 0 and 1"),
        ("infinipot_v", "grid=slots", "expected 'slot' or 'true', got 'slots'"),
        ("streammem", "threshold=3.0", "policy.threshold = 3 is a cosine; give a number from -1 to 1"),
        ("streaming_llm", "sinks=-1", "policy.sinks = -1 must be at least 0"),
        ("hermes", "smoothing=[0.1, 0.3, 4.0]", "policy.smoothing = [0.1, 0.3, 4.0] must be between 0 and 1"),
        ("recent_frames", "frames=0", "policy.frames = 0 must be at least 1"),
        ("omnimem", "coverage_above=1.0", "policy.coverage_above = 1 must be a cosine from -1 to below 1"),
        ("omnimem", "query_stride=0", "policy.query_stride = 0 must be at least 1"),
        ("h2o", "query_stride=-2", "policy.query_stride = -2 must be at least 1"),
        ("omnimem", "query_stride=2.5", "whole number"),
        ("distinct", "query_stride=4", "unknown key; known: name, coverage"),  # as all that measure no mass
        ("snapkv", "query_stride=4", "unknown key; known: name, preset"),
        ("random", "query_stride=4", "unknown key; known: name, preset"),
        ("paper", "compared=sketch", "policy.compared = sketch needs neighbours = arrival: redundancy in the pool"),
        ("distinct", "coverage=-0.5", "policy.coverage = -0.5 must be a number of at least 0"),
        ("keydiff", "window=3", "unknown key; known: name, preset, per_head"),
    ],
)
def test_settings_that_cannot_be_are_refused(name, override, what, tmp_path) -> None:
    assert what in refused(tmp_path, name, f"memory.policy.{override}")


@pytest.mark.parametrize(
    ("name", "mode", "what"),
    [
        ("snapkv", "states", "policy snapkv keeps other tokens in every head; set it to full"),
        ("hermes", "states", "policy hermes merges tokens; set it to full"),
        ("hermes", "released", "released selects by similarity, not by policy hermes; set it to full"),
    ],
)
def test_a_gradient_mode_that_cannot_follow_the_policy_is_refused(name, mode, what, tmp_path) -> None:
    line = refused(tmp_path, name, f"tuning.gradient={mode}", "tuning.selection.softening=hard")
    assert line.endswith(what)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_presets_spend_the_same_slots_as_one_pool_or_in_the_given_split(options) -> None:
    given = Budget(slots=((3, 9), (2, 4), (6, 12)))
    budget = options.build(given).budget
    assert budget is not None
    assert budget.total == given.total
    if options.name not in ("distinct", "omnimem", "similarity"):
        assert budget.split == (options.preset == "shared_split")


def test_a_total_that_layers_cannot_share_alike_is_still_spent_to_the_slot() -> None:
    budget = allotted(Budget(slots=((3, 9), (2, 4), (6, 13))), "as_published")
    assert budget is not None
    assert sorted(sum(slots) for slots in budget.slots) == [12, 12, 13]
    assert allotted(None, "as_published") is None


@pytest.mark.parametrize(
    ("given", "compared", "bits", "width"),
    [
        ({}, "sketch", 2, 256),
        ({"feature": 8}, "sketch", 2, 8),
        ({"sketch_bits": 4}, "sketch", 4, 192),
        ({"sketch_bits": 4, "feature": 7}, "sketch", 4, 7),
        ({"sketch_bits": 16}, "sketch", 16, 128),
        ({"coverage": 0.0}, None, 16, 0),  # nothing is compared, nothing carried
        ({"compared": "values"}, "values", 16, 0),
        ({"compared": "inputs"}, "inputs", False, None),
        ({"compared": "inputs", "feature": 5}, "inputs", False, 5),  # a projection that redundancy reads too
        ({"neighbours": "pool"}, "inputs", False, None),
        ({"name": "paper", "neighbours": "arrival"}, None, False, None),
        ({"name": "paper", "neighbours": "arrival", "compared": "sketch", "coverage": 0.5}, "sketch", 2, 256),
    ],
)
def test_what_is_compared_decides_what_is_carried(given, compared, bits, width) -> None:
    """Bits per number of a sketch (False: no sketch) and width; None: the whole layer input; 0: nothing."""
    policy = PerturbationOptions(**given).build(Budget.shared(2, 8))
    assert policy.traits.compared == compared
    assert (policy.measures.sketch, policy.measures.feature) == (bits, width)
    assert PerturbationOptions(**given).written_out().build(Budget.shared(2, 8)) == policy


@pytest.mark.parametrize("name", ["omnimem", "paper", "released", "h2o"])
def test_a_stride_reaches_what_is_measured_and_is_written_out(name, tmp_path) -> None:
    given = loaded(tmp_path, name, "memory.policy.query_stride=4").memory
    assert [run.policy.build(None).measures.query_stride for run in (given, given.written_out())] == [4, 4]
    usual = loaded(tmp_path, name).memory
    assert usual.policy.build(None).measures.query_stride == 1
    if name != "h2o":
        assert usual.written_out().policy.query_stride == 1


def test_a_stride_without_attention_is_refused(tmp_path) -> None:
    what = "policy.query_stride = 4 has no effect with sharpness = 0"
    assert what in refused(tmp_path, "omnimem", "memory.policy.query_stride=4", "memory.policy.sharpness=0.0")
    for stride in ("1", "null"):
        loaded(tmp_path, "omnimem", f"memory.policy.query_stride={stride}", "memory.policy.sharpness=0.0")


@pytest.mark.parametrize(
    ("setting", "what"), [("feature=6", "6 must be a multiple of 4"), ("centred=false", "false compares directions")]
)
def test_what_a_sketch_of_2_bits_cannot_hold_is_refused_and_4_bits_hold_it(setting, what, tmp_path) -> None:
    line = refused(tmp_path, "omnimem", f"memory.policy.{setting}")
    assert what in line
    assert "set sketch_bits to 4" in line
    assert loaded(tmp_path, "omnimem", f"memory.policy.{setting}", "memory.policy.sketch_bits=4")
    assert loaded(tmp_path, "omnimem", f"memory.policy.{setting}", "memory.policy.compared=inputs")


def test_a_sketch_in_the_pool_is_refused_by_the_preset_s_neighbours_too(tmp_path) -> None:
    assert "needs neighbours = arrival" in refused(
        tmp_path, "omnimem", "memory.policy.compared=sketch", "memory.policy.neighbours=pool"
    )
    assert "policy.feature = 0 must be at least 1" in refused(tmp_path, "omnimem", "memory.policy.feature=0")
