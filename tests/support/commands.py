"""A command in this process, as the console runs it."""

import sys
from collections.abc import Callable, Sequence
from unittest.mock import patch

import pytest

from omnimem.cli.parser import run_command


def exit_code(main: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> int:
    """The exit code; stderr has the lines of a UserError."""
    with pytest.raises(SystemExit) as left, patch.object(sys, "argv", ["omnimem", *map(str, arguments)]):
        run_command(main)
    assert isinstance(left.value.code, int)
    return left.value.code
