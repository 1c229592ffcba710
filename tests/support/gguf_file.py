"""Writes small GGUF files by hand, as the format's description says."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

TYPES = {bool: 7, float: 6, int: 4, str: 8}
FORMS = {7: "<?", 6: "<f", 4: "<I"}


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """A value behind its type."""
    if isinstance(value, list):
        kind = TYPES[type(value[0])]
        return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(_value(item)[4:] for item in value)
    kind = TYPES[type(value)]
    raw = _string(value) if kind == 8 else struct.pack(FORMS[kind], value)
    return struct.pack("<I", kind) + raw


def quantise(values: np.ndarray, kind: int) -> bytes:
    """The bytes of a tensor: 0 float32, 1 float16, 2 Q4_0, 3 Q4_1, 8 Q8_0."""
    if kind in (0, 1):
        return values.astype(("<f4", "<f2")[kind]).tobytes()
    parts = []
    for block in values.reshape(-1, 32).astype(np.float64):
        low, high = block.min(), block.max()
        if kind == 8:
            scale = np.float16(np.abs(block).max() / 127 or 1)
            parts.append(scale.tobytes() + np.round(block / float(scale)).astype(np.int8).tobytes())
            continue
        shift = low if kind == 3 else 0.0
        scale = np.float16((high - low) / 15 if kind == 3 else np.abs(block).max() / 7) or np.float16(1)
        codes = np.round((block - float(np.float16(shift))) / float(scale)) + (0 if kind == 3 else 8)
        codes = codes.clip(0, 15).astype(np.uint8)
        head = scale.tobytes() + (np.float16(shift).tobytes() if kind == 3 else b"")
        parts.append(head + (codes[:16] | codes[16:] << 4).tobytes())
    return b"".join(parts)


def write(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[np.ndarray, int]]) -> Path:
    """A GGUF file of version 3 with these metadata and (values, type) by name."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(_string(key) + _value(value) for key, value in metadata.items())
    data = b""
    for name, (values, kind) in tensors.items():
        head += _string(name) + struct.pack("<I", values.ndim) + struct.pack(f"<{values.ndim}Q", *values.shape[::-1])
        head += struct.pack("<IQ", kind, len(data))
        raw = quantise(values, kind)
        data += raw + b"\0" * (-len(raw) % 32)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)
    return path
