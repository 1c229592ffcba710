"""The console command: `omnimem NAME ...` runs the command of that name; `omnimem --help` lists them."""

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

COMMANDS = {
    "demo": "render the recall data, fine-tune a small model, evaluate it and write the report",
    "finetune": "fine-tune a model under its memory budget, then evaluate it",
    "evaluate": "evaluate the arms of a run",
    "calibrate": "measure a model's layers and write the budget",
    "export": "write the tuned adapter or the merged model",
    "compare": "compare arms or runs and write the report",
    "ask": "stream a file or a pipe and answer questions about it",
    "demo-ui": "open a local page: choose a stream, see what is kept, ask at any time",
    "score": "judge predictions of lmms-eval or VLMEvalKit by our rules",
    "show-memory": "write a page that shows what each layer holds",
    "list": "list policies, models, benchmarks or configs",
    "explain": "print fields, types, defaults and meaning of any key of a config",
    "check": "check the files of a manifest or benchmark",
    "convert": "convert other formats into a manifest",
    "synthesize": "render the audio-visual recall task",
    "assemble": "assemble an audio-visual base from pretrained parts",
    "pretrain-tiny": "train a tiny base that is shipped",
}

OTHERS = {  # by the words of other tools
    **dict.fromkeys(("train", "sft", "tune", "fit"), "finetune"),
    **dict.fromkeys(("eval", "test", "benchmark"), "evaluate"),
    **dict.fromkeys(("infer", "inference", "chat", "generate"), "ask"),
    **dict.fromkeys(("merge", "save"), "export"),
    **dict.fromkeys(("ui", "webui", "serve"), "demo-ui"),
    **dict.fromkeys(("validate", "preview"), "check"),
}


def main() -> None:
    """Run the command that the first argument names; exit code 2 if there is no such command."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: omnimem COMMAND ...      (omnimem COMMAND --help, omnimem --version)\n")
        print("\n".join(f"  {command:<15}{what}" for command, what in COMMANDS.items()))
        sys.exit(0)
    if name in ("-V", "--version"):
        try:
            print(f"omnimem {version('omnimem')}")
        except PackageNotFoundError:
            print("omnimem, not installed: a checkout")
        sys.exit(0)
    command = name.replace("_", "-")
    if command not in COMMANDS:
        print(f"omnimem: no command {name!r}; {_meant(command)}known: {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"omnimem {command}", *sys.argv[2:]]
    run(command)


def _meant(command: str) -> str:
    """The command that is spelled like this one, or that other tools call so; "" if there is none."""
    word = command.lower().lstrip("-")
    near = OTHERS.get(word) or next(iter(get_close_matches(word, COMMANDS, n=1)), None)
    return f"did you mean {near!r}? " if near else ""


def run(command: str) -> None:
    """Run a command with the arguments of this process; it is imported here, so that a missing extra is one line."""

    def imported(arguments: Sequence[str]) -> None:
        import_module(f"omnimem.commands.{command.replace('-', '_')}").main(arguments)

    import_module("omnimem.cli.parser").run_command(imported)


if __name__ == "__main__":
    main()
