"""Backbones: the only files that depend on a model family."""

from omnimem.backbones.base import Backbone, Encoded, LayoutError, ModelOptions, Turn, collate
from omnimem.backbones.files import CheckpointError
from omnimem.backbones.load import load_backbone

__all__ = ["Backbone", "CheckpointError", "Encoded", "LayoutError", "ModelOptions", "Turn", "collate", "load_backbone"]
