"""Checkpoints that transformers reads without an error, and that would give wrong results: one clear line each."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import families

from omnimem.backbones import CheckpointError, ModelOptions, load_backbone
from omnimem.backbones.load import family_of, read_shapes
from omnimem.errors import UserError

QUERY = "layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], Path]:
    """A copy of the folder of a family, which is written once."""
    made: dict[str, Path] = {}

    def find(name: str, folder: Path) -> Path:
        if name not in made:
            made[name] = families.write(tmp_path_factory.mktemp("faults") / name, name)
        return Path(shutil.copytree(made[name], folder))

    return find


def refused(folder: Path) -> str:
    """The one line with which a checkpoint is refused."""
    with pytest.raises(UserError) as caught:
        load_backbone(ModelOptions(path=str(folder)), "cpu")
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def change_weight(folder: Path, part: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Replace the first weight whose name has a part, or remove it."""
    weights = load_file(folder / "model.safetensors")
    key = next(key for key in sorted(weights) if part in key)
    weights[key] = change(weights[key])
    kept = {name: tensor.contiguous() for name, tensor in weights.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def change_json(folder: Path, name: str, at: tuple[str, ...], value: Any) -> None:
    table = inner = json.loads((folder / name).read_text())
    inner = inner.get("thinker_config", inner)
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    (folder / name).write_text(json.dumps(table))


@pytest.mark.parametrize(
    ("name", "part", "change", "what"),
    [
        ("qwen3_vl", QUERY, lambda w: w[:5], r"1 weight of other shapes .*\[5, 64\] in the files, \[64, 64\]"),
        ("video_salmonn2_plus", "q_tokens", lambda w: w.mT, r"q_tokens, \[1, 24, 1\] in the files, \[1, 1, 24\]"),
        ("qwen2_5_vl", QUERY, lambda w: w.to(torch.int8), r"stored as I8.*not quantized"),
        ("qwen3_omni", QUERY, lambda w: w.to(torch.float8_e4m3fn), r"stored as F8_E4M3.*not quantized"),
        ("video_salmonn2_plus", "q_tokens", lambda w: w.to(torch.int32), r"stored as I32"),
        ("qwen3_vl", "deepstack", lambda w: w * torch.nan, r"deepstack.* not finite"),
        ("video_salmonn2_plus", "audio_proj", lambda w: w / 0, r"audio_proj.* not finite"),
    ],
)
def test_weights_of_another_shape_or_type_or_not_finite_are_named(name, part, change, what, copied, tmp_path) -> None:
    folder = copied(name, tmp_path / "m")
    change_weight(folder, part, change)
    with pytest.raises(CheckpointError, match=what):
        load_backbone(ModelOptions(path=str(folder)), "cpu")


def test_large_finite_weights_are_read(copied, tmp_path) -> None:
    folder = copied("qwen3_vl", tmp_path / "m")
    change_weight(folder, QUERY, lambda w: w.sign() * 3e38)
    load_backbone(ModelOptions(path=str(folder)), "cpu")


@pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_vl", "video_salmonn2_plus_qwen2_5"])
@pytest.mark.parametrize("extra", ["lora_A.weight", "layers.9.mlp.up_proj.weight"])
def test_weights_without_a_place_are_named_in_every_family(name, extra, copied, tmp_path) -> None:
    folder = copied(name, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    tree = next(key for key in weights if key.endswith("input_layernorm.weight")).partition("layers.")[0]
    save_file(weights | {f"{tree}{extra}": torch.ones(2, 2)}, folder / "model.safetensors", metadata={"format": "pt"})
    assert extra in refused(folder)


@pytest.mark.parametrize(
    ("name", "at", "value", "what"),
    [
        ("video_salmonn2_plus", ("audio_config", "second_per_window"), 0, "0 and 2 states, and a window of 8 s has 16"),
        ("video_salmonn2_plus", ("audio_config", "second_stride"), -1, "are 2 and -2 states"),
        ("video_salmonn2_plus_qwen2_5", ("audio_config", "second_per_window"), 9.0, "are 18 and 2 states"),
        ("video_salmonn2_plus_qwen2_5", ("audio_config", "hop_length"), 160, "audio_config: second_per_window"),
        ("qwen3_vl", ("vision_config", "deepstack_visual_indexes"), [0, 0], "are not different blocks"),
        ("qwen3_vl", ("vision_config", "deepstack_visual_indexes"), [0, 2], "are not different blocks"),
        ("video_salmonn2_plus", ("vision_config", "deepstack_visual_indexes"), [1, 0], "are not different blocks"),
        ("qwen3_omni", ("text_config", "rope_parameters", "mrope_section"), [4, 4, 4], "has 12 frequencies"),
        ("qwen2_5_vl", ("rope_scaling", "mrope_section"), [1, 1], "has 2 frequencies"),
        ("qwen2_5_vl", ("vision_config", "window_size"), 0, "window_size = 0 of the vision encoder"),
        ("qwen2_5_omni", ("vision_config", "window_size"), -112, "window_size = -112"),
        ("video_salmonn2_plus_qwen2_5", ("vision_config", "window_size"), 27, "no token of 28 x 28 pixels"),
        ("qwen3_vl_moe", ("text_config", "num_experts_per_tok"), 5, "is not between 1 and num_experts = 4"),
        ("qwen3_omni", ("text_config", "num_experts_per_tok"), 0, "num_experts_per_tok = 0"),
        ("qwen3_vl", ("text_config", "rms_norm_eps"), None, "rms_norm_eps"),
        ("qwen3_vl", ("text_config", "num_hidden_layers"), "3", "num_hidden_layers"),
        ("qwen3_vl", ("model_type",), ["qwen3_vl"], "is no known family"),
        ("qwen3_vl", ("torch_dtype",), "float7", "float7"),
    ],
)
def test_settings_that_would_be_followed_wrongly_are_refused_by_load_and_dry_run(
    name, at, value, what, copied, tmp_path
) -> None:
    folder = copied(name, tmp_path / "m")
    change_json(folder, "config.json", at, value)
    assert what in refused(folder)
    with pytest.raises(UserError) as caught:
        read_shapes(folder)
    assert what in str(caught.value)


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_omni", "video_salmonn2_plus_qwen2_5"])
@pytest.mark.parametrize(
    ("change", "what"), [(lambda w: w + 1, "other values"), (lambda w: w[:5], "shape [5, "), (lambda w: w, "")]
)
def test_a_head_beside_the_embeddings_that_it_is_tied_to_must_equal_them(name, change, what, tmp_path) -> None:
    folder = families.write(tmp_path / "m", name, tied=True)
    weights = load_file(folder / "model.safetensors")
    (embeddings,) = (weight for key, weight in weights.items() if key.endswith("embed_tokens.weight"))
    weights["lm_head.weight"] = change(embeddings).clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if what:
        assert f"lm_head.weight has {what}" in refused(folder)
    else:
        load_backbone(ModelOptions(path=str(folder)), "cpu")


@pytest.mark.parametrize("method", [{"quant_method": "fp8"}, {"quant_method": "awq", "bits": 4}])
def test_quantized_checkpoints_are_refused_by_name(method, copied, tmp_path) -> None:
    folder = copied("qwen3_vl", tmp_path / "m")
    change_json(folder, "config.json", ("quantization_config",), method)
    assert f"quantized ({method['quant_method']})" in refused(folder)


@pytest.mark.parametrize("key", ["image_mean", "image_std"])
@pytest.mark.parametrize("value", [[0.5, 0.5], "abc", [0.5, 0.5, None], [0.5, 0.5, float("nan")]])
def test_normalisation_that_is_not_three_numbers_is_refused(key, value, copied, tmp_path) -> None:
    folder = copied("qwen3_vl", tmp_path / "m")
    change_json(folder, "preprocessor_config.json", (key,), value)
    assert f"{key} is" in refused(folder)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "video_salmonn2_plus", "qwen3_omni"])
def test_a_folder_without_tokenizer_files_is_refused(name, copied, tmp_path) -> None:
    folder = copied(name, tmp_path / "m")
    for file in folder.glob("*token*"):
        file.unlink()
    refused(folder)


def test_a_tokenizer_without_the_special_tokens_or_with_more_than_the_model_is_refused(copied, tmp_path) -> None:
    folder = copied("video_salmonn2_plus", tmp_path / "m")
    words = families.tokenizer()
    words.add_tokens([f"word{number}" for number in range(50)])
    words.save_pretrained(folder)
    assert "embeddings; give the model's own tokenizer" in refused(folder)
    families.build_tokenizer().save_pretrained(folder)
    assert "does not know <|vision_start|>, <|video_pad|>, <|vision_end|>" in refused(folder)


def test_a_folder_with_weights_of_another_format_says_so(copied, tmp_path) -> None:
    folder = copied("qwen3_vl", tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "has no .safetensors file (only pytorch_model.bin" in refused(folder)


@pytest.mark.parametrize("given", [7, None, ["qwen3_vl"], {"a": 1}])
def test_a_model_type_that_is_no_text_is_no_family(given) -> None:
    with pytest.raises(CheckpointError, match="no known family"):
        family_of({"model_type": given}, "m")
