"""Turns users' files into a manifest: ms-swift messages, LLaMA-Factory (sharegpt) and video-SALMONN conversations."""

from omnimem.cli.parser import run_command
from omnimem.commands.convert import main

if __name__ == "__main__":
    run_command(main)
