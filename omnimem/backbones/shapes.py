"""Sizes of a checkpoint, known from its configuration files alone."""

from dataclasses import dataclass
from math import prod
from typing import final

import torch

from omnimem.media import Geometry
from omnimem.memory import Memory, Shape
from omnimem.sketches import Bits, stored
from omnimem.tokens import TOKEN_AXES


@final
@dataclass(frozen=True, kw_only=True)
class TextShape:
    """The decoder: grouped-query attention and gated MLP."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    dim: int  # of one head
    inner: int  # width of the MLP that a token passes; with experts the sum of those that it passes
    vocabulary: int
    experts: bool = False  # the MLP has no projections that LoRA may adapt

    def projection(self, name: str) -> tuple[int, int]:
        """(inputs, outputs) of a projection that LoRA may adapt; raises KeyError for another one."""
        queries, keys = self.heads * self.dim, self.kv_heads * self.dim
        known = {
            "q_proj": (self.width, queries),
            "k_proj": (self.width, keys),
            "v_proj": (self.width, keys),
            "o_proj": (queries, self.width),
        }
        if not self.experts:
            known |= {
                "gate_proj": (self.width, self.inner),
                "up_proj": (self.width, self.inner),
                "down_proj": (self.inner, self.width),
            }
        return known[name]


@final
@dataclass(frozen=True, kw_only=True)
class VisionShape:
    """The vision encoder: patches through transformer blocks."""

    width: int
    inner: int
    channels: int
    patch: int
    temporal_patch: int
    levels: int = 0  # deepstack features beside each visual token

    @property
    def row(self) -> int:
        """Values per patch."""
        return self.channels * self.temporal_patch * self.patch**2


@final
@dataclass(frozen=True, kw_only=True)
class AudioShape:
    """The audio encoder: mel frames, halved once, through transformer layers."""

    width: int
    inner: int
    mels: int


@final
@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Sizes and time resolution of a checkpoint, read from its configuration files."""

    text: TextShape
    vision: VisionShape
    audio: AudioShape | None  # None: the model has no audio encoder
    geometry: Geometry
    parameters: int  # number of weights that are loaded
    trained_positions: int
    pass_seconds: float | None = None  # of media in one pass of the encoders, if that is less than 32 segments

    def entry(
        self, feature: int, dtype: torch.dtype, *, sketch: Bits | None = None, places: int = 0
    ) -> tuple[int, int]:
        """Bytes of one token in the memory of one layer: (keys and values, side state).

        `sketch`: the feature is a sketch of so many bits per number; `places`: parts of a place that are carried.
        """
        # 1. an empty memory
        held, kind = (feature, None) if sketch is None else stored(feature, sketch, learns=False)
        shape = Shape(
            layers=1,
            kv_heads=self.text.kv_heads,
            dim=self.text.dim,
            width=self.text.width,
            feature=held,
            dtype=dtype,
            device=torch.device("meta"),
            sketch=kind,
            places=places,
        )
        tokens = Memory.empty(shape, batch=1).layers[0]
        # 2. bytes per token: all axes but that of the tokens
        sizes = {
            name: prod(size for number, size in enumerate(tensor.shape) if number != axis) * tensor.element_size()
            for (name, axis), tensor in zip(TOKEN_AXES.items(), tokens.tensors(), strict=True)
        }
        key_value = sizes.pop("keys") + sizes.pop("values")
        return key_value, sum(sizes.values())
