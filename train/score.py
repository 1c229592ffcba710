"""Judges predictions that lmms-eval or VLMEvalKit wrote by our rules, and makes an eval folder of them to compare."""

from omnimem.cli.parser import run_command
from omnimem.commands.score import main

if __name__ == "__main__":
    run_command(main)
