"""The base class of errors that the user's input causes."""

from collections.abc import Sequence


class UserError(ValueError):
    """The user's input was wrong; the lines of the message are shown as they are, and the exit code is 2."""


class ProblemList(UserError):
    """All problems of one input, one line per problem: `file:line key: what; how to repair`."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)
