"""GGUF files: every tensor type that is read, and files that are not."""

import numpy as np
import pytest
import torch
from support.gguf_file import write

from omnimem.pretrained.gguf import GGUF, WeightsError

VALUES = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)


@pytest.mark.parametrize(("kind", "bound"), [(0, 0.0), (1, 2e-3), (2, 0.35), (3, 0.25), (8, 0.02)])
def test_a_tensor_of_each_type_comes_back(tmp_path, kind, bound) -> None:
    stored = GGUF(write(tmp_path / "a.gguf", {"general.alignment": 32}, {"x": (VALUES, kind), "y": (VALUES, 0)}))
    difference = (stored.tensor("x") - torch.from_numpy(VALUES)).abs()
    assert float(difference.max()) <= bound
    assert torch.equal(stored.tensor("y"), torch.from_numpy(VALUES))


@pytest.mark.parametrize("kind", [0, 1, 2, 3, 8])
def test_equals_the_gguf_package(tmp_path, kind) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (extra real)")
    path = write(tmp_path / "a.gguf", {"general.architecture": "llama"}, {"x": (VALUES, kind)})
    tensor = gguf.GGUFReader(path).tensors[0]
    theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(VALUES.shape)
    assert np.array_equal(GGUF(path).tensor("x").numpy(), theirs)


def test_metadata_of_each_type(tmp_path) -> None:
    table = {"a": 7, "b": 0.5, "c": "naïve", "d": True, "e": ["x", "yz"], "f": [1, 2, 3]}
    assert dict(GGUF(write(tmp_path / "a.gguf", table, {})).metadata) == table


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda raw: b"", "no GGUF"),
        (lambda raw: b"PK" + raw[2:], "no GGUF"),
        (lambda raw: raw[:4] + b"\x09" + raw[5:], "version 9"),
        (lambda raw: raw[:40], "too early"),
        (lambda raw: raw[:-64], "cut off"),
        (lambda raw: raw.replace(b"x" + b"\x02\0\0\0", b"z" + b"\x02\0\0\0"), "no tensor x"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, damage, word) -> None:
    path = write(tmp_path / "a.gguf", {"general.architecture": "llama"}, {"x": (VALUES, 0)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(WeightsError, match=word) as raised:
        GGUF(path).tensor("x")
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_type_that_is_not_read_is_named(tmp_path) -> None:
    path = write(tmp_path / "a.gguf", {"k": 1}, {"x": (VALUES, 0)})
    raw = path.read_bytes()
    at = raw.index(b"x\x02\0\0\0") + 1 + 4 + 16
    path.write_bytes(raw[:at] + b"\x0e" + raw[at + 1 :])
    with pytest.raises(WeightsError, match="type 14"):
        GGUF(path).tensor("x")
