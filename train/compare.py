"""Compares arms of one or more runs, question by question, and writes the report."""

from omnimem.cli.parser import run_command
from omnimem.commands.compare import main

if __name__ == "__main__":
    run_command(main)
