"""What evaluation needs of a benchmark."""

from typing import Protocol, runtime_checkable

from omnimem.data import Question, Sample


@runtime_checkable
class Benchmark(Protocol):
    """Streams, questions, and how an answer is read from what a model wrote."""

    @property
    def name(self) -> str:
        """Of the result files."""
        ...

    def samples(self) -> list[Sample]:
        """All streams with their questions, in a fixed order."""
        ...

    def extract(self, prediction: str) -> str | None:
        """The answer in a prediction; None: there is none, which counts as wrong in `strict`."""
        ...

    def correct(self, question: Question, extracted: str) -> bool:
        """Whether the extracted answer is right."""
        ...
