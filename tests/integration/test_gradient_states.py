"""Gradient with carried states: that of one plain pass in which every kept token's layer input is a constant."""

from dataclasses import replace
from typing import final

import pytest
import torch
from support.episodes import CutOff, Episode, KeptByChunk, OneShot, one_shot_loss
from support.gradients import (
    HELD,
    adapted,
    assert_same_gradient,
    episode_of,
    gradient,
    head_of,
    loss_of,
    streamed_loss_of,
)
from support.models import FAMILIES, position_ids
from support.streams import policy_of
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from omnimem.memory import Memory
from omnimem.selection import Softness
from omnimem.streaming.attach import attach
from omnimem.streaming.stream import Stream
from omnimem.tokens import Tokens
from omnimem.tuning import FullGradient, StatesGradient


def pair_of(model: PreTrainedModel, layer: int, states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of layer inputs, written out: input norm, projection, the head's norm if it has one, RoPE."""
    decoder = model.layers[layer]
    attention, normed = decoder.self_attn, decoder.input_layernorm(states)
    keys, values = (
        part(normed).unflatten(-1, (-1, attention.head_dim)) for part in (attention.k_proj, attention.v_proj)
    )
    if model.config.model_type.startswith("qwen3"):
        keys = attention.k_norm(keys)
    keys = keys.transpose(1, 2)
    cos, sin = (part[:, None] for part in model.rotary_emb(states, position_ids(model, positions)))
    first, second = keys.chunk(2, dim=-1)
    return keys * cos + torch.cat([-second, first], dim=-1) * sin, values.transpose(1, 2)


@final
class ConstantStates(OneShot):
    """One pass in which a key of an earlier chunk is made of the layer's input as a constant, with live weights."""

    def __init__(self, episode: Episode, kept: list[list[Tensor]], model: PreTrainedModel) -> None:
        super().__init__(episode, kept)
        self.model = model

    def __call__(
        self, layer: int, states: Tensor, queries: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        group = queries.shape[1] // keys.shape[1]
        carried = pair_of(self.model, layer, states.detach(), self.episode.positions)
        mine, past = ([part.repeat_interleave(group, dim=1) for part in pair] for pair in ((keys, values), carried))
        own = self.own(states.shape[1])
        logits = torch.where(own, queries @ mine[0].transpose(-1, -2), queries @ past[0].transpose(-1, -2)) * scale
        weights = (logits + self.bias(layer, states.detach())[:, None]).softmax(dim=-1)
        return (weights * own) @ mine[1] + (weights * ~own) @ past[1]

    def own(self, count: int) -> Tensor:
        """queries x keys: both of one chunk, or both of the questions."""
        part = torch.full((count,), len(self.spans))
        for number, span in enumerate(self.spans):
            part[span] = number
        return part[:, None] == part[None, :]


@pytest.mark.parametrize(("family", "batch"), [*((family, 1) for family in FAMILIES), ("qwen2_5_omni", 2)])
def test_gradient_equals_one_shot_with_constant_states(family, batch) -> None:
    model, episode = adapted(family), episode_of(family, batch=batch)
    noting = KeptByChunk(StatesGradient())
    with attach(model) as attached:
        loss = streamed_loss_of(attached, episode, policy_of("omnimem"), noting)
        full = streamed_loss_of(attached, episode, policy_of("omnimem"), FullGradient())
        got, whole = gradient(loss, model), gradient(full, model)
        step = ConstantStates(episode, noting.kept, model)
        expected = gradient(one_shot_loss(attached, head_of(model), episode, step), model)
        cut = gradient(streamed_loss_of(attached, episode, policy_of("omnimem"), CutOff()), model)
    assert torch.equal(loss, full)
    # the norm of Qwen3's keys rounds to float32, here each question's gradient by itself
    assert_same_gradient(got, expected, 1e-6 if family.startswith("qwen3") else 1e-12)
    assert float(F.cosine_similarity(got, cut, dim=0)) < 0.9  # it is not the gradient of constant keys and values
    assert float(F.cosine_similarity(got, whole, dim=0)) < 0.99


@pytest.mark.parametrize("softness", [None, Softness(temperature=0.3)], ids=["hard", "soft"])
@pytest.mark.parametrize(("question", "by_layer"), HELD.values(), ids=HELD)
def test_every_way_of_keeping_the_question_gives_the_same_bits(question, by_layer, softness) -> None:
    """And softened selection those of hard selection: its scores are constants."""
    model, episode = adapted("qwen2_5_omni", torch.float32), episode_of("qwen2_5_omni", torch.float32)
    found = []
    for carry, layers, soft in (
        (StatesGradient(question=question), by_layer, softness),
        (StatesGradient(question=FullGradient(recompute=False)), False, None),
    ):
        with attach(model, recompute_layers=layers) as attached:
            loss = streamed_loss_of(attached, episode, policy_of("omnimem"), carry, soft)
            found.append((loss.detach(), gradient(loss, model)))
    if softness is None:
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])
    else:  # the gate rides in one more dimension of the head
        torch.testing.assert_close(found[0][0], found[1][0])
        assert_same_gradient(found[0][1], found[1][1], 1e-5)


def test_dropout_leaves_the_loss_that_of_the_full_gradient() -> None:
    """Keys and values made again draw again, for their gradient alone: nothing else draws another number."""
    model, episode = adapted("qwen2_5_omni", torch.float32, dropout=0.3), episode_of("qwen2_5_omni", torch.float32)
    found = []
    with attach(model) as attached:
        for carry, seed in ((StatesGradient(), 5), (FullGradient(), 5), (FullGradient(), 6)):
            torch.manual_seed(seed)
            found.append(streamed_loss_of(attached, episode, policy_of("omnimem"), carry).detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])  # dropout was active


@pytest.mark.parametrize("batch", [1, 2])
def test_states_that_move_up_are_read_at_their_new_positions(batch) -> None:
    """Keys and values written out from the states and positions of the memory at the end, for the last question."""
    model, episode = adapted("qwen2_5_omni"), episode_of("qwen2_5_omni", batch=batch)
    _, prompt = episode.asked[1]
    found = []
    with attach(model) as attached:
        for limit in (40, 1000):
            carry = StatesGradient()
            stream = Stream(attached, policy_of("omnimem"), batch=batch, carry=carry, last_position=limit)
            for chunk in episode.chunks:
                stream.feed(chunk)
            loss = loss_of(stream.reader(prompt), head_of(model), prompt.labels)
            again = loss(Memory(layers=tuple(written_out(model, *pair) for pair in enumerate(stream.memory.layers))))
            got = stream.read(loss)
            torch.testing.assert_close(got, again, rtol=1e-6, atol=0)  # keys are turned in float32
            found.append(gradient(got.sum(), model))
            assert_same_gradient(found[-1], gradient(again.sum(), model), 1e-5)
    assert not torch.allclose(*found, rtol=1e-3)  # they did move


def written_out(model: PreTrainedModel, layer: int, tokens: Tokens) -> Tokens:
    keys, values = pair_of(model, layer, tokens.states, tokens.positions)
    return replace(tokens, keys=keys, values=values, states=tokens.states[..., :0])


def test_chunks_leave_no_graph() -> None:
    model, episode = adapted("qwen2_5_omni"), episode_of("qwen2_5_omni")
    with attach(model) as attached:
        stream = Stream(attached, policy_of("omnimem"), carry=StatesGradient(), softness=Softness(temperature=0.3))
        for chunk in episode.chunks:
            stream.feed(chunk)
    assert not any(tensor.requires_grad for tensor in stream.memory.tensors())
    assert all(layer.states.shape[-1] == attached.shape.width for layer in stream.memory.layers)
