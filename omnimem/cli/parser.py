"""Arguments and exit codes of all commands.

0: done. 2: the user's input was wrong (UserError: one line per problem, no traceback). 128 + the signal's number (143:
SIGTERM, 130: SIGINT): stopped on request, with a checkpoint. 1: anything else.
"""

import argparse
import errno
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError

from omnimem.aside import DISK
from omnimem.errors import Stopped, UserError, first_line, lacks_memory
from omnimem.extras import missing_extra
from omnimem.limits import raise_limits

SECTIONS = "data|stream|memory|model|evaluate"  # of a config, whose settings some commands have as options
PATH = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EEXIST, errno.ENOTEMPTY),  # another process has written there meanwhile
}
FULL = ("No space left", "Disk quota exceeded", "File too large", "Input/output error")  # in those of safetensors
# Messages of gloo and NCCL for a lost rank; rank 0 reports the cause.
LOST = ("closed by peer", "reset by peer", "remote process exited")
# Other ranks wait before they exit: the launcher stops rank 0 as soon as one rank is gone, before its message.
GRACE = 30.0  # seconds


_options: dict[str, argparse.Action] = {}  # of a command without a config, as parsed last


class Parser(argparse.ArgumentParser):
    """Options and overrides in any order, no abbreviations; an error is one line, exit code 2."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.add_argument(
            "--limit", action="append", default=[], metavar="NAME=N", help="raise a limit of docs/limits.md; repeatable"
        )
        self.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # inserted by `deepspeed`

    def add_config(self) -> None:
        """Add the option --config and `key=value` overrides."""
        self.add_argument("--config", required=True, metavar="YAML", help="a path, or a name in configs/")
        self.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that replace those of the config")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse; `overrides` may be between options."""
        given = self.parse_intermixed_args(list(arguments))
        raise_limits(given.limit)
        if "transformers" in sys.modules and not sys.stderr.isatty():
            sys.modules["transformers"].utils.logging.disable_progress_bar()  # they would fill log files
        _options.clear()
        if "overrides" not in given:
            _options.update({name: action for action in self._actions for name in action.option_strings})
        return given

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Called by --help, which is a normal end."""
        if status == 0:
            done()
        super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and one line."""
        if message.startswith("unrecognized arguments: --") and any(each.dest == "overrides" for each in self._actions):
            message += "; settings have no dashes: write section.key=value, such as train.max_steps=3"
        leave([f"{self.prog}: {message}; see {self.prog} --help"])


def run_command(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Run a command with the arguments of this process; exit with its code."""
    threading.excepthook = _in_thread
    try:
        main(sys.argv[1:])
    except (Exception, KeyboardInterrupt) as error:
        ending = _explained(error)
        if ending is None:
            raise
        leave(*ending)
    done()
    sys.exit(0)


def _in_thread(given: threading.ExceptHookArgs) -> None:
    """Print the lines of an error in another thread, such as TensorBoard's on a full disk, instead of a traceback."""
    error = given.exc_value
    ending = _explained(error) if isinstance(error, Exception) and not isinstance(error, BrokenPipeError) else None
    if ending is None:
        threading.__excepthook__(given)
    for line in ending[0] if ending else ():
        print(line, file=sys.stderr, flush=True)


def _explained(error: Exception | KeyboardInterrupt) -> tuple[list[str], int] | None:
    """The lines and the exit code that an error ends with; None: a fault of the program, which needs its traceback."""
    # 1. the user's input, or a request
    match error:
        case UserError():
            return str(error).splitlines(), 2
        case Stopped():
            return str(error).splitlines(), error.code
        case KeyboardInterrupt():
            return ["interrupted; start the same command again: what is complete is kept"], 128 + signal.SIGINT
        case BrokenPipeError():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to print has no reader
            return [], 128 + signal.SIGPIPE
        case ModuleNotFoundError() if cure := missing_extra(error):
            return [cure], 2
        case OSError() if error.errno in PATH:
            return [f"{error.filename2 or error.filename}: {error.strerror}; give another path"], 2
    # 2. the machine
    again = "free space or repair the disk, then start the command again (a run: with --resume auto)"
    if isinstance(error, OSError) and error.errno in DISK:
        return [f"{error.filename2 or error.filename or 'the disk'}: {error.strerror}; {again}"], 1
    if isinstance(error, SafetensorError) and any(words in str(error) for words in FULL):
        return [f"weights could not be written ({first_line(error)}); {again}"], 1
    if isinstance(error, RuntimeError) and rank() and any(words in str(error) for words in LOST):
        return [f"rank {rank()}: lost another rank; see the messages of the others"], 1
    if lacks_memory(error):
        cure = "lower stream.max_pixels, stream.chunk_tokens or batch sizes, or give the process more memory"
        return [f"not enough memory ({first_line(error)}); {cure}"], 1
    return None


def warn(lines: Sequence[str]) -> None:
    """Print warnings to stderr, on the first rank."""
    for line in lines if rank() == 0 else ():
        print(f"warning: {line}", file=sys.stderr, flush=True)


def for_command(line: str) -> str:
    """A message with settings of a config replaced by the options of a command that reads none.

    `set data.allow_absolute_paths: true` -> `give --allow-absolute-paths`; `stream.chunk_tokens` -> `--chunk-tokens`.
    """

    def option(name: str) -> str | None:
        found = "--slots" if name == "slots_per_layer" else f"--{name.replace('_', '-')}"
        return found if found in _options else None

    def given(match: re.Match[str]) -> str:
        name = option(match["name"])
        value = "" if name and _options[name].nargs == 0 else f" {match['value']}"
        return f"give {name}{value}" if name else match[0]

    line = re.sub(r"\b(?:set|use) (?:\w+\.)?(?P<name>\w+)(?:: |=)(?P<value>\w+)", given, line)
    return re.sub(rf"\b(?:{SECTIONS})\.(\w+)", lambda match: option(match[1]) or match[0], line)


def done() -> None:
    """Tell `launch.sh` that the command has finished; the launcher's exit code 0 does not always mean that."""
    if (unfinished := os.environ.get("OMNIMEM_UNFINISHED")) and os.environ.get("LOCAL_RANK", "0") == "0":
        Path(unfinished).unlink(missing_ok=True)


def leave(problems: Sequence[str], code: int = 2) -> NoReturn:
    """Exit with one line per problem, printed by rank 0 only, or by every rank once the process group is up."""
    if rank() == 0 or _grouped():
        for problem in problems:
            print(for_command(problem), file=sys.stderr)
    else:
        time.sleep(GRACE)
    sys.stderr.flush()
    sys.exit(code)


def _grouped() -> bool:
    """Whether the process group is up; a command that did not import torch has none."""
    distributed: Any = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """Rank of this process among those of the launcher."""
    return int(os.environ.get("RANK", "0"))
