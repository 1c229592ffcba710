"""Measures a model's layers on a few training streams and writes the budget that follows from it, with figures."""

from omnimem.cli.parser import run_command
from omnimem.commands.calibrate import main

if __name__ == "__main__":
    run_command(main)
