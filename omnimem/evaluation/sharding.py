"""Division of an evaluation among several processes: every count-th work item."""

import re
from dataclasses import dataclass
from typing import final

from omnimem.evaluation.options import EvaluationError


@final
@dataclass(frozen=True, kw_only=True)
class Shard:
    """The part of one of `count` processes: the items with number % count == index.

    Start all processes with the same arms, benchmarks and limits, so that they number the items equally.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise EvaluationError(
                f"shard {self.index} of {self.count} does not exist; they are numbered 0/{self.count} to "
                f"{self.count - 1}/{self.count}"
            )

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """From `0/4`; raises EvaluationError."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if found is None:
            raise EvaluationError(f"--shard {text}: expected I/N such as 0/4, the first of four")
        return cls(index=int(found[1]), count=int(found[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def whole(self) -> bool:
        """Whether one process does everything."""
        return self.count == 1

    def takes(self, number: int) -> bool:
        """Whether item `number` belongs to this shard."""
        return number % self.count == self.index
