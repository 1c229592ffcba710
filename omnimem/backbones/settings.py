"""Reading a checkpoint in the hub's layout: weights, preprocessor settings, chat template."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations import deepspeed
from transformers.utils import cached_file

from omnimem.backbones.base import ModelOptions
from omnimem.backbones.files import (
    AGAIN,
    EMBEDDINGS,
    HEAD,
    CheckpointError,
    require_finite,
    require_one_head,
    require_size,
    require_weights,
)
from omnimem.textfile import StoredFileError, read_stored

# files with settings of the feature extractor and video processor; a later one counts
PREPROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
PROJECTION = re.compile(  # of decoder layers; encoders match nowhere
    r"(?:(?:.*\.)?(?:model|language_model)\.)?layers\.\d+\.(?:self_attn|mlp)\.(?:q|k|v|o|gate|up|down)_proj"
)
Module = TypeVar("Module", bound=nn.Module)


def preprocessor_settings(path: str, wanted: Iterable[str]) -> dict[str, Any]:
    """Settings of the feature extractor and video processor, from the files that transformers 4 and 5 write.

    On the hub preprocessor_config.json holds all of them. save_pretrained of transformers 4 writes those of the video
    processor to video_preprocessor_config.json, transformers 5 writes all to processor_config.json.
    """
    table: dict[str, Any] = flattened(*(read_json(path, name) or {} for name in PREPROCESSORS))
    missing = [name for name in wanted if name not in table]
    if missing:
        raise CheckpointError(
            f"{path}: no {' or '.join(PREPROCESSORS)} has {', '.join(missing)}; copy preprocessor_config.json from the "
            "model's hub page"
        )
    return table


def flattened(*tables: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of all parts of preprocessor files in one table; a later one counts."""
    table: dict[str, Any] = {"sampling_rate": 16000}
    for found in tables:
        parts = [found.get(part) or {} for part in ("image_processor", "video_processor", "feature_extractor")]
        table |= {key: value for part in (found, *parts) for key, value in part.items()}
    return table


def chat_template(path: str) -> str | None:
    """The template of the processor, which replaces the tokenizer's as in Qwen2_5OmniProcessor; None: no file."""
    if (found := _file(path, "chat_template.jinja")) is not None:
        return found.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json"):
        template = (read_json(path, name) or {}).get("chat_template")
        if isinstance(template, str):
            return template
        if template is not None:
            raise CheckpointError(
                f"{path}: chat_template in {name} is not one text; copy {name} again from the model's hub page"
            )
    return None


def read_json(path: str, name: str) -> dict[str, Any] | None:
    """The object in a file of the checkpoint; None without the file. Raises CheckpointError when it is damaged."""
    if (found := _file(path, name)) is None:
        return None
    try:
        return read_stored(found, dict[str, Any], AGAIN)
    except StoredFileError as error:
        raise CheckpointError(str(error)) from error


def _file(path: str, name: str) -> Path | None:
    """A file of a local folder or of a hub id."""
    found = cached_file(
        path, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return None if found is None else Path(found)


_paths: WeakKeyDictionary[nn.Module, dict[object, str]] = WeakKeyDictionary()


def only(model: nn.Module, kind: type[Module] | tuple[type[Module], ...]) -> Module:
    """The only submodule of a class, or of several, at any depth, which depends on the version of transformers.

    Its path is searched once per model.
    """
    paths = _paths.setdefault(model, {})
    if kind not in paths:
        paths[kind] = path_of(model, kind)
    return cast(Any, model.get_submodule(paths[kind]))


def path_of(model: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> str:
    """The path of the only submodule of a class, or of several."""
    (found,) = (name for name, module in model.named_modules() if isinstance(module, kind))
    return found


@contextmanager
def _without_zero3() -> Iterator[None]:
    """Inside, models are constructed as without DeepSpeed: ZeRO-3 would partition each part of them (transformers)."""
    active = deepspeed._hf_deepspeed_config_weak_ref  # pyright: ignore[reportPrivateUsage] - it has no reader
    settings = active and active()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if settings is not None:
            deepspeed.set_hf_deepspeed_config(settings)


def load_model(options: ModelOptions, model_class: Any, config: Any) -> PreTrainedModel:
    """The weights of a checkpoint in a class of transformers, from safetensors only; no code of it is run.

    Raises CheckpointError when weights are missing or of another shape, which transformers would fill with random
    numbers, when weights are left over, which it would ignore, and when a weight is not finite.
    """
    if (method := getattr(config, "quantization_config", None)) is not None:
        kind = method.get("quant_method") if isinstance(method, Mapping) else method
        raise CheckpointError(
            f"{options.path}: config.json says that the weights are quantized ({str(kind)[:60]}), which is not "
            "supported; give the checkpoint in full precision, and model.quantization: 4bit to save memory"
        )
    with _without_zero3(), torch.device("meta"):
        outline = model_class(config)
    weights = dict(outline.named_parameters(remove_duplicate=False))
    ends = {id(weight) for name, weight in weights.items() if name.endswith((HEAD, EMBEDDINGS))}
    if len(ends) == 1:  # tied
        require_one_head(options.path)
    require_size(options.path, sum(weight.numel() for weight in outline.parameters()))
    model, found = model_class.from_pretrained(
        options.path,
        **_quantized(options, outline),
        dtype=getattr(torch, options.dtype),
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that they are named below
    )
    require_weights(options.path, found)
    require_finite(options.path, model)
    return model


def _quantized(options: ModelOptions, outline: nn.Module) -> dict[str, Any]:
    """Arguments of `from_pretrained` for `options.quantization`: encoders, head and gates stay as they are."""
    if options.quantization is None:
        return {}
    linear = (name for name, module in outline.named_modules() if isinstance(module, nn.Linear))
    kept = [re.escape(name) for name in linear if not PROJECTION.fullmatch(name)]
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, options.dtype),
        llm_int8_skip_modules=kept,  # used for 4 bits too
    )
    return {"quantization_config": settings, "device_map": {"": torch.cuda.current_device()}}
