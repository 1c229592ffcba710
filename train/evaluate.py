"""Evaluates a run's arms: the untouched checkpoint with full memory and under its budget, the tuned one, and probes."""

from omnimem.cli.parser import run_command
from omnimem.commands.evaluate import main

if __name__ == "__main__":
    run_command(main)
