"""Streams a file, or what comes through a pipe, and answers questions about it from a memory of fixed size."""

from omnimem.cli.parser import run_command
from omnimem.commands.ask import main

if __name__ == "__main__":
    run_command(main)
