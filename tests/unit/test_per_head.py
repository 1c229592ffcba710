"""Heads that keep tokens of their own: rows and lists hold the same, and a list holds nothing else."""

from dataclasses import replace

import pytest
import torch
from support import reference
from support.grid_streams import SCALE, chunks_of, shape_of

from omnimem.attention.blocked import MEMORY, Segments, attend
from omnimem.memory import Memory
from omnimem.per_head import merge_query_rows, packed, query_rows, rows_of
from omnimem.tokens import ABSENT, HIDDEN, Tokens

HEADS = 3


def ragged(seed: int = 0, batch: int = 2) -> Tokens:
    """Rows of two streams of three heads, each of which holds another number of 20 tokens, filled up to the longest."""
    (_, tokens) = chunks_of([20], batch=batch, kv_heads=HEADS, heads=HEADS, seed=seed)[0]
    rows = rows_of(tokens, HEADS)
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 20, (batch * HEADS,), generator=generator)
    index = torch.stack([torch.randperm(20, generator=generator) for _ in counts])
    places = torch.arange(20)
    index = torch.where(places < counts[:, None], index, 20).sort(dim=1).values[:, : int(counts.max())]
    there = index < 20
    found = rows.gather(index.clamp_max(19))
    return replace(
        found,
        modality=torch.where(there, found.modality, torch.full_like(found.modality, ABSENT)),
        gate=torch.where(there, found.gate, torch.full_like(found.gate, HIDDEN)),
    )


def held(rows: Tokens) -> list[list[tuple[int, float]]]:
    """Arrival number and first number of the value of what each row holds."""
    return [
        [(int(order), float(value)) for order, value, kind in zip(*row, strict=True) if kind != ABSENT]
        for row in zip(rows.order, rows.values[:, 0, :, 0], rows.modality, strict=True)
    ]


def test_a_list_gives_back_the_rows_that_it_was_made_of() -> None:
    rows = ragged()
    listed = packed(rows, HEADS)
    again = rows_of(listed, HEADS)
    assert held(again) == held(rows)
    assert bool((again.gate[again.modality == ABSENT] == HIDDEN).all())
    assert held(rows_of(packed(again, HEADS), HEADS)) == held(rows)


@pytest.mark.parametrize("full", [0, 1])
def test_beside_a_stream_whose_heads_hold_equally_many_another_one_gives_back_its_rows(full: int) -> None:
    """One stream needs no padding, so the list is as wide as all rows together; that of the other one still does."""
    rows = ragged()
    own = torch.arange(len(rows.modality))[:, None] // HEADS == full
    present = own & (rows.modality == ABSENT)
    rows = replace(rows, modality=rows.modality.masked_fill(present, 1), gate=rows.gate.masked_fill(present, 0.0))
    listed = packed(rows, HEADS)
    assert listed.count == HEADS * rows.count
    assert held(rows_of(listed, HEADS)) == held(rows)
    ended = (listed.modality == ABSENT).int()
    assert torch.equal(ended, ended.sort(dim=1).values)


def test_rows_of_equal_length_need_no_filling() -> None:
    tokens = chunks_of([20], batch=2, kv_heads=HEADS, heads=HEADS)[0][1]
    rows = rows_of(tokens, HEADS)
    listed = packed(rows, HEADS)
    assert listed.keys.shape == (2, 1, 60, 6)
    assert torch.equal(listed.owner[0, 0], torch.arange(3).repeat_interleave(20))
    assert all(torch.equal(a, b) for a, b in zip(rows.tensors(), rows_of(listed, HEADS).tensors(), strict=True))


def test_a_stream_is_charged_for_what_its_heads_hold_and_for_one_owner_per_pair() -> None:
    alone = [packed(Tokens.of([part[:3] for part in ragged(seed).tensors()]), HEADS) for seed in (0, 1)]
    for tokens in alone:
        assert not bool((tokens.modality == ABSENT).any())
        # key, value, position, place, modality, order, three numbers, owner
        pair = 2 * 6 * 4 + 3 * 8 + 4 * 4 + 1 + 8 + 3 * 4 + 1
        assert Memory(layers=(tokens,)).bytes == tokens.bytes == tokens.count * pair
        assert Memory(layers=(tokens,)).entries == pytest.approx(int((tokens.modality > 0).sum()) / HEADS)


def test_a_batch_charges_what_its_streams_would_be_charged_alone() -> None:
    rows = ragged()
    together = Memory(layers=(packed(rows, HEADS),))
    alone = [
        Memory(layers=(packed(Tokens.of([p[s] for p in rows.tensors()]), HEADS),)) for s in (slice(3), slice(3, 6))
    ]
    assert together.layers[0].count == max(memory.layers[0].count for memory in alone)
    assert together.bytes == pytest.approx(sum(memory.bytes for memory in alone) / 2, abs=1)
    assert together.entries == pytest.approx(sum(memory.entries for memory in alone) / 2)


def test_an_empty_layer_gives_empty_rows() -> None:
    empty = Memory.empty(shape_of(HEADS), 2).layers[0]
    assert rows_of(empty, HEADS).keys.shape == (6, 1, 0, 6)
    assert rows_of(packed(rows_of(empty, HEADS), HEADS), HEADS).count == 0


def test_each_head_attends_to_what_it_holds_and_to_nothing_else() -> None:
    rows = ragged()
    generator = torch.Generator().manual_seed(5)
    queries = torch.randn(2, 2 * HEADS, 4, 6, generator=generator)
    folded = query_rows(queries, HEADS)
    asked = torch.zeros(6, 4, dtype=torch.long)
    segments = Segments(queries=asked, keys=torch.full_like(rows.order, MEMORY))
    output = merge_query_rows(
        attend(
            folded,
            torch.cat([rows.keys, torch.zeros(6, 1, 4, 6)], dim=2),
            torch.cat([rows.values, torch.zeros(6, 1, 4, 6)], dim=2),
            scale=SCALE,
            gate=torch.cat([rows.gate, torch.full((6, 4), HIDDEN)], dim=1),
            segments=replace(segments, keys=torch.cat([segments.keys, asked], dim=1)),
        ),
        HEADS,
    )
    for stream in range(2):
        for head in range(2 * HEADS):
            row = stream * HEADS + head // 2
            mine = (rows.modality[row] != ABSENT).nonzero()[:, 0].tolist()
            keys, values = (
                [[part[row, 0, k].tolist() for k in mine]] for part in (rows.keys.double(), rows.values.double())
            )
            asking = [queries[stream, head].double().tolist()]
            seen = [[True] * len(mine)] * 4
            expected, _ = reference.attention(asking, keys, values, SCALE, seen)
            torch.testing.assert_close(output[stream, head], torch.tensor(expected[0]), atol=1e-5, rtol=1e-5)
