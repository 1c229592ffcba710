"""Audio-visual recall: one-word answers about streams that data_prep/synthesize.py renders."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

from omnimem.data import Question, Sample, read_manifest


@final
@dataclass(frozen=True, kw_only=True)
class RecallOptions:
    """A split of the recall task on disk; any manifest with short answers is read the same way."""

    name: Literal["recall"] = "recall"
    root: str = "data/recall"
    split: str = "test"

    @property
    def manifest(self) -> Path:
        """The file that lists the streams."""
        return Path(self.root) / f"{self.split}.jsonl"

    def samples(self) -> list[Sample]:
        """All streams of the split, in the order of the manifest.

        Raises ManifestError with every problem.
        """
        return read_manifest(self.manifest)

    def extract(self, prediction: str) -> str | None:
        """The first word, in lower case; None where there is no word."""
        words = re.findall(r"[^\W_]+", prediction.lower())
        return words[0] if words else None

    def correct(self, question: Question, extracted: str) -> bool:
        """Whether the word is the answer."""
        return question.answer is not None and extracted == question.answer.strip().lower()
