"""The model families, and the choice of the family of a checkpoint."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from omnimem.absent import why_absent
from omnimem.backbones.assembled import AssembledFamily
from omnimem.backbones.base import Backbone, ModelOptions
from omnimem.backbones.family import Family
from omnimem.backbones.files import AGAIN, CheckpointError, ShapesError, require_whole
from omnimem.backbones.qwen2_5_omni import Qwen25OmniFamily
from omnimem.backbones.qwen2_5_vl import Qwen25VLFamily
from omnimem.backbones.qwen3_omni import Qwen3OmniFamily
from omnimem.backbones.qwen3_vl import Qwen3VLFamily
from omnimem.backbones.settings import read_json
from omnimem.backbones.shapes import Shapes
from omnimem.backbones.video_salmonn2_plus import VideoSalmonn2PlusFamily
from omnimem.backbones.video_salmonn2_plus_qwen2_5 import VideoSalmonn2PlusQwen25Family
from omnimem.checksums import SEAL, damage, is_sealed
from omnimem.errors import first_line, lacks_memory
from omnimem.extras import require
from omnimem.run import RunFolder
from omnimem.shipped import shipped
from omnimem.textfile import StoredFileError, read_stored

# the first that claims a config.json loads it
FAMILIES: tuple[Family, ...] = (
    VideoSalmonn2PlusFamily(),
    VideoSalmonn2PlusQwen25Family(),
    Qwen3VLFamily(),
    Qwen3OmniFamily(),
    Qwen25OmniFamily(),
    Qwen25VLFamily(),
    AssembledFamily(),
)


def load_backbone(options: ModelOptions, device: torch.device | str | None = None) -> Backbone:
    """Load the checkpoint at `options.path`, frozen, on `device` (None: the GPU if there is one).

    The path is a local folder, a folder that is distributed with the package (`models/tiny`) or a hub id; config.json
    decides the family. Raises CheckpointError when a file is missing or differs from sealed.json of an export, or no
    family knows the configuration.
    """
    check_quantization(options)
    options = replace(options, path=checked_path(options.path))
    backbone = family_at(options.path).load(options)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    nn.Module.to(backbone.model.requires_grad_(False), place)
    return backbone


def check_quantization(options: ModelOptions) -> None:
    """Raises CheckpointError if `quantization` has no GPU, ModuleNotFoundError without bitsandbytes."""
    if options.quantization is None:
        return
    if not torch.cuda.is_available():
        what = f"model.quantization = {options.quantization} needs a GPU"
        raise CheckpointError(f"{what}; set it to null (the weights are then those of model.dtype)")
    require("bitsandbytes")


def checked_path(path: str) -> str:
    """The path of a checkpoint, which may be distributed with the package (`shipped`).

    Raises CheckpointError for a folder that differs from its sealed.json.
    """
    path = shipped(path)
    if is_sealed(Path(path)) and (what := damage(Path(path))):
        raise CheckpointError(
            f"{path}: {what}; restore the file or export again; without {SEAL} the folder is not checked"
        )
    return path


def family_at(path: str) -> Family:
    """The family of a local folder or hub id. Raises CheckpointError without a readable config.json of a family."""
    if not Path(path).exists() and (cure := why_absent(path, "")):
        raise CheckpointError(f"model.path: {path} does not exist; {cure}")
    if what := _of_training(Path(path)):
        raise CheckpointError(f"model.path: {path} {what}")
    try:
        config = read_json(path, "config.json")
    except CheckpointError:
        if Path(path).is_dir():
            require_whole(Path(path))  # which names a damaged file
        raise
    except OSError:
        config = None
    if config is None:
        raise CheckpointError(
            f"model.path: {path} cannot be loaded (it has no config.json, or cannot be reached); give a local folder "
            "with config.json, weights and tokenizer, or a hub id that can be reached"
        )
    return family_of(config, path)


def _of_training(path: Path) -> str | None:
    """What a folder of training is, and what takes it; None for any other folder, such as a model."""
    if (path / "config.json").exists():
        return None
    run = RunFolder(path=path)
    if run.record.is_file() and run.config.is_file():
        export = f"omnimem export --run {path} --format merged --out DIR"
        if not run.adapter.is_dir():
            return f"is the folder of a run, which is not finished; resume it, and then `{export}` writes a model"
        return f"is the folder of a run; `{export}` writes a model, or give its base, and {run.adapter} as the adapter"
    if (path / "adapter_config.json").is_file():
        return "is an adapter; give its base, and this folder as the adapter (--adapter, model.adapter)"
    return None


def family_of(config: Mapping[str, Any], origin: str | Path) -> Family:
    """The family that claims a parsed config.json; raises CheckpointError if none does."""
    named = isinstance(config.get("model_type"), str)
    found = next((family for family in FAMILIES if family.claims(config)), None) if named else None
    if found is None:
        known = ", ".join(family.name for family in FAMILIES)
        raise CheckpointError(
            f"{origin}: model_type = {config.get('model_type')!r} in config.json is no known family; give a model of "
            f"{known}"
        )
    return found


def read_shapes(path: Path) -> Shapes:
    """Sizes from a checkpoint folder, or from one file that holds both configurations (configs/models).

    Raises ShapesError when a file is missing or damaged, or no family knows the configuration.
    """
    config, preprocessor = read_tables(path)
    family = family_of(config, path)
    try:
        return family.shapes(config, preprocessor)
    except ShapesError:
        raise
    except Exception as error:  # transformers raises errors of every class for values that it does not expect
        if lacks_memory(error):
            raise
        reason = f"no key {error}" if isinstance(error, KeyError) else first_line(error)
        raise ShapesError(
            f"{path}: is not the configuration of a {family.name} model ({reason}); copy it again from the model's page"
        ) from error


def read_tables(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and the preprocessor's settings, from a folder or from one file that holds both."""
    try:
        if not path.is_dir():
            table = read_stored(path, dict[str, Any], AGAIN)
            return table, table.get("preprocessor_config") or {}
        names = ("preprocessor_config.json", "processor_config.json")
        beside = next((path / name for name in names if (path / name).is_file()), None)
        preprocessor = {} if beside is None else read_stored(beside, dict[str, Any], AGAIN)
        return read_stored(path / "config.json", dict[str, Any], AGAIN), preprocessor
    except StoredFileError as error:
        raise ShapesError(str(error)) from error
