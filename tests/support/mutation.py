"""Hostile variants of a valid value or file, drawn by hypothesis."""

import contextlib
import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

Path = tuple[Any, ...]
Draw = Any  # hypothesis' draw function

SCALE = 1 << 20
PARTS = st.integers(0, SCALE)  # a place in a file, in parts of its length

NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1, 10**400, -(10**400), 2**63, 1e308, -0.0, 0.5, float("nan"), float("inf")),
    *(
        "",
        " ",
        "x",
        "\ud800",
        "\x00",
        "../../x",
        "/etc/passwd",
        "=1+1",
        "a" * 300,
        "ä\u2028\u202e",
        "<|im_end|>",
        "1e999",
    ),
    *("x" * 70_000, "nan", "null", "full", "9" * 400, "%s{0}{{", "\\", "a\nb", "a\tb"),
    *([], [[]], {}, {"": None}, [None], [1, "x"], {"name": "x"}, {"a": {"b": [1]}}),
]
RAW = [
    "[" * 3000,
    '{"a": ' * 3000,
    "{",
    "\x00",
    "\ufeff",
    '{"a": 1, "a": 2}',
    "NaN",
    "9" * 5000,
    "&a [*a]",
    "!!python/name:os.system x",
]


def mutated(draw: Draw, value: Any, times: int = 3) -> Any:
    """The value with up to `times` changes at random places: replaced, removed, doubled, renamed, exchanged."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, times))):
        places = list(_places(value))
        if not places:
            return draw(st.sampled_from(NASTY))
        container, key = places[draw(st.integers(0, len(places) - 1))]
        match draw(st.sampled_from(("replace", "remove", "double", "rename", "exchange", "nudge"))):
            case "replace":
                container[key] = copy.deepcopy(draw(st.sampled_from(NASTY)))
            case "remove":
                del container[key]
            case "double" if isinstance(container, list):
                container.insert(key, copy.deepcopy(container[key]))
            case "rename" if isinstance(container, dict):
                container[draw(st.sampled_from(("", "x", f"{key}s", str(key).upper(), "\ud800")))] = container.pop(key)
            case "exchange":
                other, place = places[draw(st.integers(0, len(places) - 1))]
                if place in other if isinstance(other, dict) else place < len(other):
                    container[key] = copy.deepcopy(other[place])
            case "nudge" if isinstance(container[key], int | float):
                factor = draw(st.sampled_from((-1, 0, 1e-9, 1000, 10**9, 1e300)))
                with contextlib.suppress(OverflowError):  # of a large whole number
                    container[key] = container[key] * factor
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a nested value, as (container, key)."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def as_json(value: Any) -> bytes:
    """JSON as Python writes it, NaN and halves of characters included."""
    return json.dumps(value).encode()


def damaged_bytes(draw: Draw, data: bytes) -> bytes:
    """Bytes that are cut, overwritten, flipped, repeated, or something else."""
    # draws do not depend on the length, which differs between two workbooks of the same cells
    place, end = sorted(draw(PARTS) * len(data) // SCALE for _ in range(2))
    match draw(st.sampled_from(("cut", "zeros", "flip", "repeat", "drop", "insert", "other"))):
        case "cut":
            return data[:place]
        case "zeros":
            return data[:place] + bytes(end - place) + data[end:]
        case "flip":
            changed = bytearray(data)
            for _ in range(draw(st.integers(1, 6))):
                spot, bit = draw(PARTS) * len(data) // SCALE, draw(st.integers(0, 7))
                if spot < len(data):
                    changed[spot] ^= 1 << bit
            return bytes(changed)
        case "repeat":
            return data[:end] + data[place:end] * 3 + data[end:]
        case "drop":
            return data[:place] + data[end:]
        case "insert":
            return data[:place] + draw(st.sampled_from(RAW)).encode() + data[place:]
    return draw(st.sampled_from(RAW)).encode()


def damaged_weights(draw: Draw, data: bytes) -> bytes:
    """A safetensors file with other values in its header, of the right length, or with other bytes."""
    if not draw(st.integers(0, 2)):
        return damaged_bytes(draw, data)
    size = int.from_bytes(data[:8], "little")
    header = as_json(mutated(draw, json.loads(data[8 : 8 + size])))
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def variant(draw: Draw, value: Any) -> bytes:
    """A hostile JSON file: other values in most cases, else other bytes."""
    if draw(st.integers(0, 3)):
        return as_json(mutated(draw, value))
    return damaged_bytes(draw, as_json(value))


def variant_lines(draw: Draw, rows: list[Any]) -> bytes:
    """A hostile JSONL file."""
    if draw(st.integers(0, 3)):
        rows = mutated(draw, rows)
        rows = rows if isinstance(rows, list) else [rows]
        return b"".join(as_json(row) + b"\n" for row in rows)
    return damaged_bytes(draw, b"".join(as_json(row) + b"\n" for row in rows))
