"""The seam: streaming equals one shot in four families, and the model is as before afterwards."""

import pytest
import torch
from support.models import assert_equal_logits, cut, one_shot, text_model, whole_stream
from torch import Tensor

from omnimem.attention.blocked import attend
from omnimem.policies import PerturbationOptions
from omnimem.streaming.attach import NAME, attach
from omnimem.streaming.prompt_pass import Prompt
from omnimem.streaming.stream import Stream
from omnimem.tokens import Chunk

CUTS = [[20, 31, 1, 44], [96], [1] * 6 + [90], [48, 48]]


class Collecting:
    """A layer step that keeps the hidden states out of it: plain causal attention over all that came before."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def __call__(
        self, layer: int, states: Tensor, queries: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        if layer in self.keys:
            keys = torch.cat([self.keys[layer], keys], dim=2)
            values = torch.cat([self.values[layer], values], dim=2)
        self.keys[layer], self.values[layer] = keys, values
        return attend(queries, keys, values, scale=scale)


def alone(layer: int, states: Tensor, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """A layer step without a past: it may run twice and does the same."""
    return attend(queries, keys, values, scale=scale)


@pytest.mark.parametrize("lengths", CUTS)
def test_chunked_attention_equals_one_shot(family, lengths) -> None:
    model = text_model(family)
    whole = whole_stream(levels=2 if family.startswith("qwen3") else 0)
    expected = one_shot(model, whole)
    step = Collecting()
    with attach(model) as attached:
        parts = [attached.run(step, c.embeddings, c.positions, c.deepstack) for c in cut(whole, lengths)]
    assert_equal_logits(torch.cat(parts, dim=1), expected)


@pytest.mark.parametrize("lengths", CUTS)
def test_a_question_after_an_unlimited_stream_equals_one_shot(family, lengths) -> None:
    model = text_model(family)
    whole = whole_stream(levels=2 if family.startswith("qwen3") else 0)
    ids = torch.tensor([[5, 6, 7, 8]])
    first = int(whole.positions.max()) + 1
    places = (torch.arange(4) + first).expand(1, 3, 4)
    joined = Chunk(
        embeddings=torch.cat([whole.embeddings, model.get_input_embeddings()(ids)], dim=1),
        positions=torch.cat([whole.positions, places], dim=2),
        modality=torch.cat([whole.modality, torch.zeros(1, 4, dtype=torch.int8)], dim=1),
        deepstack=whole.deepstack
        and type(whole.deepstack)(
            mask=torch.cat([whole.deepstack.mask, torch.zeros(1, 4, dtype=torch.bool)], dim=1),
            features=whole.deepstack.features,
        ),
    )
    expected = one_shot(model, joined)[:, -4:]
    with attach(model) as attached:
        stream = Stream(attached, PerturbationOptions().build(None))
        for chunk in cut(whole, lengths):
            stream.feed(chunk)
        prompt = Prompt(ids=ids, segments=torch.zeros_like(ids), offsets=torch.arange(4)[None])
        assert_equal_logits(stream.ask(prompt).hidden, expected)


def test_the_model_is_restored_even_after_an_exception() -> None:
    model = text_model("qwen2_5_omni")
    whole = whole_stream()
    before = one_shot(model, whole)
    inside = []

    def fail() -> None:
        with attach(model):
            inside.append(model.config._attn_implementation)
            raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose"):
        fail()
    assert inside == [NAME]
    assert model.config._attn_implementation != NAME
    hooks = [h for m in model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    assert not hooks
    assert torch.equal(one_shot(model, whole), before)


def test_a_direct_call_of_an_attached_model_is_refused() -> None:
    model = text_model("qwen2_5_omni")
    with attach(model), pytest.raises(RuntimeError, match=r"StreamedAttention\.run"):
        one_shot(model, whole_stream())


def test_recomputed_layers_save_less_and_give_the_same_gradient_and_leave_the_model_as_it_was(family) -> None:
    model = text_model(family)
    whole = whole_stream(levels=2 if family.startswith("qwen3") else 0)
    gradients, saved = [], []
    for recompute in (False, True):
        sizes: list[int] = []
        weight = torch.nn.Parameter(whole.embeddings.clone())
        with attach(model, recompute_layers=recompute) as attached:
            hooks = (lambda tensor, sizes=sizes: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor)
            with torch.autograd.graph.saved_tensors_hooks(*hooks):
                output = attached.run(alone, weight, whole.positions, whole.deepstack)
            output.square().sum().backward()
        saved.append(sum(sizes))
        assert weight.grad is not None
        gradients.append(weight.grad)
        assert not any(module.training for module in model.modules())
        assert not any("gradient_checkpointing" in vars(layer) for layer in model.layers)
    assert torch.equal(*gradients)
    assert saved[1] < saved[0] / 3
