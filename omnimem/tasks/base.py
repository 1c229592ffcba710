"""What evaluation needs of a benchmark, and the base class of those that publish annotation files and videos.

A new task is one file with a subclass of `AnnotatedBenchmark`, listed in omnimem/tasks/__init__.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, final, runtime_checkable

from omnimem.data import Question, Sample
from omnimem.errors import counted
from omnimem.tasks.annotations import AGAIN, AnnotationReader, Defect
from omnimem.tasks.rules import RuleSet, Verdict


@final
@dataclass(frozen=True, kw_only=True)
class Gap:
    """Something missing in the folder of a benchmark."""

    what: str
    how: str  # to get it
    share: float = 1.0  # of the samples that cannot be read without it


@final
@dataclass(frozen=True, kw_only=True)
class Published:
    """Size of a benchmark as published."""

    videos: int
    questions: int


@runtime_checkable
class Benchmark(Protocol):
    """A benchmark in a folder of the user's, with its options.

    Files are read on demand, so that options can be built on a machine without the data.
    """

    @property
    def label(self) -> str:
        """Name of the result files and in tables; other tracks and other rules have another label."""
        ...

    @property
    def rules(self) -> str:
        """The rule set: prompt, answer extraction and denominator."""
        ...

    @property
    def annotations(self) -> tuple[Path, ...]:
        """The files of questions and answers; their digest identifies the edition."""
        ...

    def gaps(self) -> list[Gap]:
        """Missing files; nothing is decoded. With a gap of share 1 nothing can be evaluated; a smaller one costs its
        samples, which fail when they are opened.
        """
        ...

    def samples(self) -> list[Sample]:
        """One sample per stream with all its questions, in a fixed order.

        The text of a question is the whole prompt; `at` is its time in the file; `item` has its id, options and
        categories. Samples of one recording share a `cluster`, the unit of the statistics. Raises ManifestError with
        every problem.
        """
        ...

    def defects(self) -> list[Defect]:
        """Known defects found in the annotations, by rule."""
        ...

    def judge(self, question: Question, prediction: str) -> Verdict:
        """The verdict of the rules on a prediction; a pure function."""
        ...


class AnnotatedBenchmark(ABC):
    """A benchmark of annotation files and videos: a task adds its options, files, prompts and rule sets.

    Subclasses are frozen dataclasses with the fields `name`, `root` and `rules`, and implement `annotations`, `sources`
    and `read`.
    """

    rule_sets: ClassVar[Mapping[str, RuleSet]]  # by the values of `rules`; the first one is not part of the label
    cure: ClassVar[str] = AGAIN  # of a wrong value in the annotations
    name: Any  # str: a Literal of its own in each task
    root: str
    rules: Any  # str: one of the keys of `rule_sets`

    @property
    def published(self) -> Published | None:
        """Size as published; None if unknown."""
        return None

    @property
    @abstractmethod
    def annotations(self) -> tuple[Path, ...]:
        """The files of questions and answers."""

    @property
    @abstractmethod
    def sources(self) -> tuple[str, str]:
        """How to get missing annotations, and missing videos."""

    @abstractmethod
    def read(self, reader: AnnotationReader) -> list[Sample]:
        """One sample per stream, in the order of the annotations; problems and defects go to the reader."""

    @property
    def label_parts(self) -> list[str]:
        """Words of the label before the rules."""
        return [self.name]

    @property
    @final
    def label(self) -> str:
        """Name of the result files."""
        return "_".join([*self.label_parts, *([] if self.rules == next(iter(self.rule_sets)) else [self.rules])])

    def gaps(self) -> list[Gap]:
        """Missing annotations, else missing videos."""
        # 1. annotations
        annotations, videos = self.sources
        absent = [path for path in self.annotations if not path.is_file()]
        if absent:
            return [Gap(what=f"{path}", how=annotations) for path in absent]
        # 2. videos
        samples = self.samples()
        lost = [sample for sample in samples if sample.video is not None and not sample.video.is_file()]
        files = list(dict.fromkeys(sample.video for sample in lost))
        if not files:
            return []
        known = len({sample.video for sample in samples})
        what = f"{len(files):,} of {counted(known, 'video')} (first: {files[0]})"
        return [Gap(what=what, how=videos, share=len(lost) / len(samples))]

    @final
    def samples(self) -> list[Sample]:
        """One sample per stream; raises ManifestError with every problem."""
        return self._read()[0]

    @final
    def defects(self) -> list[Defect]:
        """Defects of the annotations, by rule."""
        return self._read()[1]

    @final
    def judge(self, question: Question, prediction: str) -> Verdict:
        """The verdict of the chosen rule set."""
        return self.rule_sets[self.rules].judge(question, prediction)

    def _read(self) -> tuple[list[Sample], list[Defect]]:
        reader = AnnotationReader(cure=self.cure)
        samples = [replace(sample, published=self.published is not None) for sample in self.read(reader)]
        reader.done(samples)
        return samples, reader.defects
