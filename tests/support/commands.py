"""A command in this process, as the console runs it, and benchmark scripts in processes of their own."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from unittest.mock import patch

import pytest

from omnimem.cli.parser import run_command
from support.paths import ROOT


def exit_code(main: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> int:
    """The exit code; stderr has the lines of a UserError."""
    with pytest.raises(SystemExit) as left, patch.object(sys, "argv", ["omnimem", *map(str, arguments)]):
        run_command(main)
    assert isinstance(left.value.code, int)
    return left.value.code


def run_benchmark(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`python benchmarks/NAME.py ARGUMENTS` in the checkout, on one thread."""
    command = [sys.executable, ROOT / "benchmarks" / f"{name}.py", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
