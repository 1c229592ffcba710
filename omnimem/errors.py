"""The base class of errors that the user's input causes."""

from collections.abc import Sequence


class UserError(ValueError):
    """The user's input is wrong: the message is printed without a traceback, and the exit code is 2."""


class ProblemList(UserError):
    """All problems of one input, one line per problem: `file:line key: what; how to repair`."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)
