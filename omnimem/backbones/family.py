"""A model family: what is known of a checkpoint from its configuration files, without weights."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from omnimem.backbones.base import Backbone, ModelOptions
from omnimem.backbones.projectors import Projector, Track
from omnimem.backbones.shapes import Shapes

Table: TypeAlias = Mapping[str, Any]  # a parsed configuration file


class Family(ABC):
    """One file of `omnimem.backbones`, and one entry of `FAMILIES` in load.py."""

    name: str  # in messages
    sizes: str  # the published models, for `omnimem list models`
    described: bool = True  # a dry run can plan with it: `shapes` and `skeleton` work
    # modules that hold the decoder layers in adapters of the release (first), and of other versions of transformers
    trees: tuple[str, ...] = ()

    @abstractmethod
    def claims(self, config: Table) -> bool:
        """Whether a config.json is of this family; the first family of `FAMILIES` that claims it loads it."""

    def owns(self, model: PreTrainedModel) -> bool:
        """Whether a loaded model is of this family."""
        return self.claims(model.config.to_dict())

    @abstractmethod
    def load(self, options: ModelOptions) -> Backbone:
        """Load a checkpoint; raises CheckpointError when a file is missing or damaged."""

    @abstractmethod
    def shapes(self, config: Table, preprocessor: Table) -> Shapes:
        """Sizes of a checkpoint; raises KeyError, TypeError or ValueError for configurations of another family."""

    @abstractmethod
    def skeleton(
        self, config: Table, preprocessor: Table, tokenizer: PreTrainedTokenizerBase, system: str | None
    ) -> Backbone:
        """The backbone without weights (meta device): it lays out streams and prompts, but encodes nothing."""

    def projectors(self, model: nn.Module) -> Mapping[Track, Projector]:
        """`Backbone.projectors` of a loaded model."""
        return {}

    def adapter_key(self, key: str, tree: str) -> str | None:
        """The key of an adapter's weight where `tree` holds the decoder layers; None: it is of none of `trees`."""
        found = re.fullmatch(r"base_model\.model\.([^0-9]+)\.(layers\.\d+\..+)", key)
        return f"base_model.model.{tree}.{found[2]}" if found and found[1] in self.trees else None


def weights_of(model: PreTrainedModel) -> int:
    """Number of weights of a model; tied ones count once."""
    return sum(weight.numel() for weight in model.parameters())


def on_meta(model_class: Any, config: Any) -> Any:
    """A model without weights, for its sizes."""
    with torch.device("meta"):
        return model_class._from_config(config)
