"""The timeline of the page: a bounded number of bins, which hold every token once."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from omnimem.memory import Memory, Shape
from omnimem.tokens import EVICTABLE, Chunk, Modality
from omnimem.ui.timeline import Timeline

AUDIO, VISUAL, TEXT = Modality.AUDIO, Modality.VISUAL, Modality.TEXT
KINDS = [AUDIO, VISUAL, VISUAL]  # of every part


def part(seconds: float, kinds: list[Modality]) -> Chunk:
    count = len(kinds)
    return Chunk(
        embeddings=torch.zeros(1, count, 4),
        positions=torch.zeros(1, 3, count, dtype=torch.long),
        modality=torch.tensor([kinds], dtype=torch.int8),
        seconds=seconds,
    )


def _zeros(count: int, like: Tensor, axis: int) -> Tensor:
    return like.new_zeros([count if number == axis else size for number, size in enumerate(like.shape)])


def holding(orders: list[list[int]]) -> Memory:
    """A memory whose layers hold the tokens of these arrival numbers, after an opening of two tokens of text."""
    shape = Shape(layers=1, kv_heads=1, dim=2, width=4, dtype=torch.float32, device=torch.device("cpu"), feature=0)
    empty = Memory.empty(shape, 1).layers[0]
    layers = []
    for order in orders:
        kinds = [TEXT if number < 2 else KINDS[(number - 2) % 3] for number in order]
        numbers = {"order": torch.tensor([order]), "modality": torch.tensor([kinds], dtype=torch.int8)}
        sized = empty.map(partial(_zeros, len(order)))
        layers.append(replace(sized, **numbers))
    return Memory(layers=tuple(layers))


@pytest.mark.parametrize("chunks", [1, 3, 4, 5, 9, 16, 33])
def test_every_token_is_in_one_bin_of_a_bounded_number(chunks) -> None:
    timeline = Timeline(most=4)
    timeline.add([part(0.0, [TEXT, TEXT])], holding([[0, 1], [0, 1]]))
    for number in range(chunks):
        last = 2 + 3 * number
        held = [list(range(last + 3)), [0, 1, last, last + 1, last + 2]]  # all in one layer, the latest in the other
        timeline.add([part(2.0 * number + 2, KINDS)], holding(held))
    bins = timeline.shown()
    assert len(bins) <= 4
    assert bins[-1][0] == 2 * chunks
    assert [row[0] for row in bins] == sorted({row[0] for row in bins})
    assert [sum(row[column] for row in bins) for column in (1, 2)] == [chunks, 2 * chunks]
    kept = [sum(row[column] for row in bins) for column in (3, 4)]
    assert kept == [(chunks + 1) / 2, chunks + 1]
    if chunks > 1 and len(bins) > 1:
        assert bins[0][3] == bins[0][1] / 2  # of what came first only one layer holds tokens
    assert len(EVICTABLE) == 2
