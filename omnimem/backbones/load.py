"""Chooses the family of a checkpoint."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from omnimem.backbones.assembled import FAMILY, Assembled
from omnimem.backbones.base import Backbone, ModelOptions
from omnimem.backbones.files import CheckpointError
from omnimem.backbones.qwen2_5_omni import Qwen25Omni
from omnimem.checksums import SEAL, damage, is_sealed
from omnimem.limits import read_within
from omnimem.shipped import shipped


def load_backbone(options: ModelOptions, device: torch.device | str | None = None) -> Backbone:
    """Load the checkpoint at `options.path`, frozen, on `device` (None: the GPU if there is one).

    The path is a local folder, a folder that is distributed with the package (`models/tiny`) or a hub id. The family
    is Qwen2.5-Omni, unless config.json names the assembled one. Raises CheckpointError when a file is missing, or
    differs from sealed.json of an export.
    """
    options = replace(options, path=shipped(options.path))
    if is_sealed(Path(options.path)) and (what := damage(Path(options.path))):
        raise CheckpointError(
            f"{options.path}: {what}; restore the file or export again; without {SEAL} the folder is not checked"
        )
    family = Assembled if model_type(Path(options.path)) == FAMILY else Qwen25Omni
    backbone = family.load(options)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    nn.Module.to(backbone.model.requires_grad_(False), place)
    return backbone


def model_type(folder: Path) -> str | None:
    """The model_type in the config.json of a local folder; None where there is none."""
    try:
        table = json.loads(read_within(folder / "config.json").decode())
    except (OSError, ValueError, RecursionError):  # a hub id, or a folder that its family refuses with a reason
        return None
    return table.get("model_type") if isinstance(table, dict) else None
