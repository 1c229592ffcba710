"""Random pools of tokens and slots for the tests of selection."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from omnimem.selection import LayerSlots
from omnimem.tokens import Modality


@dataclass(frozen=True, kw_only=True)
class Case:
    """A pool of two streams with equal counts of each modality, in their own orders, and a room."""

    scores: Tensor
    modality: Tensor
    room: LayerSlots

    def available(self) -> dict[Modality, int]:
        return {kind: int((self.modality[0] == kind).sum()) for kind in Modality}

    def slots(self) -> int:
        return self.room.audio + self.room.visual


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Scores on a coarse grid (ties abound) or anywhere, any mixture of modalities, slots from none to plenty."""
    kinds = draw(st.lists(st.integers(0, 2), max_size=24))
    grid = st.integers(0, 3).map(float) | st.floats(-10, 10, width=32)
    scores = [draw(st.lists(grid, min_size=len(kinds), max_size=len(kinds))) for _ in range(2)]
    rows = [kinds, draw(st.permutations(kinds))]
    slots, flags, shape = st.integers(0, 14), st.booleans(), (2, len(kinds))
    room = LayerSlots(audio=draw(slots), visual=draw(slots), split=draw(flags), lend=draw(flags))
    modality = torch.tensor(rows, dtype=torch.int8).reshape(shape)
    return Case(scores=torch.tensor(scores).reshape(shape), modality=modality, room=room)
