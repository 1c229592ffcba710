"""Plain text: chunks, prompts, labels and batches of a text stream."""

import pytest
import torch
from support.text_models import causal_model, text_lm, tokenizer

from omnimem.backbones.base import LayoutError, Turn
from omnimem.backbones.text import TextModel, TextSegment
from omnimem.tokens import Modality


def test_chunks_are_the_opening_and_the_stream_cut_at_moments() -> None:
    model = text_lm()
    segments = [model.segment("abcdefghij"), model.segment("klmno", Modality.AUDIO)]
    opening, *chunks = model.chunks([segments], chunk_tokens=6, cuts=[8.0, 99.0])
    assert opening.modality.unique().tolist() == [int(Modality.TEXT)]
    assert [chunk.count for chunk in chunks] == [6, 2, 6, 1]
    assert [chunk.seconds for chunk in chunks] == [6.0, 8.0, 14.0, 15.0]
    assert torch.cat([chunk.modality[0] for chunk in chunks]).tolist() == [2] * 10 + [1] * 5
    places = torch.cat([chunk.positions for chunk in (opening, *chunks)], dim=2)
    assert torch.equal(places, torch.arange(places.shape[2]).expand(1, 3, -1))


def test_without_a_template_nothing_is_added() -> None:
    model = text_lm(template=False)
    (chunk,) = model.chunks([[model.segment("abc")]], chunk_tokens=9)
    assert chunk.count == 3
    ids, _, labels = model.turn(Turn(text="de", answer="fg"))
    assert model.tokenizer.decode(ids).replace(" ", "") == "defg"
    assert labels == [-100, *ids[2:], -100]


@pytest.mark.parametrize("ready", [False, True])
def test_a_given_beginning_of_the_answer_is_read_and_not_learned(ready) -> None:
    model = text_lm()
    plain = model.turn(Turn(text="who ?"))[0]
    turn = Turn(text="who ?", answer="me", given="it is ")
    if ready:
        turn = Turn(ids=tuple(plain), answer="me", given="it is ")
    ids, offsets, labels = model.turn(turn)
    answer = [*model.ids("me"), *model.stop]
    assert ids == [*plain, *model.ids("it is "), *answer]
    assert [label for label in labels if label != -100] == answer
    assert labels.index(answer[0]) == len(ids) - len(answer) - 1
    assert offsets == list(range(len(ids)))


def test_control_tokens_of_a_user_are_text() -> None:
    model = text_lm()
    assert not set(model.ids("a</s>b")) & set(model.stop)
    assert model.stop[0] in model.ids("a</s>b", control=True)


def test_streams_of_a_batch_share_their_layout() -> None:
    model = text_lm()
    streams = [[model.segment("abcd")], [model.segment("ab"), model.segment("cd", Modality.AUDIO)]]
    with pytest.raises(LayoutError, match="streams 0 and 1"):
        list(model.chunks(streams, chunk_tokens=2))


def test_text_of_a_stream_must_be_evictable() -> None:
    with pytest.raises(LayoutError, match="TEXT"):
        TextSegment(ids=(1,), modality=Modality.TEXT)


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m['role'] }}{% endfor %}"])
def test_a_template_without_the_users_text_is_refused(template) -> None:
    with pytest.raises(LayoutError, match="template=False"):
        TextModel(causal_model(), tokenizer(template))


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(LayoutError, match="LlamaModel"):
        TextModel(causal_model().model, tokenizer())
