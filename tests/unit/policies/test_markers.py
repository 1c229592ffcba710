"""Text of a stream: markers stay with their group, within a bound; the arm that keeps text alone."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.episodes import Episode
from support.gradients import adapted, assert_same_gradient, gradient, labelled_prompt, streamed_loss_of
from support.models import text_model
from torch import Tensor

from omnimem.budget import Budget
from omnimem.policies import ControlOptions, DistinctOptions, PerturbationOptions, PolicyOptions
from omnimem.policies.base import PolicyError
from omnimem.policies.baselines.controls import TextOnly
from omnimem.selection import Softness
from omnimem.streaming.attach import attach
from omnimem.streaming.stream import Stream
from omnimem.tokens import ABSENT, Chunk, Modality
from omnimem.tuning import FullGradient, HorizonGradient
from omnimem.tuning.gradient.released import GradientError, ReleasedGradient
from omnimem.tuning.gradient.states import StatesGradient

OPENING, WORDS, CELLS = 3, 2, 4  # text before the stream; text and visual tokens of each group
SLOTS = 5
FIELDS = ("ids", "segments", "offsets", "labels")  # of a prompt


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


def read(policy: Any, chunks: list[Chunk], batch: int = 1, **settings: Any) -> Stream:
    with attach(text_model("qwen3_vl")) as attached, torch.no_grad():
        stream = Stream(attached, policy, batch=batch, **settings)
        for chunk in chunks:
            stream.feed(chunk)
    return stream


def text_groups(stream: Stream, layer: int) -> Tensor:
    """Groups of the text that a layer holds."""
    held = stream.memory.layers[layer]
    return held.group[0][held.modality[0] == Modality.TEXT]


@pytest.mark.parametrize(
    "options", [PerturbationOptions(), DistinctOptions(), PerturbationOptions(name="paper", markers="with_group")]
)
def test_text_of_a_group_stays_with_its_tokens_in_each_layer(options: PolicyOptions) -> None:
    stream = read(options.build(Budget.shared(4, SLOTS)), stamped(12))
    for layer, held in enumerate(stream.memory.layers):
        media = held.group[0][held.modality[0] > 0]
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


def row_of(chunks: list[Chunk], row: int) -> list[Chunk]:
    """One stream of a batch."""
    names = ("embeddings", "positions", "modality", "place")
    return [replace(chunk, **{name: getattr(chunk, name)[row : row + 1] for name in names}) for chunk in chunks]


OURS = {
    "omnimem": PerturbationOptions(),
    "neighbours": PerturbationOptions(neighbours="pool"),
    "modality": PerturbationOptions(name="paper", markers="with_group", of="modality"),
    "distinct": DistinctOptions(),
}


@pytest.mark.parametrize(
    ("name", "slots"),  # each policy and each size once: the padding does not know which policy chose
    [("omnimem", SLOTS), ("neighbours", 13), ("modality", SLOTS), ("distinct", 13)],
)
def test_streams_of_a_batch_keep_what_each_keeps_alone(name, slots) -> None:
    """They hold unequal numbers of text tokens: shorter ones are padded, and the padding has no effect."""
    policy, chunks = OURS[name].build(Budget.shared(4, slots)), stamped(16, batch=3)
    together = read(policy, chunks, batch=3)
    prompt = labelled_prompt(1, 3)
    with attach(together.attached.text_model), torch.no_grad():
        answers = together.ask(prompt).hidden
    assert any(bool((layer.modality == ABSENT).any()) for layer in together.memory.layers)
    alone_bytes = 0
    for row in range(3):
        alone = read(policy, row_of(chunks, row))
        alone_bytes += alone.memory.bytes
        for ours, theirs in zip(together.memory.layers, alone.memory.layers, strict=True):
            there = ours.modality[row] != ABSENT
            assert torch.equal(ours.order[row, there], theirs.order[0])
            assert torch.allclose(ours.keys[row][:, there], theirs.keys[0], atol=1e-5)
        single = replace(prompt, **{key: getattr(prompt, key)[row : row + 1] for key in FIELDS})
        with attach(alone.attached.text_model), torch.no_grad():
            assert torch.allclose(answers[row], alone.ask(single).hidden[0], atol=1e-5)
    assert abs(together.memory.bytes - alone_bytes / 3) < 4


@pytest.mark.parametrize(
    ("carry", "softness"),
    [
        (FullGradient(), None),
        (FullGradient(recompute=False), Softness(form="soft", temperature=0.5, gradient="both")),
        (FullGradient(), Softness(form="straight_through", temperature=0.5, gradient="redundancy")),
        (HorizonGradient(chunks=2), None),
        (StatesGradient(), None),
    ],
)
def test_a_batch_has_the_loss_and_the_gradient_of_its_streams(carry, softness) -> None:
    model, policy = adapted("qwen3_vl"), PerturbationOptions().build(Budget.shared(4, SLOTS))
    chunks = [replace(chunk, embeddings=chunk.embeddings.double()) for chunk in stamped(8, batch=2)]
    prompts = [(3, labelled_prompt(1, 2)), (len(chunks), labelled_prompt(2, 2))]

    def measured(rows: slice) -> tuple[Tensor, Tensor]:
        one = [row_of(chunks, row) for row in range(2)[rows]]
        parts = chunks if len(one) == 2 else one[0]
        asked = [(at, replace(prompt, **{key: getattr(prompt, key)[rows] for key in FIELDS})) for at, prompt in prompts]
        with attach(model) as attached:
            loss = streamed_loss_of(attached, Episode(chunks=parts, asked=asked), policy, carry, softness)
            return loss.detach(), gradient(loss, model)

    together, first, second = (measured(rows) for rows in (slice(0, 2), slice(0, 1), slice(1, 2)))
    assert torch.allclose(together[0], (first[0] + second[0]) / 2, atol=1e-6)
    assert_same_gradient(together[1], (first[1] + second[1]) / 2, 1e-5)


def test_what_reads_padding_as_tokens_refuses_it() -> None:
    chunks, budget = stamped(12, batch=2), Budget.shared(4, SLOTS)
    with pytest.raises(PolicyError, match=r"per_head: false, or markers: keep"):
        read(DistinctOptions(per_head=True).build(budget), row_of(chunks, 0))
    policy, carry = PerturbationOptions().build(budget), ReleasedGradient(stop_layer=2)
    with pytest.raises(GradientError, match=r"size to 1, or markers: keep"):
        read(policy, chunks, batch=2, carry=carry)
    stream = read(PerturbationOptions(markers="keep").build(budget), chunks, batch=2)
    assert len(text_groups(stream, 0)) == OPENING + 12 * WORDS


def test_text_alone_is_kept_by_the_control() -> None:
    stream = read(TextOnly(name="text_only", budget=Budget.shared(4, SLOTS)), stamped(12))
    assert stream.memory.entries == 0
    assert all(len(text_groups(stream, layer)) == OPENING + 12 * WORDS for layer in range(4))


def test_controls_keep_text_as_before() -> None:
    stream = read(ControlOptions(name="random").build(Budget.shared(4, SLOTS)), stamped(12))
    assert len(text_groups(stream, 0)) == OPENING + 12 * WORDS
    assert math.isclose(stream.memory.counts()[0][Modality.TEXT], OPENING + 12 * WORDS)
