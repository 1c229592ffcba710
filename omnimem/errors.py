"""The base class of errors that the user's input causes, and errors that it does not cause."""

from collections.abc import Sequence

NO_MEMORY = (  # in the messages of torch, the operating system, safetensors and threading
    "can't allocate memory",
    "Cannot allocate memory",
    "out of memory",
    "std::bad_alloc",
    "can't start new thread",
)


class UserError(ValueError):
    """The user's input is wrong: the message is printed without a traceback, and the exit code is 2."""


class ProblemList(UserError):
    """All problems of one input, one line per problem: `file:line key: what; how to repair`."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that memory is exhausted, which is not the fault of the file that was being read."""
    if isinstance(error, UserError):
        return False
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or any(words in str(error) for words in NO_MEMORY)


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
