"""Exports a tuned model, as an adapter or merged into its base, with all that streaming needs beside the weights."""

from omnimem.cli.parser import run_command
from omnimem.commands.export import main

if __name__ == "__main__":
    run_command(main)
