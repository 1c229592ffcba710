"""`omnimem ask --policy` takes every policy of the library but the oracle."""

import pytest
import torch
from support import families
from support.models import text_model

from omnimem.backbones import ModelOptions, load_backbone
from omnimem.budget import Budget
from omnimem.cli.asking import POLICIES, Asking, Question, check_used, policy_of
from omnimem.commands.ask import _parser
from omnimem.commands.list import policies
from omnimem.config import ConfigError
from omnimem.policies import PerturbationOptions
from omnimem.streaming.attach import attach, shape_of
from omnimem.streaming.feeder import Feeder
from omnimem.streaming.options import StreamOptions
from omnimem.tokens import Modality


def test_every_listed_policy_can_be_asked_with() -> None:
    assert set(POLICIES) == {name for name, _ in policies()} - {"oracle"}


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_built_with_its_slots(name) -> None:
    given = _parser().parse(["--model", "models/tiny", "--video", "a.mp4", "--slots", "9", "--policy", name, "what ?"])
    layers = shape_of(text_model("qwen2_5_omni")).layers
    built = policy_of(given, None, layers)
    assert built.name == name
    assert built.budget is not None
    assert built.budget.total == 9 * layers


@pytest.mark.parametrize("slots", [[], ["--slots", "full"]], ids=["none", "full"])
@pytest.mark.parametrize("option", [["--policy", "snapkv"], ["--selection-from", "base"]], ids=lambda o: o[0])
def test_an_option_about_what_is_kept_is_refused_where_everything_is(option, slots) -> None:
    call = ["--model", "models/tiny", "--video", "a.mp4", *slots, *option, "what ?"]
    with pytest.raises(ConfigError, match=f"{' '.join(option)}: everything is kept.*give --slots N"):
        check_used(_parser().parse(call), None)
    check_used(_parser().parse([*call, "--slots", "9"]), None)
    check_used(_parser().parse([*call[:4], *slots, "what ?"]), None)


@pytest.mark.parametrize(("name", "stamped"), [("qwen3_vl", True), ("qwen2_5_vl", False)])
def test_text_that_layers_hold_beside_their_slots_is_named(name, stamped, tmp_path) -> None:
    backbone = load_backbone(ModelOptions(path=str(families.write(tmp_path / name, name))), "cpu")
    feeder = Feeder(backbone, StreamOptions(tracks="video"))
    asking = Asking(feeder=feeder, max_new_tokens=1)
    with torch.no_grad(), attach(backbone.text_model) as attached:
        stream = feeder.stream(attached, PerturbationOptions(markers="keep").build(Budget.shared(3, 6)))
        (reply,) = asking.replies(stream, families.noise(backbone, 8.0, tracks="video"), [Question(text="what ?")])
    held = int((stream.memory.layers[0].modality == Modality.TEXT).sum())
    assert (f"text held in each layer, outside the slots: {held} tokens" in reply.cost) == stamped
    assert len(reply.cost) == 3 + stamped
