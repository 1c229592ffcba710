"""Compacted positions: order and company kept, attention among kept tokens as if encoded at the new places."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from support.models import assert_equal_logits, cut, one_layer, row_of, text_model, whole_stream

from omnimem.budget import Budget
from omnimem.policies import ControlOptions, PerturbationOptions
from omnimem.policies.baselines.lava import LavaOptions
from omnimem.positions import distinct, earlier, ranks, rotate
from omnimem.streaming.attach import attach
from omnimem.streaming.prompt_pass import Prompt
from omnimem.streaming.stream import Stream
from omnimem.tokens import ABSENT, Chunk, Modality

IDS = torch.tensor([[5, 6, 7]])
PROMPT = Prompt(ids=IDS, segments=torch.zeros_like(IDS), offsets=torch.arange(3)[None])


def in_a_grid(whole: Chunk) -> Chunk:
    """The stream with rows and columns of visual tokens that do not grow with time, as real backbones lay them out."""
    time = ((torch.arange(whole.count) + 1) // 2).expand(
        whole.modality.shape
    )  # the opening's three tokens end before the stream begins
    row, column = (torch.arange(whole.count) % size + 3 for size in (3, 2))
    space = [torch.where(whole.modality == Modality.VISUAL, place, time) for place in (row, column)]
    return replace(whole, positions=torch.stack([time, *space], dim=1))


def test_ranks_are_consecutive_keep_company_and_leave_the_opening() -> None:
    time = torch.tensor([[0, 1, 9, 9, 20, 20, 41]])
    kinds = torch.ones_like(time, dtype=torch.int8)
    assert ranks(time, kinds, 2, [10]).tolist() == [[0, 1, 7, 7, 8, 8, 9]]
    assert ranks(time, kinds, 2, [None]).tolist() == time.tolist()
    kinds[0, 4:6] = ABSENT
    assert distinct(time, kinds, 2) == [2]
    assert ranks(time, kinds, 2, [10]).tolist() == [[0, 1, 8, 8, 20, 20, 9]]


def test_rows_and_columns_of_visual_tokens_do_not_move() -> None:
    positions = torch.tensor([[[7, 7], [3, 7], [2, 7]]])
    modality = torch.tensor([[Modality.VISUAL, Modality.AUDIO]], dtype=torch.int8)
    assert earlier(positions, modality, 5).tolist() == [[[2, 2], [3, 2], [2, 2]]]


def test_turned_keys_equal_keys_encoded_at_the_new_place(family) -> None:
    model = text_model(family)
    keys = torch.randn(1, 2, 6, 16, generator=torch.Generator().manual_seed(0))
    old = torch.randint(0, 50, (3, 1, 6), generator=torch.Generator().manual_seed(1))
    new = torch.randint(0, 50, (3, 1, 6), generator=torch.Generator().manual_seed(2))
    with attach(model) as attached:
        encoded = rotate(keys, *attached.rotary(new))
        turned = rotate(rotate(keys, *attached.rotary(old)), *attached.rotary(new - old))
    assert torch.allclose(encoded, turned, atol=1e-5)


def test_attention_logits_do_not_change_when_all_positions_shift_alike(family) -> None:
    model = text_model(family)
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(1, 2, 6, 16, generator=generator) for _ in range(2))
    places = torch.randint(0, 50, (3, 1, 6), generator=generator)
    with attach(model) as attached:
        here, there = ([rotate(x, *attached.rotary(places + shift)) for x in (queries, keys)] for shift in (0, 13))
    assert torch.allclose(here[0] @ here[1].mT, there[0] @ there[1].mT, atol=1e-4)


def test_a_compacting_stream_stays_below_its_last_position_and_equals_the_original_before_it() -> None:
    model = text_model("qwen2_5_omni")
    chunks = cut(in_a_grid(whole_stream(96)), [3, *[12] * 7, 9])
    policy = PerturbationOptions().build(Budget(slots=((2, 6),) * 4))
    with attach(model) as attached:
        plain = Stream(attached, policy)
        early, late = Stream(attached, policy, last_position=1000), Stream(attached, policy, last_position=40)
        for chunk in chunks:
            for stream in (plain, early, late):
                stream.feed(chunk)
            assert all(int(layer.positions.max()) < 40 for layer in late.memory.layers)
        assert late.moved > 0
        assert late.next_position < plain.next_position
        assert torch.equal(early.ask(PROMPT).hidden, plain.ask(PROMPT).hidden)
        assert torch.isfinite(late.ask(PROMPT).hidden).all()


def test_text_in_mid_stream_does_not_widen_the_opening() -> None:
    model = text_model("qwen2_5_omni")
    with attach(model) as attached:
        stream = Stream(attached, PerturbationOptions().build(None), last_position=1000)
        for chunk in cut(in_a_grid(whole_stream(14)), [3, 5, 1, 5]):
            stream.feed(chunk)
        assert stream.opening == 2


def test_a_range_too_small_for_memory_and_chunk_is_refused() -> None:
    model = text_model("qwen2_5_omni")
    opening, first, second = cut(in_a_grid(whole_stream(63)), [3, 30, 30])
    with attach(model) as attached:
        stream = Stream(attached, PerturbationOptions().build(None), last_position=20)
        stream.feed(opening)
        stream.feed(first)
        with pytest.raises(ValueError, match="chunk_tokens"):
            stream.feed(second)


def test_moving_all_tokens_alike_changes_no_answer() -> None:
    """With every time kept, compaction only shifts; attention to the stream is relative, so answers stay."""
    model = text_model("qwen2_5_omni")
    whole = in_a_grid(whole_stream(60))
    far = whole.positions.clone()
    far[:, :, 3:] = earlier(whole.positions, whole.modality, -7)[:, :, 3:]  # a gap of 7 after the opening
    shifted = type(whole)(embeddings=whole.embeddings, positions=far, modality=whole.modality)
    lengths = [3, 27, 30]
    with attach(model) as attached:
        near = Stream(attached, PerturbationOptions().build(None))
        moving = Stream(attached, PerturbationOptions().build(None), last_position=int(far.max()))
        for a, b in zip(cut(whole, lengths), cut(shifted, lengths), strict=True):  # text begins before the last token
            near.feed(replace(a, next_position=int(a.positions.max()) - 1))
            moving.feed(replace(b, next_position=int(b.positions.max()) - 1))
        assert moving.moved == 7
        assert moving.next_position == near.next_position == int(whole.positions.max()) - 1
        later = torch.tensor([kind != Modality.TEXT for kind in near.memory.layers[0].modality[0]])
        ours, theirs = moving.memory.layers[0].keys, near.memory.layers[0].keys
        assert_equal_logits(ours[:, :, later], theirs[:, :, later])  # layer 0 keys depend on nothing but the place
        assert torch.isfinite(moving.ask(PROMPT).hidden).all()


@pytest.mark.parametrize(
    "options",
    [PerturbationOptions(name="paper", markers="with_group"), LavaOptions(), ControlOptions(name="random")],
    ids=["rows with padding", "lists with padding", "no padding"],
)
def test_streams_of_a_batch_move_as_each_would_alone(options) -> None:
    """Each when its own positions run out, and without regard to padding; whatever the others hold."""
    whole = in_a_grid(whole_stream(144, 3))
    group = (torch.arange(144) // 6).expand(3, 1, -1).int()
    parts = (whole.embeddings.double(), 1), (whole.positions, 2), (whole.modality, 1)
    parts = *parts, (torch.cat([whole.places[:, :3], group], dim=1), 2)
    names = ("embeddings", "positions", "modality", "place")
    rows = zip(*(tensor.split(12, dim=axis) for tensor, axis in parts), strict=True)
    chunks = [Chunk(**dict(zip(names, row, strict=True))) for row in rows]
    with attach(one_layer().double()) as attached, torch.no_grad():
        policy, moved = options.build(Budget(slots=((2, 9),))), []
        both, *alone = (Stream(attached, policy, batch=batch, last_position=45) for batch in (3, 1, 1, 1))
        for chunk in chunks:
            both.feed(chunk)
            for row, stream in enumerate(alone):
                stream.feed(row_of(chunk, row))
            moved.append(tuple(stream.moved for stream in alone))
            assert both._moved == moved[-1]
        for ours, *theirs in zip(both.memory.layers, *(stream.memory.layers for stream in alone), strict=True):
            for row, own in enumerate(theirs):
                there = ours.modality[row] != ABSENT
                assert torch.equal(ours.order[row, there], own.order[0])
                assert torch.equal(ours.positions[row][:, there], own.positions[0])
                # angles are float32
                torch.testing.assert_close(ours.keys[row][:, there], own.keys[0], rtol=0, atol=1e-5)
    steps = [tuple(map(int.__gt__, later, earlier)) for earlier, later in pairwise(moved)]
    assert options.name != "paper" or any(any(step) and not all(step) for step in steps)
