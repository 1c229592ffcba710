"""Backbones: the only files that depend on a model family."""

from omnimem.backbones.base import Backbone, Encoded, LayoutError, ModelOptions, Turn, collate
from omnimem.backbones.files import CheckpointError
from omnimem.backbones.load import load_backbone
from omnimem.backbones.qwen2_5_omni import Qwen25Omni

__all__ = [
    "Backbone",
    "CheckpointError",
    "Encoded",
    "LayoutError",
    "ModelOptions",
    "Qwen25Omni",
    "Turn",
    "collate",
    "load_backbone",
]
