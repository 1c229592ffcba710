"""Fine-tunes a model under its memory budget, then evaluates it beside the untouched one."""

from omnimem.cli.parser import run_command
from omnimem.commands.finetune import main

if __name__ == "__main__":
    run_command(main)
