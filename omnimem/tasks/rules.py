"""Rule sets: answer extraction (the letter of a prediction) and the denominator of the accuracy.

Each reproduces a published scorer, quirks included, so that the same predictions give the same number; they agree on
a bare `B` or `B.`, and on little else. A rule set of another edition gets another name.

A failure message of a tool or an API is no prediction, and a refusal that names no option is no answer, under every
rule set (`failures.py`): the published scorers read `A` in "Failed to obtain answer via API." and `C` in "I cannot
answer" (ours).

Extraction by task: Video-MME `video_mme`, `vlmevalkit`; LVBench `lvbench`; StreamingBench `streamingbench`; LVOmniBench
`lvomnibench`; all of them also `lmms_eval`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, final

from omnimem.data import Question
from omnimem.tasks.failures import is_failure, is_refusal

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FOUR = LETTERS[:4]

Read = Callable[[str, str], str | None]  # (prediction, letters of the options) -> letter, or None


@final
@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Verdict of a rule set on one prediction.

    Over the questions of a benchmark: official = Σ correct / Σ counted; strict = Σ correct / all, where a question
    without a prediction is wrong; no-answer rate = mean(answer is None); format rate = mean(bare).
    """

    answer: str | None  # as extracted; None: no answer found
    correct: bool  # False without an answer
    counted: bool  # in the denominator of the official accuracy
    bare: bool  # the prediction is an answer in the requested form, and nothing else
    failed: bool = False  # the prediction is a failure message of a tool, which counts as no prediction


@final
@dataclass(frozen=True, kw_only=True)
class RuleSet:
    """How answers are extracted, and which questions the official accuracy counts."""

    read: Read
    denominator: Literal["answered", "written", "all"]  # questions with a letter; with a prediction; all

    def judge(self, question: Question, prediction: str) -> Verdict:
        """The verdict on a prediction for a multiple-choice question."""
        letters = LETTERS[: len(question.item.options)] or FOUR  # if the benchmark does not list them
        failed = is_failure(prediction)
        answer = None if failed or is_refusal(prediction) else self.read(prediction, letters)
        written = prediction != "" and not failed
        counted = {"answered": answer is not None, "written": written, "all": True}[self.denominator]
        return Verdict(
            answer=answer,
            correct=answer is not None and answer == question.answer,
            counted=counted,
            bare=is_bare(prediction, letters),
            failed=failed,
        )


def is_bare(prediction: str, letters: str) -> bool:
    """Whether a prediction is only an option letter, perhaps with a full stop: all rule sets agree on it."""
    return re.fullmatch(f"[{letters}]\\.?", prediction.strip()) is not None


# -------------------------------------------------------------------------------------------- the benchmarks' own rules

PREFIXES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option isThe correct option is",  # two prefixes without the comma between them, in both scorers
    "Best answer:Best option:",
)


def video_mme(prediction: str, letters: str = FOUR) -> str | None:
    """Video-MME: the first of A, B, C, D after six prefixes are removed: `Answer: B` is A (eval_your_results.py)."""
    return _first_capital(prediction, PREFIXES)


def vlmevalkit(prediction: str, letters: str = FOUR) -> str | None:
    """As `video_mme`; `Answer:` and `Option:` are removed too (VLMEvalKit, exact matching)."""
    return _first_capital(prediction, (*PREFIXES, "Answer:", "Option:"))


def _first_capital(prediction: str, prefixes: tuple[str, ...]) -> str | None:
    for prefix in prefixes:
        prediction = prediction.replace(prefix, "")
    found = re.search(f"[{FOUR}]", prediction)
    return found[0] if found else None


def lvbench(prediction: str, letters: str = FOUR) -> str | None:
    """LVBench: the text before the first `)`, from it the first character after `(` (polish_answer)."""
    inside = prediction.strip().split(")")[0].strip()
    if "(" in inside:
        inside = inside.split("(")[1].strip()
    return _letter(inside.split(" ")[0], letters)


def streamingbench(prediction: str, letters: str = FOUR) -> str | None:
    """StreamingBench: the very first character, even a blank (count.py)."""
    return _letter(prediction, letters)


def _letter(text: str, letters: str) -> str | None:
    return text[0] if text and text[0] in letters else None


def lvomnibench(prediction: str, letters: str = FOUR) -> str | None:
    """LVOmniBench: a leading letter, else `answer is|: X`, else a letter by itself, else any of A to F; in either case.

    Of several letters by themselves, the first in the alphabet (prompt_utils.py).
    """
    six, text = LETTERS[:6], prediction.upper().strip()
    if re.match(rf"[{six}]([.): ,]|\Z)", text):
        return text[0]
    declared = re.search(rf"(?:THE\s+)?ANSWER\s*(?:IS|:)\s*([{six}])", text)
    if declared:
        return declared[1]
    alone = sorted(set(re.findall(rf"\b[{six}]\b", text)))
    return next(iter([*alone, *(sign for sign in text if sign in six)]), None)


# ------------------------------------------------------------------------------------------------------------ lmms-eval

MARKS = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))  # around a letter, with their rank
START, END, PHRASE, ANYWHERE = 10, 9, 7, 0  # ranks of the other places
PHRASES = (  # the first occurrence of each counts; a phrase that contains another one may begin later
    *(f"{which}answer is" for which in ("", "the ", "correct ", "the correct ", "best ", "the best ", "my ")),
    *(f"{which}option is" for which in ("correct ", "the correct ", "best ", "the best ")),
    *(f"{which}choice is" for which in ("", "the ", "correct ", "the correct ", "my ")),
    *("i choose", "i select", "i pick"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
REASONING = ("think", "analysis")


def lmms_eval(prediction: str, letters: str = FOUR) -> str | None:
    """The letter in the highest-ranking place, the last of several (lmms-eval 0.7.2 and 0.7.3, mcq_extract.py).

    Places: alone at the start, at the end, after `answer is` and similar phrases, `(B)`, `B.`, `B:`, `B)`, before a
    blank, anywhere. <think> and <analysis> blocks are removed first.
    """
    text = without_reasoning(prediction).strip()
    for sign in ",.!?;:'\"":
        text = text.strip(sign)
    text = f" {text} "
    found = [
        (rank, text.rfind(mark.format(letter)), letter)
        for mark, rank in MARKS
        for letter in letters
        if mark.format(letter) in text
    ]
    found += _declared(text, letters) + _outermost(text, letters)
    found = found or [(ANYWHERE, text.rfind(letter), letter) for letter in letters if letter in text]
    return max(found, key=lambda place: place[:2])[2] if found else None


def _declared(text: str, letters: str) -> list[tuple[int, int, str]]:
    """The next place of each letter after the first occurrence of each phrase."""
    begun = [text.lower().find(phrase) for phrase in PHRASES]
    ends = [start + len(phrase) for start, phrase in zip(begun, PHRASES, strict=True) if start >= 0]
    places = [(text.find(letter, end), letter) for end in ends for letter in letters]
    return [(PHRASE, place, letter) for place, letter in places if place >= 0]


def _outermost(text: str, letters: str) -> list[tuple[int, int, str]]:
    """The first and the last character, if they are letters by themselves."""
    core = text.strip()
    found: list[tuple[int, int, str]] = []
    if core and core[0] in letters and not core[1:2].isalpha():
        found.append((START, 0, core[0]))
    if core and core[-1] in letters and not core[-2:-1].isalpha():
        found.append((END, len(text) - 1, core[-1]))
    return found


def without_reasoning(text: str) -> str:
    """The text without closed reasoning blocks, or after a closing tag whose opening was in the prompt."""
    for name in REASONING:
        start, end = f"<{name}>", f"</{name}>"
        text = re.sub(f"{start}.*?{end}", "", text, flags=re.DOTALL)
        if start not in text:
            text = text.rsplit(end, 1)[-1]
    return text


LMMS_EVAL = RuleSet(read=lmms_eval, denominator="all")
