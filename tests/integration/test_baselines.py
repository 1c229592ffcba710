"""Every policy in the same stream: budget, order, determinism, forks, batches, precision, gradient."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.models import assert_equal_logits, row_of, text_model
from support.policy_streams import LAYERS, OPTIONS, SPLIT, cut, opened, whole_stream
from torch import Tensor

from omnimem.policies import PolicyOptions
from omnimem.policies.base import Policy, StreamOutline
from omnimem.streaming.attach import StreamedAttention, attach
from omnimem.streaming.prompt_pass import PADDING, Prompt
from omnimem.streaming.stream import Stream
from omnimem.tokens import Chunk, Modality
from omnimem.tuning import FullGradient

NAMES = sorted(OPTIONS)
FEWER = {"input_uniform", "recent_frames"}  # what fits into no whole frame stays empty


def policy_of(name: str, whole: Chunk | None = None) -> Policy:
    """The policy at SPLIT, told of the stream where it asks for that."""
    whole = whole_stream() if whole is None else whole
    policy = OPTIONS[name].build(SPLIT)
    needles = [(40 + row, 12, 70) for row in range(whole.modality.shape[0])]
    return policy.with_oracle(
        [StreamOutline(modality=whole.modality[0], place=whole.places[0], needles=n) for n in needles]
    )


def fed(attached: StreamedAttention, policy: Policy, chunks: Sequence[Chunk], **settings: Any) -> Stream:
    stream = opened(attached, policy, len(chunks[0].modality), **settings)
    for chunk in chunks:
        stream.feed(chunk)
    return stream


def prompt_of(batch: int = 1) -> Prompt:
    ids = torch.tensor([[5, 6, 7, 8, 9]]).expand(batch, -1)
    segments = torch.tensor([[0, 0, 0, 1, 1]]).expand(batch, -1)
    return Prompt(ids=ids, segments=segments, offsets=torch.tensor([[0, 1, 2, 0, 1]]).expand(batch, -1))


def by_row(tokens, row: int = 0) -> list[list[tuple[int, int]]]:
    """(arrival number, modality) of what each head holds; one list where all heads hold the same."""
    owner = tokens.owner[row, 0] if tokens.owner.shape[1] else torch.zeros_like(tokens.modality[row])
    pairs = list(zip(tokens.order[row].tolist(), tokens.modality[row].tolist(), owner.tolist(), strict=True))
    return [[(k, kind) for k, kind, head in pairs if head == h and kind >= 0] for h in range(tokens.heads)]


@pytest.mark.parametrize("name", NAMES)
def test_the_budget_is_kept_and_filled_in_every_layer_at_every_step_and_order_is_kept(name) -> None:
    policy, whole = policy_of(name), whole_stream()
    text = set((whole.modality[0] == Modality.TEXT).nonzero()[:, 0].tolist())
    rooms = [policy.layer_slots(layer) for layer in range(LAYERS)]
    with attach(text_model("qwen2_5_omni")) as attached, torch.no_grad():
        stream, seen, before = opened(attached, policy), 0, 0
        for chunk in cut(whole):
            stream.feed(chunk)
            seen += chunk.count
            fresh = int((chunk.modality > 0).sum())
            held = []
            for tokens in stream.memory.layers:
                rows = by_row(tokens)
                assert all([k for k, kind in row if not kind] == sorted(k for k in text if k < seen) for row in rows)
                for row in rows:
                    numbers = [k for k, _ in row]
                    assert numbers == sorted(numbers)
                    assert policy.traits.merges or len(set(numbers)) == len(numbers)
                held.append(sum(kind > 0 for row in rows for _, kind in row) / len(rows))
            slots = [room.audio + room.visual for room in rooms]
            if name.startswith(("lava", "pyramidkv")):
                assert sum(held) <= SPLIT.total
            else:
                assert all(mine <= most for mine, most in zip(held, slots, strict=True)), (held, slots)
            assert sum(held) == pytest.approx(stream.memory.entries)
            if name.split("_split")[0] not in FEWER and not name.startswith("streammem"):
                assert sum(held) == pytest.approx(min(SPLIT.total, before + LAYERS * fresh), abs=LAYERS)
            before = sum(held)
        if name.split("_split")[0] not in FEWER and name != "similarity_released":
            assert stream.memory.entries == pytest.approx(SPLIT.total)
        elif name != "similarity_released":
            assert SPLIT.total / 3 < stream.memory.entries <= SPLIT.total


@pytest.mark.parametrize("name", NAMES)
def test_the_same_stream_gives_the_same_bits_and_questions_and_forks_leave_it_alone(name) -> None:
    policy, chunks = policy_of(name), cut(whole_stream())
    with attach(text_model("qwen2_5_omni")) as attached, torch.no_grad():
        quiet, asked = fed(attached, policy, chunks), opened(attached, policy)
        heard = []
        for number, chunk in enumerate(chunks):
            heard.append(asked.ask(prompt_of()).hidden)
            if number == 3:
                asked.answer(prompt_of(), torch.nn.Identity(), stop=[1], max_new_tokens=3)
                twin = asked.fork()
                for later in reversed(chunks[3:]):
                    twin.feed(later)
            asked.feed(chunk)
        assert all(torch.equal(a, b) for a, b in zip(quiet.memory.tensors(), asked.memory.tensors(), strict=True))
        assert quiet.usage == asked.usage
        assert not torch.equal(heard[0], heard[-1])  # the question does read the memory
        assert torch.equal(quiet.ask(prompt_of()).hidden, asked.ask(prompt_of()).hidden)


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_keeps_in_a_batch_what_it_keeps_alone(name) -> None:
    whole = whole_stream(batch=2)
    chunks = cut(whole)
    policy = policy_of(name, whole)
    with attach(text_model("qwen2_5_omni")) as attached, torch.no_grad():
        together = fed(attached, policy, chunks)
        hidden = together.ask(prompt_of(2)).hidden
        sizes = []
        for row in range(2):
            alone = fed(attached, _alone(policy, row), [row_of(chunk, row) for chunk in chunks])
            for mine, both in zip(alone.memory.layers, together.memory.layers, strict=True):
                assert by_row(mine) == by_row(both, row)
            assert_equal_logits(hidden[row : row + 1], alone.ask(prompt_of()).hidden)
            sizes.append((alone.memory.bytes, alone.memory.entries))
        assert together.memory.bytes == pytest.approx(sum(size for size, _ in sizes) / 2, abs=LAYERS)
        assert together.memory.entries == pytest.approx(sum(size for _, size in sizes) / 2)


def _alone(policy: Policy, row: int) -> Policy:
    """The oracle knows each stream of a batch by its place."""
    needles = getattr(policy, "needles", None)
    return policy if needles is None else replace(policy, needles=needles[row : row + 1])


@pytest.mark.parametrize("name", NAMES)
def test_a_bfloat16_model_streams_without_nan_even_over_exact_duplicates(name) -> None:
    whole = whole_stream(still=True)
    chunks = cut(replace(whole, embeddings=whole.embeddings.to(torch.bfloat16)))
    with attach(text_model("qwen2_5_omni").to(torch.bfloat16)) as attached, torch.no_grad():
        stream = fed(attached, policy_of(name), chunks)
        hidden = stream.ask(prompt_of()).hidden
    assert bool(hidden.isfinite().all())
    for tokens in stream.memory.layers:
        assert all(bool(tensor.isfinite().all()) for tensor in tokens.tensors())
        assert tokens.keys.dtype == torch.bfloat16


# one of each class: presets and budgets share their code
LEARNING = sorted({type(options): name for name, options in reversed(OPTIONS.items())}.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LEARNING, "streammem_heads", "hermes_reindexed"])
def test_gradient_flows_through_what_is_kept_and_recomputing_changes_no_bit(name) -> None:
    policy, chunks = policy_of(name), cut(whole_stream())
    found: list[list[Tensor]] = []
    for recompute in (False, True):
        model = text_model("qwen2_5_omni").requires_grad_(True)
        with attach(model, recompute_layers=recompute) as attached:
            carry = FullGradient(recompute=recompute)
            stream = fed(attached, policy, chunks, carry=carry)
            read = stream.reader(prompt_of())
            loss = stream.read(lambda memory, read=read: read(memory).hidden.pow(2).mean())
            loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(bool(grad.isfinite().all()) for grad in found[0])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_every_policy_of_the_config_is_tried_here() -> None:
    tried = {type(options) for options in OPTIONS.values()}
    assert tried == set(PolicyOptions.__args__)
    assert PADDING < 0
