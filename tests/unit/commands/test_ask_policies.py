"""`omnimem ask --policy` takes every policy of the library but the oracle."""

import pytest
from support.models import text_model

from omnimem.cli.asking import POLICIES, policy_of
from omnimem.commands.ask import _parser
from omnimem.commands.list import policies
from omnimem.streaming.attach import shape_of


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
