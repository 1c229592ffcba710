"""Streams of plain text: equal to one shot, answers, training steps, adapters."""

import pytest
import torch
from support.models import assert_equal_logits
from support.text_models import causal_model, text_lm

from omnimem.backbones.base import Turn
from omnimem.budget import Budget
from omnimem.policies import ControlOptions, PerturbationOptions
from omnimem.policies.baselines.oracle import OracleOptions
from omnimem.policies.baselines.streaming_llm import StreamingLLMOptions
from omnimem.streaming.attach import attach
from omnimem.streaming.stream import Stream
from omnimem.streaming.text_feeder import TextFeeder, TextQuestion, TextSample
from omnimem.tokens import Modality
from omnimem.tuning import (
    AnswerLoss,
    FullGradient,
    FullMemoryKL,
    HorizonGradient,
    LoraOptions,
    StatesGradient,
    add_adapter,
    streamed_loss,
    trainable,
)

STORY = "the key of anna is red. the key of bob is blue. " * 4


def sample_of(model, **settings) -> TextSample:
    question = Turn(text="what is the key of anna ?", answer="red", given="it is ")
    segments = (model.segment(STORY[:70]), model.segment(STORY[70:], Modality.AUDIO))
    return TextSample(id="story", segments=segments, questions=(TextQuestion(turn=question),), **settings)


@pytest.mark.parametrize("chunk_tokens", [7, 64, 1000])
@pytest.mark.parametrize("template", [False, True])
def test_unlimited_streams_equal_one_shot(chunk_tokens, template) -> None:
    model = text_lm(template=template)
    feeder, sample = TextFeeder(model, chunk_tokens=chunk_tokens), sample_of(text_lm())
    with attach(model.text_model) as attached, torch.no_grad():
        stream = feeder.stream(attached, PerturbationOptions().build(None))
        for chunk in feeder.chunks([sample]):
            stream.feed(chunk)
        prompt = feeder.prompt([[Turn(text="who ?")]])
        got = model.head(stream.ask(prompt).hidden)
    opening = model.ids(model._opening, control=True)
    ids = [*opening, *(i for segment in sample.segments for i in segment.ids), *prompt.ids[0].tolist()]
    with torch.no_grad():
        expected = model.model(torch.tensor([ids])).logits[:, -prompt.ids.shape[1] :]
    assert_equal_logits(got, expected)


def test_a_budget_keeps_no_more_than_its_slots_and_questions_during_the_stream_see_their_past() -> None:
    model, asked = text_lm(), Turn(text="what ?", answer="red")
    sample = TextSample(
        id="s",
        segments=(model.segment(STORY),),
        questions=(TextQuestion(turn=asked, after=50), TextQuestion(turn=asked)),
    )
    feeder = TextFeeder(model, chunk_tokens=32)
    assert sample.moments == (50.0, None)
    assert any(chunk.seconds == 50.0 for chunk in feeder.chunks([sample]))
    with attach(model.text_model) as attached:
        outcome = streamed_loss(
            attached,
            feeder,
            [sample],
            PerturbationOptions().build(Budget.shared(4, 16)),
            softness=None,
            carry=FullGradient(),
        )
    assert outcome.kept["visual"] == 4 * 16
    assert outcome.rows == {"answer": 2 * 4}  # three letters and the end of the answer


def test_answers_continue_what_is_given() -> None:
    model = text_lm()
    feeder = TextFeeder(model, chunk_tokens=32)
    with attach(model.text_model) as attached, torch.no_grad():
        stream = feeder.stream(attached, PerturbationOptions().build(Budget.shared(4, 16)))
        for chunk in feeder.chunks([sample_of(model)]):
            stream.feed(chunk)
        found = feeder.answers(stream, ["what ?", Turn(text="what ?", given="it is ", answer="red")], max_new_tokens=3)
    assert len(found) == 2


@pytest.mark.parametrize("whole", [False, True], ids=["text model", "causal model"])
@pytest.mark.parametrize("carry", [FullGradient(), StatesGradient(), HorizonGradient(chunks=1)])
def test_an_adapter_learns_through_the_memory(carry, whole) -> None:
    model, sample = text_lm(), sample_of(text_lm())
    adapted = add_adapter(model.model if whole else model.text_model, LoraOptions(r=4, alpha=8.0, dropout=0.0))
    losses = (AnswerLoss(), FullMemoryKL(max_tokens=10_000))
    with attach(model.text_model) as attached:
        outcome = streamed_loss(
            attached,
            TextFeeder(model, chunk_tokens=48),
            [sample, sample],
            PerturbationOptions().build(Budget.shared(4, 16)),
            softness=None,
            carry=carry,
            losses=losses,
            model=adapted,
        )
        outcome.loss.backward()
    assert outcome.rows == {"answer": 8, "full_memory_kl": 8}
    assert all(each.grad is not None for each in trainable(adapted))


def test_a_loss_with_a_teacher_is_left_out_of_streams_that_are_too_long() -> None:
    """The number of tokens is the stream's, not that of encoded media."""
    sample = sample_of(text_lm())
    assert sample.tokens == len(STORY)
    assert not FullMemoryKL(max_tokens=len(STORY) - 1).applies_to(sample.tokens)


def test_the_oracle_keeps_the_needles() -> None:
    model = text_lm()
    sample, feeder = sample_of(model, needles=(3, 100)), TextFeeder(model, chunk_tokens=32)
    policy = OracleOptions().build(Budget.shared(4, 2))
    with attach(model.text_model) as attached, torch.no_grad():
        stream = feeder.stream(attached, feeder.with_oracle(policy, [sample]))
        for chunk in feeder.chunks([sample]):
            stream.feed(chunk)
    before = len(model.ids(model._opening, control=True))
    layer = stream.memory.layers[0]
    assert layer.order[0][layer.modality[0] > 0].tolist() == [before + 3, before + 100]


@pytest.mark.parametrize("modality", [Modality.VISUAL, Modality.AUDIO])
@pytest.mark.parametrize("compact", [False, True], ids=["reindex", "positions run out"])
def test_kept_text_moves_up_and_new_text_follows_it(modality, compact) -> None:
    model = text_lm(template=False, system="abc")
    sample = TextSample(id="s", segments=(model.segment(STORY, modality),))
    policy = ControlOptions(name="recency").build(BUDGET) if compact else StreamingLLMOptions().build(BUDGET)
    with attach(model.text_model) as attached, torch.no_grad():
        stream = Stream(attached, policy, last_position=3 + 16 + 24 + 8 if compact else None)
        for chunk in TextFeeder(model, chunk_tokens=24).chunks([sample]):
            stream.feed(chunk)
            times = stream.memory.layers[0].positions[0, 0]
            assert bool((times[1:] > times[:-1]).all())
            assert stream.next_position == int(times.max()) + 1
            assert stream.next_position <= 3 + 16 + 24 + (8 if compact else 0)
    assert stream.moved > 0


BUDGET = Budget.shared(4, 16)


def test_a_text_model_alone_takes_an_adapter_and_its_encoders_would_not() -> None:
    adapted = add_adapter(causal_model().model, LoraOptions(r=2, alpha=4.0))
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(names) == 4 * 3 * 2
