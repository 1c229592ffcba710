"""`model.quantization`: which modules are quantized, and where it is refused. No weights are quantized here."""

from typing import Any

import pytest
import torch
from support.thinkers import write_folder

import omnimem.extras
from omnimem.backbones import ModelOptions, load_backbone, settings
from omnimem.backbones.files import CheckpointError
from omnimem.backbones.load import check_quantization
from omnimem.config import ConfigError, load
from omnimem.training.arguments import refuse_adapter, train_section


def four(path: str = "models/tiny") -> ModelOptions:
    return ModelOptions(path=path, dtype="bfloat16", quantization="4bit")


def test_without_a_gpu_it_is_one_line(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CheckpointError, match=r"model\.quantization = 4bit needs a GPU; set it to null"):
        load_backbone(four())
    check_quantization(ModelOptions(path="models/tiny"))


def test_without_the_package_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(omnimem.extras, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError) as error:
        check_quantization(four())
    assert omnimem.extras.missing_extra(error.value) == (
        "bitsandbytes is not installed; pip install 'omnimem[quantize]'"
    )


def test_projections_of_decoder_layers_alone_are_quantized(tmp_path, monkeypatch) -> None:
    """The arguments of `from_pretrained`, applied by the rule of transformers."""
    asked: list[dict[str, Any]] = []
    folder = write_folder(tmp_path / "m", rates="tiny")
    plain = load_backbone(ModelOptions(path=str(folder)))
    kind = type(plain.model)
    stock = kind.from_pretrained

    def from_pretrained(*given: Any, **options: Any) -> Any:
        asked.append({name: options.pop(name) for name in ("quantization_config", "device_map")})
        return stock(*given, **options)

    monkeypatch.setattr(kind, "from_pretrained", from_pretrained)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    settings.load_model(four(str(folder)), kind, plain.model.config)
    (options,) = asked
    config = options["quantization_config"]
    assert options["device_map"] == {"": 0}
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    should_convert = pytest.importorskip("transformers.quantizers.quantizers_utils").should_convert_module
    linear = [name for name, module in plain.model.named_modules() if isinstance(module, torch.nn.Linear)]
    chosen = {name for name in linear if should_convert(name, config.llm_int8_skip_modules)}
    decoder = [name for name, _ in plain.text_model.named_modules() if name.endswith("_proj")]
    assert {name[name.index("layers.") :] for name in chosen} == set(decoder)
    assert not [name for name in chosen if "audio" in name or "visual" in name]


def test_zero3_is_refused() -> None:
    stage = ("model.quantization=4bit", "train.deepspeed=deepspeed/zero3.json")
    with pytest.raises(ConfigError, match=r"model\.quantization = 4bit: ZeRO-3 partitions weights that are not packed"):
        refuse_adapter(load("tiny.yaml", stage, train=train_section()))
