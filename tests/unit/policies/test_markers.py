"""Text of a stream: markers stay with their group, within a bound; the arm that keeps text alone."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.models import text_model
from torch import Tensor

from omnimem.budget import Budget
from omnimem.policies import ControlOptions, DistinctOptions, PerturbationOptions, PolicyOptions
from omnimem.policies.base import PolicyError
from omnimem.policies.baselines.controls import TextOnly
from omnimem.streaming.attach import attach
from omnimem.streaming.stream import Stream
from omnimem.tokens import Chunk, Modality

OPENING, WORDS, CELLS = 3, 2, 4  # text before the stream; text and visual tokens of each group
SLOTS = 5


def stamped(groups: int, batch: int = 1) -> list[Chunk]:
    """A prompt, then groups of a timestamp and a frame, two groups per chunk."""
    generator = torch.Generator().manual_seed(3)
    kinds = [0] * OPENING + ([0] * WORDS + [2] * CELLS) * groups
    group = [-1] * OPENING + [number for number in range(groups) for _ in range(WORDS + CELLS)]
    count = len(kinds)
    place = torch.full((batch, 4, count), -1, dtype=torch.int32)
    place[:, 3] = torch.tensor(group)
    whole = {
        "embeddings": torch.randn(batch, count, 64, generator=generator),
        "positions": torch.arange(count).expand(batch, 3, count),
        "modality": torch.tensor(kinds, dtype=torch.int8).expand(batch, count),
        "place": place,
    }
    ends = [0, OPENING, *range(OPENING + 2 * (WORDS + CELLS), count + 1, 2 * (WORDS + CELLS))]
    return [
        Chunk(
            embeddings=whole["embeddings"][:, a:b],
            positions=whole["positions"][:, :, a:b],
            modality=whole["modality"][:, a:b],
            place=whole["place"][:, :, a:b],
        )
        for a, b in pairwise(ends)
    ]


def read(policy: Any, chunks: list[Chunk], batch: int = 1) -> Stream:
    with attach(text_model("qwen3_vl")) as attached, torch.no_grad():
        stream = Stream(attached, policy, batch=batch)
        for chunk in chunks:
            stream.feed(chunk)
    return stream


def text_groups(stream: Stream, layer: int) -> Tensor:
    """Groups of the text that a layer holds."""
    held = stream.memory.layers[layer]
    return held.place[0, 3][held.modality[0] == Modality.TEXT]


@pytest.mark.parametrize(
    "options", [PerturbationOptions(), DistinctOptions(), PerturbationOptions(name="paper", markers="with_group")]
)
def test_text_of_a_group_stays_with_its_tokens_in_each_layer(options: PolicyOptions) -> None:
    stream = read(options.build(Budget.shared(4, SLOTS)), stamped(12))
    for layer, held in enumerate(stream.memory.layers):
        media = held.place[0, 3][held.modality[0] > 0]
        expected = [-1] * OPENING + sorted([*set(media.tolist()) | {11}] * WORDS)
        assert text_groups(stream, layer).tolist() == expected
        assert len(media) == SLOTS
        assert torch.equal(held.order[0], held.order[0].sort().values)


@pytest.mark.parametrize("name", ["paper", "released"])
def test_the_presets_of_the_paper_keep_all_text(name) -> None:
    stream = read(PerturbationOptions(name=name).build(Budget.shared(4, SLOTS)), stamped(12))
    assert all(len(text_groups(stream, layer)) == OPENING + 12 * WORDS for layer in range(4))


def test_text_is_bounded_however_long_the_stream_is() -> None:
    held = {}
    for groups in (20, 60):
        stream = read(PerturbationOptions().build(Budget.shared(4, SLOTS)), stamped(groups))
        held[groups] = max(len(text_groups(stream, layer)) for layer in range(4))
    assert max(held.values()) <= OPENING + (SLOTS + 1) * WORDS


def test_the_same_tokens_are_kept_where_no_text_belongs_to_a_group() -> None:
    chunks = [replace(chunk, place=None) for chunk in stamped(12)]
    streams = [
        read(PerturbationOptions(markers=markers).build(Budget.shared(4, SLOTS)), chunks)
        for markers in ("keep", "with_group")
    ]
    assert all(torch.equal(a, b) for a, b in zip(*(stream.memory.tensors() for stream in streams), strict=True))


def test_a_batch_with_markers_is_refused_and_may_keep_them() -> None:
    with pytest.raises(PolicyError, match=r"batch size to 1, per_head: false, or markers: keep"):
        read(PerturbationOptions().build(Budget.shared(4, SLOTS)), stamped(12, batch=2), batch=2)
    stream = read(PerturbationOptions(markers="keep").build(Budget.shared(4, SLOTS)), stamped(12, batch=2), batch=2)
    assert len(text_groups(stream, 0)) == OPENING + 12 * WORDS


def test_text_alone_is_kept_by_the_control() -> None:
    stream = read(TextOnly(name="text_only", budget=Budget.shared(4, SLOTS)), stamped(12))
    assert stream.memory.entries == 0
    assert all(len(text_groups(stream, layer)) == OPENING + 12 * WORDS for layer in range(4))


def test_controls_keep_text_as_before() -> None:
    stream = read(ControlOptions(name="random").build(Budget.shared(4, SLOTS)), stamped(12))
    assert len(text_groups(stream, 0)) == OPENING + 12 * WORDS
    assert math.isclose(stream.memory.counts()[0][Modality.TEXT], OPENING + 12 * WORDS)
