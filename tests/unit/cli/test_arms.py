"""Arms that need little memory come first."""

from itertools import permutations

import pytest

from omnimem.backbones import Backbone, ModelOptions
from omnimem.backbones.qwen2_5_omni import Qwen25Omni
from omnimem.backbones.qwen2_5_vl import Qwen25VL
from omnimem.backbones.qwen3_omni import Qwen3Omni
from omnimem.backbones.qwen3_vl import Qwen3VL
from omnimem.backbones.video_salmonn2_plus import VideoSalmonn2Plus
from omnimem.backbones.video_salmonn2_plus_qwen2_5 import VideoSalmonn2PlusQwen25
from omnimem.budget import Budget
from omnimem.cli.arms import ARMS, BY_COST, applicable, by_cost, check_readable, left_out, unevicted, without_adapter
from omnimem.config import ConfigError, RunConfig
from omnimem.evaluation import Arm
from omnimem.policies.baselines.controls import ControlOptions

WITHOUT_BUDGET = ("full_memory", "tuned_full_memory", "vision_only", "audio_only")


@pytest.mark.parametrize("names", [*permutations(("full_memory", "training_free", "blind")), ARMS], ids=str)
def test_arms_that_keep_everything_come_last(names) -> None:
    ordered = by_cost(names)
    assert sorted(ordered) == sorted(names)
    kept = [name in WITHOUT_BUDGET for name in ordered]
    assert kept == sorted(kept)
    assert ordered[-1].endswith("full_memory")


def test_every_arm_has_a_place() -> None:
    assert sorted(BY_COST) == sorted(ARMS)


@pytest.mark.parametrize(
    ("family", "probes"),
    [
        (Qwen25Omni, {"blind", "vision_only", "audio_only"}),
        (Qwen3Omni, {"blind", "vision_only", "audio_only"}),
        (Qwen3VL, {"blind", "text_only", "tuned_text_only"}),
        (Qwen25VL, {"blind"}),
        (VideoSalmonn2Plus, {"blind", "vision_only", "audio_only", "text_only", "tuned_text_only"}),
        (VideoSalmonn2PlusQwen25, {"blind", "vision_only", "audio_only"}),
    ],
)
def test_probes_are_those_that_the_model_can_read(family: type[Backbone], probes: set[str]) -> None:
    model = object.__new__(family)
    run = RunConfig(name="a", model=ModelOptions(path="b"))
    names = applicable(run, tuned=True, backbone=model)
    assert set(names) == {"full_memory", "training_free", "tuned", "tuned_full_memory"} | probes
    check_readable(names, model)
    said = [] if "vision_only" in probes else ["arm vision_only is left out: the model reads this track alone"]
    assert [line.partition(", so")[0] for line in left_out(run, model)] == said
    if "audio_only" not in probes:
        with pytest.raises(ConfigError, match="--arm audio_only: the model has no audio encoder"):
            check_readable(ARMS, model)


@pytest.mark.parametrize(
    ("slots", "arrived", "kept", "said"),
    [
        (9, 6.0, 6.0, True),  # every stream fits
        (9, 20.0, 9.0, False),
        (9, 6.5, 6.0, False),  # one of them does not
        (9, 0.0, 0.0, False),  # text alone
        (None, 6.0, 6.0, False),  # full memory keeps everything by its name
    ],
)
def test_an_arm_that_evicted_nothing_says_so(slots, arrived, kept, said) -> None:
    budget = None if slots is None else Budget.shared(2, slots)
    arm = Arm(name="a", policy=ControlOptions(name="uniform").build(budget), tracks="both")
    cost = {"tokens_in": {"audio": arrived, "visual": 0.0}, "kept": {"audio": kept, "visual": 0.0}}
    assert unevicted(arm, {"cost": cost}).startswith("nothing was evicted") == said


def test_arms_without_an_adapter_are_named(tmp_path) -> None:
    assert str(tmp_path / "adapter") in without_adapter(tmp_path / "adapter")[0]
