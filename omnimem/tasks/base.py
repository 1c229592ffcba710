"""What evaluation needs of a benchmark: streams with their questions, and what a rule set makes of an answer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, final, runtime_checkable

from omnimem.data import Question, Sample


@final
@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a rule set makes of one prediction.

    Over the questions of a benchmark: official = Σ correct / Σ counted; strict = Σ correct / all, where a question
    that got no prediction at all is wrong; no-answer rate = mean(answer is None); format rate = mean(bare).
    """

    answer: str | None  # as it was read; None: no answer could be read
    correct: bool  # False where there is no answer
    counted: bool  # in the denominator of the official accuracy
    bare: bool  # the prediction is an answer in the form that was asked for, and nothing else


@final
@dataclass(frozen=True, kw_only=True)
class Defect:
    """Something wrong in the annotations as published, and what was done about it; listed in every result."""

    rule: str  # one word for the kind of defect
    where: str  # id of the question or of the sample
    what: str  # what was found, and how it was handled


@final
@dataclass(frozen=True, kw_only=True)
class Gap:
    """Something that is not in the benchmark's folder."""

    what: str
    how: str  # to get it
    share: float = 1.0  # of the samples that cannot be read without it


@final
@dataclass(frozen=True, kw_only=True)
class Published:
    """How much there is of a benchmark as published."""

    videos: int
    questions: int


@runtime_checkable
class Benchmark(Protocol):
    """A benchmark in a folder of the user's, under one setting of its options.

    Nothing is read before it is asked for, so that options can be composed where the data is not.
    """

    @property
    def label(self) -> str:
        """Name of the result files and in every table; other tracks and other rules have another label."""
        ...

    @property
    def rules(self) -> str:
        """The rule set of prompt, extraction and denominator."""
        ...

    @property
    def annotations(self) -> tuple[Path, ...]:
        """The files that questions and answers come from; their digest says which edition it was."""
        ...

    def gaps(self) -> list[Gap]:
        """What is missing; nothing is decoded. A gap of share 1 leaves nothing to evaluate, a smaller one costs
        its samples, which fail when they are opened.
        """
        ...

    def samples(self) -> list[Sample]:
        """One sample a stream with all questions about it, in a fixed order.

        A question's text is the whole prompt; `at` is its time in the file; `item` holds its id, options and
        categories. Samples cut from one recording share a `cluster`: statistics go by it. Raises ManifestError with
        every problem.
        """
        ...

    def defects(self) -> list[Defect]:
        """Known defects that the annotations really have, by rule."""
        ...

    def judge(self, question: Question, prediction: str) -> Verdict:
        """What the rules make of a prediction; a pure function."""
        ...
