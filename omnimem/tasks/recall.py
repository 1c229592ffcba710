"""Audio-visual recall: one-word answers about streams that data_prep/synthesize.py renders."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

from omnimem.data import Question, Sample, read_manifest
from omnimem.tasks.base import Defect, Gap, Verdict


@final
@dataclass(frozen=True, kw_only=True)
class RecallOptions:
    """A split of the recall task on disk; any manifest with short answers is read the same way."""

    name: Literal["recall"] = "recall"
    root: str = "data/recall"
    split: str = "test"

    @property
    def label(self) -> str:
        """Of the result files."""
        return self.name

    @property
    def rules(self) -> str:
        """The first word counts; a prediction without a word is no answer."""
        return "first_word"

    @property
    def published(self) -> None:
        """As many streams as were rendered."""
        return

    @property
    def manifest(self) -> Path:
        """The file that lists the streams."""
        return Path(self.root) / f"{self.split}.jsonl"

    @property
    def annotations(self) -> tuple[Path, ...]:
        """The manifest."""
        return (self.manifest,)

    def gaps(self) -> list[Gap]:
        """The manifest, where it is not there."""
        if self.manifest.is_file():
            return []
        return [Gap(what=f"{self.manifest}", how=f"make it with `python data_prep/synthesize.py --out {self.root}`")]

    def samples(self) -> list[Sample]:
        """All streams of the split, in the order of the manifest.

        Raises ManifestError with every problem.
        """
        return read_manifest(self.manifest)

    def defects(self) -> list[Defect]:
        """None: what is wrong with a manifest is an error."""
        return []

    def judge(self, question: Question, prediction: str) -> Verdict:
        """The first word in lower case, compared with the answer."""
        words = re.findall(r"[^\W_]+", prediction.lower())
        answer = words[0] if words else None
        right = None if question.answer is None else question.answer.strip().lower()
        return Verdict(
            answer=answer,
            correct=answer is not None and answer == right,
            counted=answer is not None,
            bare=len(words) == 1,
        )
