"""adapter_config.json: settings that run code, change the base or contradict the weights are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.finished_run import write_adapter
from support.planted import plain
from support.thinkers import write_folder

from omnimem.backbones import ModelOptions, load_backbone
from omnimem.tuning import AdapterError, load_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("base") / "m", rates="tiny")


def changed(base: Path, folder: Path, **settings: Any) -> Path:
    file = write_adapter(base, folder, seed=1) / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return folder


def loaded(base: Path, folder: Path) -> list[torch.Tensor]:
    model = load_adapter(load_backbone(ModelOptions(path=str(base))).model, folder)
    return [
        part.scaling["default"] * part.lora_B["default"].weight for part in model.modules() if hasattr(part, "lora_B")
    ]


@pytest.mark.parametrize(
    ("setting", "value", "shown"),
    [
        ("r", 8, "the weights have rank 4"),
        ("r", 10**6, "the weights have rank 4"),
        ("r", "4", "the weights have rank 4"),
        ("r", 4.0, "the weights have rank 4"),
        ("use_rslora", "yes", "yes is not true or false"),
        ("use_dora", 1, "1 is not true or false"),
        ("lora_alpha", float("nan"), "nan is not a number above 0"),
        ("lora_alpha", float("inf"), "inf is not a number above 0"),
        ("lora_alpha", -8, "-8 is not a number above 0"),
        ("lora_alpha", None, "None is not a number above 0"),
        ("lora_alpha", True, "True is not a number above 0"),
        ("lora_dropout", 1.5, "1.5 is not a number in [0, 1)"),
        ("init_lora_weights", "pissa", "pissa would change the base model"),
        ("init_lora_weights", "olora", "olora would change the base model"),
        ("init_lora_weights", ["x"], "would change the base model"),
        ("megatron_core", "planted", "planted is not supported"),
        ("megatron_config", {"x": 1}, "is not supported"),
        ("auto_mapping", {"parent_library": "planted", "base_model_class": "X"}, "is not supported"),
        ("modules_to_save", {"visual": 1}, "is not a list of module names"),
        ("layer_replication", [[0, 2], [0, 2]], "is not supported"),
        ("alpha_pattern", {"q_proj": 99}, "is not supported"),
        ("bias", "all", "all is not supported"),
        ("peft_type", "VERA", "is not that of a LoRA adapter"),
    ],
)
def test_settings_that_contradict_the_weights_or_do_more_are_refused(setting, value, shown, base, tmp_path) -> None:
    with pytest.raises(AdapterError) as error:
        loaded(base, changed(base, tmp_path / "a", **{setting: value}))
    assert shown in str(error.value)
    assert f"{tmp_path / 'a' / 'adapter_config.json'}: " in str(error.value)


def test_a_regular_expression_is_replaced_by_the_modules_of_the_weights(base, tmp_path) -> None:
    """One that takes exponential time is never run."""
    expected = loaded(base, write_adapter(base, tmp_path / "a", seed=1))
    for number, targets in enumerate([r"((a|o|.)+)+\.nothing$", "("]):
        got = loaded(base, changed(base, tmp_path / f"b{number}", target_modules=targets))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True))


def test_weights_in_a_pickle_are_not_read(base, tmp_path) -> None:
    folder = write_adapter(base, tmp_path / "a", seed=1)
    (folder / "adapter_model.safetensors").unlink()
    plain(folder / "adapter_model.bin", tmp_path / "ran")
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors is missing"):
        loaded(base, folder)
    assert not (tmp_path / "ran").exists()
