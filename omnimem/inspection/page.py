"""The inspector's page: one self-contained HTML file with thumbnails, waveform and the tokens that both sides held."""

import base64
import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from omnimem.budget import Budget
from omnimem.comparison.formatting import UNKNOWN
from omnimem.comparison.template import page_template
from omnimem.inspection.retention import NEVER, UNREAD, Holding
from omnimem.inspection.snapshot import StreamSnapshot
from omnimem.tokens import Modality

TEMPLATE = Path(__file__).with_name("page.html")


@final
@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two compared policies."""

    label: str
    facts: Mapping[str, str]  # its settings: policy, slots, positions, adapter
    holding: Holding
    budget: Budget | None  # as used by the policy; None: full memory


def render(snapshot: StreamSnapshot, sides: tuple[Side, Side]) -> str:
    """Render the page, which needs no network; it embeds the holdings as arrays by `packed`."""
    left, right = (side.holding for side in sides)
    assert left.ends == right.ends, "both sides read the same chunks"
    keys = dict.fromkeys(key for side in sides for key in side.facts)
    return page_template(TEMPLATE).render(
        title=snapshot.opened.sample.id,
        seconds=snapshot.seconds,
        frames=sum(len(grid.thumbnails) for grid in snapshot.grids),
        audio_seconds=float(snapshot.sounds.ends[-1]) if len(snapshot.sounds.ends) else 0.0,
        sides=sides,
        facts=[{"key": key, "values": [side.facts.get(key, UNKNOWN) for side in sides]} for key in keys],
        grids=len(snapshot.grids),
        data=_data(snapshot, sides),
    )


def packed(array: np.ndarray) -> str:
    """The bytes of an array, gzipped and in base64; the script of the page unpacks them."""
    return base64.b64encode(gzip.compress(np.ascontiguousarray(array).tobytes(), mtime=0)).decode()


def _data(snapshot: StreamSnapshot, sides: Sequence[Side]) -> dict[str, Any]:
    """The data of the page's script; arrays by `packed`: i2, i4, f4 and u1, little-endian."""
    # 1. data that both sides share
    holding, sounds = sides[0].holding, snapshot.sounds
    cells = [grid.tokens for grid in snapshot.grids]
    # 2. data by section of the page
    return {
        "seconds": snapshot.seconds,
        "tokens": snapshot.tokens,
        "layers": holding.last.shape[0],
        "ends": list(holding.ends),
        "came": holding.came.tolist(),
        "states": {"never": NEVER, "unread": UNREAD},
        "grids": [[grid.start, grid.end, grid.rows, grid.columns, len(grid.thumbnails)] for grid in snapshot.grids],
        "thumbnails": [base64.b64encode(image).decode() for grid in snapshot.grids for image in grid.thumbnails],
        "cells": packed(np.concatenate(cells).astype("<i4") if cells else np.zeros(0, "<i4")),
        "sounds": {
            "starts": packed(sounds.starts.astype("<f4")),
            "ends": packed(sounds.ends.astype("<f4")),
            "tokens": packed(sounds.tokens.astype("<i4")),
            "peaks": packed(sounds.peaks),
            "bin_seconds": sounds.bin_seconds,
        },
        "marks": [vars(mark) for mark in sorted(snapshot.marks, key=lambda mark: (mark.start, mark.end))],
        "needles": list(snapshot.needles),
        "audio_tokens": len(sounds.tokens),
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
