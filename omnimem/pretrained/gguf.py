"""Reads GGUF files: metadata, and tensors as float32 (format: ggml-org/ggml, docs/gguf.md, versions 2 and 3)."""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from omnimem.errors import UserError, counted

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
ALIGNMENT = 32
BLOCK = 32  # values that share a scale in every quantised type read here


class WeightsError(UserError):
    """A file of pretrained weights that cannot be read; the message says which, why, and how to fix it."""


def _plain(dtype: str) -> Callable[[np.ndarray], np.ndarray]:
    return lambda rows: rows.reshape(-1).view(dtype).astype(np.float32)


def _half(rows: np.ndarray) -> np.ndarray:
    """The float16 in two bytes per block, as a column."""
    return np.ascontiguousarray(rows).view("<f2").astype(np.float32)


def _nibbles(rows: np.ndarray) -> np.ndarray:
    """Two values per byte: the low halves of a block, then the high halves."""
    return np.concatenate([rows & 15, rows >> 4], axis=1).astype(np.float32)


def _q4_0(rows: np.ndarray) -> np.ndarray:
    """d (q − 8), q in 0..15."""
    return _half(rows[:, :2]) * (_nibbles(rows[:, 2:]) - 8)


def _q4_1(rows: np.ndarray) -> np.ndarray:
    """d q + m, q in 0..15."""
    return _half(rows[:, :2]) * _nibbles(rows[:, 4:]) + _half(rows[:, 2:4])


def _q8_0(rows: np.ndarray) -> np.ndarray:
    """d q, q in −128..127."""
    return _half(rows[:, :2]) * rows[:, 2:].view(np.int8).astype(np.float32)


@final
@dataclass(frozen=True)
class _Kind:
    """How a tensor type is stored: bytes per block, values per block, and a block's values from its bytes."""

    name: str
    size: int
    values: int
    read: Callable[[np.ndarray], np.ndarray]


KINDS = {
    0: _Kind("F32", 4, 1, _plain("<f4")),
    1: _Kind("F16", 2, 1, _plain("<f2")),
    2: _Kind("Q4_0", 18, BLOCK, _q4_0),
    3: _Kind("Q4_1", 20, BLOCK, _q4_1),
    8: _Kind("Q8_0", 34, BLOCK, _q8_0),
}


@final
@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies: its type, shape (rows first) and first byte."""

    kind: int
    shape: tuple[int, ...]
    first: int


@final
class GGUF:
    """A GGUF file: `metadata` by key, and `tensor(name)`.

    Raises WeightsError when the file is not GGUF of version 2 or 3, or ends too early.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes: Any = np.memmap(path, mode="r", dtype=np.uint8) if path.stat().st_size else np.zeros(0, np.uint8)
        self._buffer, self._at = memoryview(self._bytes), 4
        if bytes(self._buffer[:4]) != MAGIC:
            raise WeightsError(f"{path}: is no GGUF file; install the package again")
        # 1. header
        version = self._scalar("<I")
        if version not in VERSIONS:
            raise WeightsError(f"{path}: GGUF version {version} is not supported; give a file of version 2 or 3")
        tensors, pairs = self._scalar("<Q"), self._scalar("<Q")
        # 2. metadata
        self.metadata: Mapping[str, Any] = {self._string(): self._value(self._scalar("<I")) for _ in range(pairs)}
        # 3. the table of tensors; their data start at the next multiple of the alignment
        table = [(self._string(), *self._entry()) for _ in range(tensors)]
        align = int(self.metadata.get("general.alignment", ALIGNMENT))
        start = -(-self._at // align) * align
        self._stored = {name: _Stored(kind, shape, start + offset) for name, shape, kind, offset in table}

    def _take(self, count: int) -> memoryview:
        part = self._buffer[self._at : self._at + count]
        if len(part) != count:
            raise WeightsError(
                f"{self.path}: ends after {counted(len(self._buffer), 'byte')}, too early; install it again"
            )
        self._at += count
        return part

    def _scalar(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _string(self) -> str:
        return bytes(self._take(self._scalar("<Q"))).decode("utf-8", errors="replace")

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            inner, count = self._scalar("<I"), self._scalar("<Q")
            if inner in (STRING, ARRAY):
                return [self._value(inner) for _ in range(count)]
            form = SCALARS.get(inner)
            if form is not None:
                return list(struct.unpack(f"<{count}{form[1]}", self._take(count * struct.calcsize(form))))
            kind = inner
        if kind not in SCALARS:
            raise WeightsError(f"{self.path}: metadata of unknown type {kind}; install the package again")
        return self._scalar(SCALARS[kind])

    def _entry(self) -> tuple[tuple[int, ...], int, int]:
        """Shape (the file lists the innermost axis first), type and offset of a tensor."""
        shape = tuple(self._scalar("<Q") for _ in range(self._scalar("<I")))[::-1]
        return shape, self._scalar("<I"), self._scalar("<Q")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in the order of the file."""
        return tuple(self._stored)

    def tensor(self, name: str) -> Tensor:
        """A tensor as float32, dequantised.

        Raises WeightsError when it is absent, cut off, or of a type other than F32, F16, Q4_0, Q4_1 and Q8_0.
        """
        stored = self._stored.get(name)
        if stored is None:
            raise WeightsError(f"{self.path}: has no tensor {name}; give a file of this architecture")
        kind = KINDS.get(stored.kind)
        if kind is None:
            known = ", ".join(each.name for each in KINDS.values())
            raise WeightsError(f"{self.path}: {name} is of type {stored.kind}, which is not read (only {known})")
        count = prod(stored.shape) // kind.values * kind.size
        part = self._bytes[stored.first : stored.first + count]
        if len(part) != count or prod(stored.shape) % kind.values:
            raise WeightsError(f"{self.path}: {name} is cut off; install the package again")
        values = kind.read(np.asarray(part).reshape(-1, kind.size))
        return torch.from_numpy(np.ascontiguousarray(values).reshape(stored.shape))
