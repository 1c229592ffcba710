"""The inspector's page: one self-contained HTML file with pictures, waveform and what both sides held of them."""

import base64
import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from omnimem.budget import Budget
from omnimem.comparison.formatting import UNKNOWN
from omnimem.comparison.report import template_of
from omnimem.inspection.retention import NEVER, UNREAD, Holding
from omnimem.inspection.snapshot import StreamSnapshot
from omnimem.tokens import Modality

TEMPLATE = Path(__file__).with_name("page.html")


@final
@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two policies."""

    label: str
    facts: Mapping[str, str]  # what it was: policy, slots, positions, adapter
    holding: Holding
    budget: Budget | None  # as the policy uses it; None: full memory


def render(reading: StreamSnapshot, sides: tuple[Side, Side]) -> str:
    """The whole page; needs no network. Its numbers are those of the holdings, packed by `packed`."""
    left, right = (side.holding for side in sides)
    assert left.ends == right.ends, "both sides read the same chunks"
    return template_of(TEMPLATE).render(
        title=reading.opened.sample.id,
        seconds=reading.seconds,
        frames=sum(len(grid.pictures) for grid in reading.grids),
        heard=float(reading.sounds.ends[-1]) if len(reading.sounds.ends) else 0.0,
        sides=sides,
        facts=_facts(sides),
        many=len(reading.grids),
        data=_data(reading, sides),
    )


def packed(array: np.ndarray) -> str:
    """The bytes of an array, gzipped, in base64: what the page unpacks."""
    return base64.b64encode(gzip.compress(np.ascontiguousarray(array).tobytes(), mtime=0)).decode()


def _facts(sides: Sequence[Side]) -> list[dict[str, Any]]:
    """Each fact beside the other side's."""
    keys = dict.fromkeys(key for side in sides for key in side.facts)
    return [{"key": key, "values": [side.facts.get(key, UNKNOWN) for side in sides]} for key in keys]


def _data(reading: StreamSnapshot, sides: Sequence[Side]) -> dict[str, Any]:
    """All that the page's script draws from; arrays by `packed`: i2, i4, f4 and u1, little-endian."""
    holding, sounds = sides[0].holding, reading.sounds
    cells = [grid.tokens for grid in reading.grids]
    return {
        "seconds": reading.seconds,
        "tokens": reading.tokens,
        "layers": holding.last.shape[0],
        "ends": list(holding.ends),
        "came": holding.came.tolist(),
        "states": {"never": NEVER, "unread": UNREAD},
        "grids": [[grid.start, grid.end, grid.rows, grid.columns, len(grid.pictures)] for grid in reading.grids],
        "pictures": [base64.b64encode(picture).decode() for grid in reading.grids for picture in grid.pictures],
        "cells": packed(np.concatenate(cells).astype("<i4") if cells else np.zeros(0, "<i4")),
        "sounds": {
            "starts": packed(sounds.starts.astype("<f4")),
            "ends": packed(sounds.ends.astype("<f4")),
            "tokens": packed(sounds.tokens.astype("<i4")),
            "peaks": packed(sounds.peaks),
            "bin_seconds": sounds.bin_seconds,
        },
        "marks": [
            {"question": mark.question, "answer": mark.answer, "start": mark.start, "end": mark.end}
            for mark in sorted(reading.marks, key=lambda mark: (mark.start, mark.end))
        ],
        "needles": list(reading.needles),
        "heard": len(sounds.tokens),
        "sides": [_side(side) for side in sides],
    }


def _side(side: Side) -> dict[str, Any]:
    holding, budget = side.holding, side.budget
    return {
        "label": side.label,
        "heads": holding.last.shape[1],
        "last": packed(holding.last.astype("<i2")),
        "merged": [[one.layer, one.head, one.order, int(one.modality), one.first, one.last] for one in holding.merged],
        "counts": [[[layer[kind] for kind in Modality] for layer in chunk] for chunk in holding.counts],
        "slots": None if budget is None or budget.unlimited else [list(slots) for slots in budget.slots],
        "split": budget is not None and budget.split,
    }
