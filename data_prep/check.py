"""Looks at every file of a manifest or benchmark before a run does: tracks, lengths, times; prints a data report."""

from omnimem.cli.parser import run_command
from omnimem.commands.check import main

if __name__ == "__main__":
    run_command(main)
