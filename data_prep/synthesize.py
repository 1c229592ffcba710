"""Writes the audio-visual recall task: seeded streams as mp4 files, and a manifest a split."""

from omnimem.cli.parser import run_command
from omnimem.commands.synthesize import main

if __name__ == "__main__":
    run_command(main)
