"""Greedy decoding: questions that share a memory are answered together, and the memory is copied once."""

import pytest
import torch
from support.models import cut, text_model, whole_stream
from support.streams import policy_of, prompt_of
from torch import Tensor

from omnimem.budget import Budget
from omnimem.policies import PerturbationOptions
from omnimem.streaming import prompt_pass
from omnimem.streaming.attach import attach
from omnimem.streaming.stream import Stream

QUESTIONS = [[5, 6, 7], [250, 9], [40, 41, 42, 43, 44], [8]]
HEAD = torch.randn(300, 64, generator=torch.Generator().manual_seed(4))


def head(hidden: Tensor) -> Tensor:
    return hidden @ HEAD.T


@pytest.mark.parametrize("answer", [1, 64])
@pytest.mark.parametrize("slots", [None, ((2, 9), (3, 20), (9, 4), (2, 7))])
def test_questions_are_answered_together_as_one_by_one(slots, answer, monkeypatch) -> None:
    """With full memory, and where layers hold unequal numbers; the storage is too small for the answer, or not."""
    monkeypatch.setattr(prompt_pass, "ANSWER", answer)
    policy = policy_of("paper", slots) if slots else PerturbationOptions(name="paper").build(None)
    with attach(text_model("qwen2_5_omni")) as attached:
        stream = Stream(attached, policy)
        with torch.no_grad():
            for chunk in cut(whole_stream(90), [60, 30]):
                stream.feed(chunk)
        before = [tensor.clone() for tensor in stream.memory.tensors()]
        together = stream.answer(prompt_of([QUESTIONS]), head, stop=[17], max_new_tokens=12)[0]
        alone = [stream.answer(prompt_of([[each]]), head, stop=[17], max_new_tokens=12)[0][0] for each in QUESTIONS]
    assert together == alone
    assert len({tuple(each) for each in alone}) > 1
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(stream.memory.tensors(), before, strict=True))


def test_two_continuations_of_a_question_do_not_see_each_other() -> None:
    """The second one finds the places behind the question taken, and copies; so does one after another chunk."""
    with attach(text_model("qwen2_5_omni")) as attached, torch.no_grad():
        stream = Stream(attached, PerturbationOptions(name="paper").build(Budget.shared(4, 20)))
        first, second = cut(whole_stream(80), [50, 30])
        stream.feed(first)
        asked = stream.ask(prompt_of([[[5, 6, 7]]]))
        state = stream.ask(prompt_of([[[8]]]), asked)
        storage = state.joined[0]
        on, other = (stream.ask(prompt_of([[[number]]]), state) for number in (9, 10))
        again = stream.ask(prompt_of([[[9]]]), state)
        stream.feed(second)
        later = stream.ask(prompt_of([[[9]]]), state)
    assert on.joined[0] is storage
    assert other.joined[0] is not storage
    torch.testing.assert_close(on.hidden, again.hidden, rtol=0, atol=1e-6)
    assert not torch.allclose(on.hidden, other.hidden)
    assert not torch.allclose(on.hidden, later.hidden)
