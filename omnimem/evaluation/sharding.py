"""How several processes divide the work: by counting, or by claiming what nobody has begun."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import final

from omnimem.evaluation.options import EvaluationError


@final
@dataclass(frozen=True, kw_only=True)
class Share:
    """What one of `count` processes does: every count-th item, or with `claims` the next that no other has claimed.

    Items are numbered alike in all processes, so these must be started with the same arms, benchmarks and limits.
    """

    index: int = 0
    count: int = 1
    claims: Path | None = None  # a folder of their own, in which each claimed item is an empty file

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise EvaluationError(
                f"shard {self.index} of {self.count} does not exist; they are numbered 0/{self.count} to "
                f"{self.count - 1}/{self.count}"
            )

    @classmethod
    def parse(cls, text: str) -> "Share":
        """From `0/4`; raises EvaluationError."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if found is None:
            raise EvaluationError(f"--shard {text}: expected I/N such as 0/4, the first of four")
        return cls(index=int(found[1]), count=int(found[2]))

    @property
    def alone(self) -> bool:
        """Whether nobody else does anything."""
        return self.count == 1

    @property
    def name(self) -> str:
        """Of the files that this process alone writes."""
        return f"{self.index}of{self.count}"

    def takes(self, number: int) -> bool:
        """Whether this process does item `number`; asked once an item."""
        if self.claims is None:
            return number % self.count == self.index
        try:
            (self.claims / str(number)).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True
