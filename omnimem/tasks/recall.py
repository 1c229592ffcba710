"""Audio-visual recall: one-word answers about streams that omnimem synthesize renders."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

from omnimem.data import Question, Sample, read_manifest
from omnimem.tasks.annotations import Defect
from omnimem.tasks.base import Gap
from omnimem.tasks.rules import Verdict


@final
@dataclass(frozen=True, kw_only=True)
class RecallOptions:
    """A split of the recall task; any manifest with one-word answers works too."""

    name: Literal["recall"] = "recall"
    root: str = "data/recall"
    split: str = "test"  # the manifest <split>.jsonl in root

    @property
    def label(self) -> str:
        return self.name

    @property
    def rules(self) -> str:
        return "first_word"

    @property
    def published(self) -> None:
        return

    @property
    def manifest(self) -> Path:
        """The list of streams."""
        return Path(self.root) / f"{self.split}.jsonl"

    @property
    def annotations(self) -> tuple[Path, ...]:
        return (self.manifest,)

    def gaps(self) -> list[Gap]:
        """The manifest, if it is missing."""
        if self.manifest.is_file():
            return []
        return [Gap(what=f"{self.manifest}", how=f"make it with `omnimem synthesize --out {self.root}`")]

    def samples(self) -> list[Sample]:
        """All streams of the split; raises ManifestError with every problem."""
        return read_manifest(self.manifest)

    def defects(self) -> list[Defect]:
        """Always empty: problems of a manifest are errors."""
        return []

    def judge(self, question: Question, prediction: str) -> Verdict:
        """Compare the first word with the answer, in lower case."""
        words = re.findall(r"[^\W_]+", prediction.lower())
        answer = words[0] if words else None
        right = None if question.answer is None else question.answer.strip().lower()
        return Verdict(
            answer=answer,
            correct=answer is not None and answer == right,
            counted=answer is not None,
            bare=len(words) == 1,
        )
