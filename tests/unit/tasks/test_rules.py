"""Answers are read as the published scorers read them; the letters below were made by running those scorers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnimem.data import Item, Question
from omnimem.tasks import (
    LVBenchOptions,
    LVOmniBenchOptions,
    OwnOptions,
    StreamingBenchOptions,
    VideoMMEOptions,
    own,
    rules,
)
from omnimem.tasks.rules import is_bare

READERS = (rules.video_mme, rules.vlmevalkit, rules.lvbench, rules.lvomnibench, rules.streamingbench, rules.lmms_eval)
GOLDEN = (  # what the scorers of READERS, in this order, make of each prediction
    ("B", "B", "B", "B", "B", "B", "B"),
    ("B.", "B", "B", "B", "B", "B", "B"),
    ("b", None, None, None, "B", None, None),
    ("(B)", "B", "B", "B", "B", None, "B"),
    ("**B**", "B", "B", None, "B", None, "B"),
    ("B)", "B", "B", "B", "B", "B", "B"),
    ("B: a man", "B", "B", "B", "B", "B", "B"),
    ("Option B", "B", "B", None, "B", None, "B"),
    ("Answer: B", "A", "B", "A", "B", "A", "B"),
    ("answer: b", None, None, None, "B", None, None),
    ("The best answer is B.", "B", "B", None, "B", None, "B"),
    ("The correct option is (B).", "B", "B", "B", "B", None, "B"),
    ("I think it is B, not C", "B", "B", None, "B", None, "C"),
    ("A man in black: B", "A", "A", "A", "A", "A", "A"),
    ("The answer is B because A is wrong", "B", "B", None, "B", None, "A"),
    ("Cannot be determined", "C", "C", "C", "C", "C", "C"),
    ("I do not know", None, None, None, "D", None, None),
    ("Sorry, no", None, None, None, None, None, None),
    ("", None, None, None, None, None, None),
    ("   ", None, None, None, None, None, None),
    ("E", None, None, None, "E", None, None),
    ("<think>A or C</think> B", "A", "A", None, "A", None, "B"),
    ("B\nThe man is red", "B", "B", "B", "B", "B", "B"),
    (" B", "B", "B", "B", "B", None, "B"),
    ("C or D", "C", "C", "C", "C", "C", "C"),
    ("\n\nB", "B", "B", "B", "B", None, "B"),
)


def question(answer: str = "B", options: int = 4) -> Question:
    """A question with as many options."""
    item = Item(id="q", options=tuple(f"option {number}" for number in range(options)))
    return Question(index=0, text="?", answer=answer, at=None, kind="", loss=False, item=item)


@pytest.mark.parametrize(("prediction", "letters"), [(row[0], row[1:]) for row in GOLDEN])
def test_each_rule_set_reads_what_its_scorer_reads(prediction, letters) -> None:
    assert tuple(read(prediction, "ABCD") for read in READERS) == letters


def test_all_rule_sets_agree_on_a_bare_letter() -> None:
    for prediction in ("B", "B."):
        assert is_bare(prediction, "ABCD")
        assert {read(prediction, "ABCD") for read in (*READERS, own.letter)} == {"B"}


@pytest.mark.parametrize("prediction", ["b", "(B)", "Answer: B", "E", "", "B.."])
def test_anything_but_a_letter_of_the_options_is_not_in_the_form_asked_for(prediction) -> None:
    assert not is_bare(prediction, "ABCD")


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [("b", "B"), ("(B).", "B"), ("**B**", "B"), (" B\n", "B"), ("E", None), ("B or C", None), ("", None), ("BB", None)],
)
def test_the_strict_rule_takes_one_letter_in_either_case_and_nothing_else(prediction, answer) -> None:
    assert own.letter(prediction, "ABCD") == answer


def test_a_closed_block_of_reasoning_is_left_out_and_an_open_one_is_not() -> None:
    assert rules.without_reasoning("<think>A</think>B<analysis>C\nD</analysis>") == "B"
    assert rules.without_reasoning("it is A</think>B") == "B"
    assert rules.without_reasoning("<think>A") == "<think>A"


@given(st.text(alphabet="ABCDEb .,:()<>/think\nanswer is", max_size=40))
def test_no_rule_set_reads_a_letter_that_no_option_has(prediction) -> None:
    for read in READERS:
        assert read(prediction, "ABCD") in (None, *("ABCDEF" if read is rules.lvomnibench else "ABCD"))


@pytest.mark.parametrize(
    ("rule_set", "unread", "empty"),
    [
        (VideoMMEOptions.rule_sets["official"], False, False),  # drops what it cannot read
        (VideoMMEOptions.rule_sets["lmms_eval"], True, True),
        (VideoMMEOptions.rule_sets["vlmevalkit"], True, True),
        (LVBenchOptions.rule_sets["official"], True, True),
        (LVBenchOptions.rule_sets["lmms_eval"], True, True),
        (LVOmniBenchOptions.rule_sets["official"], False, False),
        (StreamingBenchOptions.rule_sets["official"], True, False),  # drops what is empty
        (StreamingBenchOptions.rule_sets["lmms_eval"], True, True),
        (OwnOptions.rule_sets["letter"], True, True),
    ],
)
def test_what_is_counted_follows_the_denominator_of_the_scorer(rule_set, unread, empty) -> None:
    assert rule_set.judge(question(), "Sorry, no").counted is unread
    assert rule_set.judge(question(), "").counted is empty
    assert rule_set.judge(question(), "B").counted
    assert rule_set.judge(question(), "Sorry, no").answer is None


def test_a_verdict_is_correct_only_for_the_letter_of_the_answer() -> None:
    judge = VideoMMEOptions.rule_sets["official"].judge
    assert judge(question("B"), "B").correct
    assert not judge(question("A"), "B").correct
    assert not judge(question(""), "").correct


def test_letters_go_as_far_as_the_options() -> None:
    judge = OwnOptions.rule_sets["lmms_eval"].judge
    assert judge(question("E", options=5), "(E)").correct
    assert judge(question("B", options=2), "C").answer is None
    assert judge(question("B", options=0), "(D)").answer == "D"  # options that are not listed: four
