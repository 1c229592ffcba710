"""Token ids of prompts: computed once for a short text, and never more than a bounded number kept."""

import pytest
from support.text_models import tokenizer

from omnimem.backbones import prompt_text
from omnimem.backbones.prompt_text import SHORT, PromptText


@pytest.mark.parametrize(("text", "kept"), [("a question ?", True), ("", True), ("a" * (SHORT + 1), False)])
def test_ids_of_a_short_text_are_computed_once(monkeypatch, text, kept) -> None:
    letters, asked = tokenizer(), []
    made = PromptText(letters)
    monkeypatch.setattr(type(letters), "__call__", lambda self, part, **_: asked.append(part) or ids(part))
    found = [made.ids(text) for _ in range(3)]
    assert found == [ids(text)["input_ids"]] * 3
    assert len(asked) == (1 if kept else 3)
    found[0].append(-1)
    assert made.ids(text) == found[1], "a caller's list is its own"


def ids(text: str) -> dict[str, list[int]]:
    return {"input_ids": [ord(letter) for letter in text]}


def test_the_number_of_texts_is_bounded(monkeypatch) -> None:
    monkeypatch.setattr(prompt_text, "KNOWN", 4)
    made = PromptText(tokenizer())
    for number in range(20):
        made.ids(f"question {number}")
        assert len(made._known) <= 4
