"""Trains the tiny Qwen2.5-Omni thinker on audio-visual recall: `python train/pretrain_tiny.py --seed 0 --out DIR`."""

from omnimem.cli.parser import run_command
from omnimem.commands.pretrain_tiny import main

if __name__ == "__main__":
    run_command(main)
