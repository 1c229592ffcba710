"""Greedy decoding: questions that share a memory are answered together, and the memory is copied once."""

from typing import Any

import pytest
import torch
from support.models import assert_equal_logits, cut, one_layer, text_model, whole_stream
from support.streams import policy_of, prompt_of
from support.unchecked import unchecked
from torch import Tensor
from torch._dynamo import reset

from omnimem.budget import Budget
from omnimem.memory import Memory
from omnimem.policies import ControlOptions, DistinctOptions, PerturbationOptions
from omnimem.policies.baselines.infinipot_v import InfiniPotVOptions
from omnimem.streaming import stream as stream_module
from omnimem.streaming.attach import attach
from omnimem.streaming.prompt_pass import last_of_each
from omnimem.streaming.stream import Stream

QUESTIONS = [[5, 6, 7], [250, 9], [40, 41, 42, 43, 44], [8]]
HEAD = torch.randn(300, 64, generator=torch.Generator().manual_seed(4))


def head(hidden: Tensor) -> Tensor:
    return hidden @ HEAD.T


@pytest.mark.parametrize("calls", [2, 32])
@pytest.mark.parametrize("slots", [None, ((2, 9), (3, 20), (9, 4), (2, 7))])
def test_questions_are_answered_together_as_one_by_one(slots, calls, monkeypatch) -> None:
    """With full memory, and where layers hold unequal numbers; room is made for the answer, or for two tokens."""
    monkeypatch.setattr(stream_module, "CALLS", calls)
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


def grown(questions: list[list[int]], written: list[list[int]]) -> list[list[int]]:
    return [[*question, *answer] for question, answer in zip(questions, written, strict=True)]


CASES = {
    "one pool": PerturbationOptions(name="paper").build(Budget.shared(4, 20)),
    "unequal layers": policy_of("paper", ((2, 9), (3, 20), (9, 4), (2, 7))),
    "text leaves with its group": PerturbationOptions().build(Budget.shared(4, 20)),
    "by head": DistinctOptions(per_head=True, markers="keep").build(Budget.shared(4, 20)),
    "contiguous times": InfiniPotVOptions(reindex=True, keys="unrotated").build(Budget.shared(4, 20)),
    "full memory": PerturbationOptions(name="paper").build(None),
    "nothing": ControlOptions(name="random").build(Budget.shared(4, 20)),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_a_call_reads_its_token_as_if_all_were_asked_again(case: str, batch: int) -> None:
    """In a batch, one stream is asked less; its missing questions decode nothing that anyone reads."""
    rows = [QUESTIONS, QUESTIONS[:2]][:batch]
    with attach(text_model("qwen2_5_omni")) as attached, torch.no_grad():
        stream = Stream(attached, CASES[case], batch=batch)
        for chunk in cut(whole_stream(90, batch), [60, 30]) if case != "nothing" else ():
            stream.feed(chunk)
        prompt, written = prompt_of(rows), [[[] for _ in row] for row in rows]
        decoding = stream.decoding(stream.ask(prompt), last_of_each(prompt)[1].clamp_min(0), 2)
        for step in range(5):
            if step and step % 2 == 0:
                decoding.extend(2)
            ids = torch.tensor([[7 * step + 2 * place for place in range(4)]] * batch)
            hidden = decoding(ids)
            for row, asked in enumerate(rows):
                for place in range(len(asked)):
                    written[row][place].append(int(ids[row, place]))
            again = prompt_of([grown(asked, answers) for asked, answers in zip(rows, written, strict=True)])
            expected, ends = stream.ask(again).hidden, last_of_each(again)[0]
            for row, asked in enumerate(rows):
                assert_equal_logits(hidden[row, : len(asked)], expected[row, ends[row, : len(asked)]])


def test_all_calls_have_one_layout_and_are_captured_once() -> None:
    """At the same addresses too, which CUDA graphs require; with the same hidden states to the bit."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    reset()
    with unchecked(), attach(one_layer()) as attached, torch.no_grad():
        stream = Stream(attached, policy_of("paper", ((6, 14),), split=False))
        stream.feed(whole_stream(60))
        prompt = prompt_of([QUESTIONS])
        state, offsets = stream.ask(prompt), last_of_each(prompt)[1]
        plain, captured = (stream.decoding(state, offsets, 3) for _ in range(2))
        call, seen = torch.compile(captured.__call__, backend=backend, fullgraph=True, dynamic=False), []
        for step in range(3):
            ids = torch.tensor([[5, 6, 7, 8 + step]])
            assert torch.equal(call(ids), plain(ids))
            held = [*sum(captured.stored, ()), *(places.bias for places in captured.places), captured.positions]
            seen.append([(part.data_ptr(), part.shape, part.stride()) for part in held])
    reset()
    assert len(graphs) == 1
    assert seen[0] == seen[1] == seen[2]


def test_the_room_of_full_memory_is_lent_and_given_back() -> None:
    """While it is lent, what is fed goes elsewhere; memory and answers are as if nothing had been."""
    with attach(text_model("qwen2_5_omni")) as attached, torch.no_grad():
        first, second, third = cut(whole_stream(400), [300, 40, 60])
        asked, quiet = (Stream(attached, CASES["full memory"]) for _ in range(2))
        for stream in (asked, quiet):
            stream.feed(first)
            stream.feed(second)
        prompt = prompt_of([QUESTIONS])
        room = asked.memory.layers[0].room
        assert room is not None
        decoding = asked.decoding(asked.ask(prompt), last_of_each(prompt)[1], 2)
        assert decoding.stored[0][0].data_ptr() == asked.memory.layers[0].keys.data_ptr()
        one = decoding(torch.tensor([[1, 2, 3, 4]]))
        fork = asked.fork()
        fork.feed(third)
        assert fork.memory.layers[0].room is not room
        two = decoding(torch.tensor([[1, 2, 3, 4]]))
        decoding.extend(2)
        assert decoding.stored[0][0].data_ptr() == asked.memory.layers[0].keys.data_ptr(), "there is room for more"
        three = decoding(torch.tensor([[1, 2, 3, 4]]))
        decoding.close()
        assert room.filled == asked.memory.layers[0].count
        again = quiet.decoding(quiet.ask(prompt), last_of_each(prompt)[1], 2)
        assert all(torch.equal(again(torch.tensor([[1, 2, 3, 4]])), expected) for expected in (one, two))
        again.close()
        longer = quiet.decoding(quiet.ask(prompt), last_of_each(prompt)[1], 3)
        assert_equal_logits([longer(torch.tensor([[1, 2, 3, 4]])) for _ in range(3)][-1], three)
        longer.close()
        for stream in (asked, quiet):
            stream.feed(third)
    for memory in (asked.memory, quiet.memory):
        assert all(map(torch.equal, memory.tensors(), fork.memory.tensors()))


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_an_answer_gives_the_room_back(tokens, monkeypatch) -> None:
    """However many tokens it has; what lies in free places is never read."""
    monkeypatch.setattr(stream_module, "CALLS", 2)
    with attach(text_model("qwen2_5_omni")) as attached, torch.no_grad():
        stream, clean = (Stream(attached, CASES["full memory"]) for _ in range(2))
        for chunk in cut(whole_stream(400), [300, 40, 60])[:2]:
            stream.feed(chunk)
            clean.feed(chunk)
        for layer in stream.memory.layers:
            assert layer.room is not None
            for buffer in layer.room.buffers[:2]:
                buffer[:, :, layer.count :] = float("nan")
        answers = [
            each.answer(prompt_of([QUESTIONS]), head, stop=[], max_new_tokens=tokens) for each in (stream, clean)
        ]
        assert answers[0] == answers[1]
        assert [layer.room and layer.room.filled for layer in stream.memory.layers] == [340] * 4


def test_layers_that_hide_different_tokens_are_read_with_their_own_gates() -> None:
    """Though they hold equal numbers: rows of a batch whose text leaves with its group are padded, each elsewhere."""
    with attach(text_model("qwen2_5_omni")) as attached, torch.no_grad():
        stream = Stream(attached, CASES["text leaves with its group"], batch=2)
        stream.feed(whole_stream(90, 2))
        layers, draw = [], torch.Generator().manual_seed(1)
        for layer in stream.memory.layers:
            layers.append(layer.masked(torch.rand(layer.modality.shape, generator=draw) < 0.7))
        stream.memory = Memory(layers=tuple(layers))
        prompt, rows = prompt_of([QUESTIONS] * 2), range(2)
        decoding = stream.decoding(stream.ask(prompt), last_of_each(prompt)[1], 1)
        hidden = decoding(torch.tensor([[1, 2, 3, 4]] * 2))
        again = prompt_of([grown(QUESTIONS, [[1], [2], [3], [4]])] * 2)
        expected, ends = stream.ask(again).hidden, last_of_each(again)[0]
        for row in rows:
            assert_equal_logits(hidden[row], expected[row, ends[row]])
