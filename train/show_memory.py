"""Shows what each layer still holds of one stream as it goes on, under two policies side by side, on one HTML page."""

from omnimem.cli.parser import run_command
from omnimem.commands.show_memory import main

if __name__ == "__main__":
    run_command(main)
