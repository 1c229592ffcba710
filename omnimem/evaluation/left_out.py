"""Questions that one arm cannot answer, which are left out of its accuracies, counted and named.

`out_of_memory`: the arm's memory of this stream does not fit. `not_applicable`: an arm that keeps everything reads a
stream beyond the positions of the model (`positions: compact`), which it cannot compact. Neither is a fault of the
data, so neither counts towards `max_failures`; the evaluation goes on with the next stream.
"""

import gc
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from omnimem.errors import first_line, lacks_memory
from omnimem.policies.base import Policy
from omnimem.streaming.stream import PositionsError

OUT_OF_MEMORY, NOT_APPLICABLE = "out_of_memory", "not_applicable"
LEFT_OUT = (OUT_OF_MEMORY, NOT_APPLICABLE)
ERRORS = (PositionsError, RuntimeError, MemoryError, OSError)  # among which `reason_of` finds them


def is_left_out(line: Mapping[str, Any]) -> bool:
    """Whether a line is of a question that its arm cannot answer."""
    return line.get("failed") in LEFT_OUT


def reason_of(error: BaseException, policy: Policy) -> tuple[str, str] | None:
    """(reason, message) of an error for which an arm's questions are left out; None for any other error."""
    first = first_line(error)
    if lacks_memory(error):
        return OUT_OF_MEMORY, first
    if isinstance(error, PositionsError) and policy.budget is None:
        return NOT_APPLICABLE, f"everything is kept, which cannot be compacted: {first}"
    return None


def release() -> None:
    """Free what a failed pass held; call it when no exception refers to its frames any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def counts(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By reason: questions, streams, and the first message."""
    questions = Counter(str(line["failed"]) for line in lines)
    return {
        reason: {
            "questions": count,
            "streams": len({line["stream"] for line in lines if line["failed"] == reason}),
            "message": next(line["message"] for line in lines if line["failed"] == reason),
        }
        for reason, count in questions.items()
    }
