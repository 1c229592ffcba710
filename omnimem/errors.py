"""The base class of errors that the user's input causes, and errors that it does not cause."""

from collections.abc import Sequence
from typing import final

SHOWN = 20  # problems in one message
NO_MEMORY = (  # in messages of torch, drivers, the operating system, safetensors and threading, in lower case
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "failed to allocate",
    "bad_alloc",
    "can't start new thread",
    "alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_ALLOC_FAILED
    "not enough memory",
    "insufficient memory",
    "memory allocation failed",
    "could not allocate",
    "unable to allocate",  # numpy, as the text of another process
    "outofmemory",  # hipErrorOutOfMemory
    "memoryallocation",  # cudaErrorMemoryAllocation
    "allocation_failed",  # ..._HOST_ALLOCATION_FAILED
)


class UserError(ValueError):
    """The user's input is wrong: the message is printed without a traceback, and the exit code is 2."""

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message, keep="\n\t"))


@final
class Stopped(Exception):
    """The run ends before its last step, on purpose; `code` is the exit code of the process."""

    def __init__(self, what: str, code: int) -> None:
        super().__init__(what)
        self.code = code


class ProblemList(UserError):
    """All problems of one input, one line per problem: `file:line key: what; how to repair`.

    The message shows the first SHOWN of them and how many there are; `problems` holds them all.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(map(printable, problems))
        super().__init__("\n".join(capped(self.problems)))


def printable(text: str, keep: str = "") -> str:
    """The text with escapes for what a terminal obeys or cannot show: a name cannot break a line or hide a part."""
    return "".join(each if each.isprintable() or each in keep else ascii(each)[1:-1] for each in text)


def capped(problems: Sequence[str]) -> list[str]:
    """The first SHOWN problems, the number of the others, and the last one, which may be the verdict on all."""
    if len(problems) <= SHOWN + 1:
        return list(problems)
    return [*problems[:SHOWN], f"... and {len(problems) - SHOWN - 1:,} more", problems[-1]]


def lacks_memory(error: BaseException) -> bool:
    """Whether memory is exhausted, on a GPU or on the host, by this error or one that caused it; no fault of a file."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":
            return True
        if any(words in str(cause).lower() for words in NO_MEMORY):
            return True
        cause = cause.__cause__
    return False


def counted(count: float, noun: str) -> str:
    """A number with its noun, in the singular for 1: `1 row`, `2,000 rows`, `3 entries`, `2.5 frames`."""
    number = f"{count:,}" if isinstance(count, int) else f"{count:,g}"
    if count == 1:
        return f"{number} {noun}"
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{number} {noun}es"
    return f"{number} {noun[:-1]}ies" if noun.endswith(("try", "ory", "ncy")) else f"{number} {noun}s"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, and the next one where it ends with a colon; its class if it has none."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join(line.strip() for line in lines[: 2 if lines[0].rstrip().endswith(":") else 1])
