"""Backbones: the only files that depend on a model family."""

from omnimem.backbones.base import Backbone, Encoded, LayoutError, ModelOptions, Turn, collate
from omnimem.backbones.qwen2_5_omni import Qwen25Omni, load_backbone

__all__ = ["Backbone", "Encoded", "LayoutError", "ModelOptions", "Qwen25Omni", "Turn", "collate", "load_backbone"]
