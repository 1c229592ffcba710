"""Adapters under the names of every version and release of their family; those of other models are refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import families
from support.finished_run import write_adapter
from torch import Tensor

from omnimem.backbones import Backbone, ModelOptions, load_backbone
from omnimem.backbones.load import family_at
from omnimem.tuning import AdapterError, LoraOptions, load_adapter
from omnimem.tuning.adapter_names import fitted
from omnimem.tuning.lora import name_as_released

LORA = LoraOptions(r=4, alpha=8.0, targets=("q_proj", "k_proj", "v_proj"))
BEFORE = "base_model.model."


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A family's base and an adapter for it, written once."""
    made: dict[str, tuple[Path, Path]] = {}

    def find(name: str) -> tuple[Path, Path]:
        if name not in made:
            place = tmp_path_factory.mktemp(name)
            base = families.write(place / "base", name)
            made[name] = base, write_adapter(base, place / "adapter", lora=LORA)
        return made[name]

    return find


def backbone_of(base: Path) -> Backbone:
    return load_backbone(ModelOptions(path=str(base)), "cpu")


def weights_of(base: Path, folder: Path) -> dict[str, Tensor]:
    model = load_adapter(backbone_of(base).model, folder)
    return {key: weight for key, weight in model.named_parameters() if "lora_" in key}


def copy_of(adapter: Path, folder: Path, change: Callable[[str], str], **settings: object) -> Path:
    """The adapter with other names and settings."""
    folder.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({change(key): tensor for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    table = json.loads((adapter / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(table | settings))
    return folder


def tree_in(adapter: Path) -> str:
    key = next(iter(load_file(adapter / "adapter_model.safetensors")))
    return key.removeprefix(BEFORE).partition(".layers.")[0]


@pytest.mark.parametrize("name", families.NAMES)
def test_adapters_of_every_tree_are_read_and_those_of_the_release_written(adapter, name, tmp_path) -> None:
    base, own = adapter(name)
    trees, ours, expected = family_at(str(base)).trees, tree_in(own), load_file(own / "adapter_model.safetensors")
    assert ours in trees
    # 1. in
    model = backbone_of(base).model
    for tree in trees:
        moved = {key.replace(f"{BEFORE}{ours}.", f"{BEFORE}{tree}."): each for key, each in expected.items()}
        found = fitted(moved, model, ("q_proj", "k_proj", "v_proj"))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], weight) for key, weight in expected.items())
    # 2. out, and in again
    out = copy_of(own, tmp_path / "out", str)
    name_as_released(out, model)
    assert tree_in(out) == trees[0]
    targets = json.loads((out / "adapter_config.json").read_text())["target_modules"]
    assert targets.replace("\\", "").split("|")[0] == f"{trees[0]}.layers.0.self_attn.k_proj"
    loaded = {key.replace(".default", ""): weight for key, weight in weights_of(base, out).items()}
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], weight) for key, weight in expected.items())


@pytest.mark.parametrize(
    ("name", "change", "shown"),
    [
        ("qwen3_vl", lambda key: key.replace("model.language_model", "thinker.model"), "no module of a Qwen3-VL"),
        ("qwen2_5_omni", lambda key: "talker" + key[key.index(".layers") :], "no module of a Qwen2.5-Omni"),
        ("qwen3_vl", lambda key: key.replace("language_model.layers", "visual.blocks"), "no module of a"),
        ("qwen3_vl", lambda key: key.replace("layers.2.", "layers.7."), "matches 6 of 18 weights"),
        ("qwen3_vl", lambda key: key.replace("q_proj", "wq"), "no module of a"),
    ],
)
def test_weights_without_a_module_are_refused(adapter, name, change, shown, tmp_path) -> None:
    base, own = adapter(name)
    folder = copy_of(own, tmp_path / "a", change)
    with pytest.raises(AdapterError) as error:
        weights_of(base, folder)
    assert shown in str(error.value)
    assert "\n" not in str(error.value)


def narrow(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor[:, :32].contiguous() if "lora_A" in key else tensor for key, tensor in tensors.items()}


def wide(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.cat([tensor, tensor]) if "lora_B" in key else tensor for key, tensor in tensors.items()}


def shallow(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if ".layers.2." not in key}


def without_one(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if "layers.1.self_attn.v_proj" not in key}


def without_keys(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if "k_proj" not in key}


def whole_numbers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: (tensor * 100).to(torch.int8) for key, tensor in tensors.items()}


BARE = ["q_proj", "k_proj", "v_proj"]
RELEASED = "|".join(rf"model\.language_model\.layers\.{n}\.self_attn\.{name}" for n in range(3) for name in BARE)


@pytest.mark.parametrize("targets", [BARE, None, RELEASED, RELEASED.replace("\\", "").split("|")])
@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (narrow, "k_proj has 64 inputs, and the adapter is for 32"),
        (wide, "k_proj has 32 outputs, and the adapter is for"),
        (shallow, "no weights for 3 of 9 modules that it names, as model.language_model.layers.2.self_attn.q_proj"),
        (without_one, "no weights for 1 of 9 modules that it names, as model.language_model.layers.1.self_attn.v_proj"),
        (without_keys, "no weights for 3 of 9 modules that it names"),
        (whole_numbers, "holds whole numbers"),
    ],
)
def test_an_adapter_of_another_size_or_with_fewer_weights_is_refused(adapter, change, shown, targets, tmp_path) -> None:
    base, own = adapter("qwen3_vl")
    folder = copy_of(own, tmp_path / "a", str, **({} if targets is None else {"target_modules": targets}))
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(AdapterError) as error:
        weights_of(base, folder)
    assert shown in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_under_the_names_of_two_trees_are_refused(adapter, tmp_path) -> None:
    base, own = adapter("qwen2_5_vl")
    folder, trees = copy_of(own, tmp_path / "a", str), family_at(str(base)).trees
    tensors, ours = load_file(own / "adapter_model.safetensors"), f"{BEFORE}{tree_in(own)}."
    other = next(f"{BEFORE}{tree}." for tree in trees if f"{BEFORE}{tree}." != ours)
    save_file(
        tensors | {key.replace(ours, other): each + 1 for key, each in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    with pytest.raises(AdapterError, match="two of its weights are for"):
        weights_of(base, folder)


def test_an_adapter_of_some_layers_by_its_own_pattern_is_read(adapter, tmp_path) -> None:
    base, own = adapter("qwen3_vl")
    folder = copy_of(own, tmp_path / "a", str, target_modules=r".*layers\.[01]\.self_attn\.[qkv]_proj")
    file = folder / "adapter_model.safetensors"
    save_file(shallow(load_file(file)), file)
    assert len(weights_of(base, folder)) == 12
