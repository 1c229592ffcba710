"""Arguments and exit codes of all commands.

0: done. 2: the user's input was wrong (UserError: one line per problem, no traceback). 128 + the signal's number (143:
SIGTERM, 130: SIGINT): stopped on request, with a checkpoint. 1: anything else.
"""

import argparse
import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError

from omnimem.errors import UserError, first_line, lacks_memory
from omnimem.extras import missing_extra
from omnimem.limits import raise_limits
from omnimem.training.shutdown import Stopped

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
PATH = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)
FULL = ("No space left", "Disk quota exceeded", "File too large", "Input/output error")  # in those of safetensors
# Messages of gloo and NCCL for a lost rank; rank 0 reports the cause.
LOST = ("closed by peer", "reset by peer", "remote process exited")
# Other ranks wait before they exit: the launcher stops rank 0 as soon as one rank is gone, before its message.
GRACE = 30.0  # seconds


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
        return given

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Called by --help, which is a normal end."""
        if status == 0:
            done()
        super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and one line."""
        leave([f"{self.prog}: {message}; see {self.prog} --help"])


def run_command(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Run a command with the arguments of this process; exit with its code."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        leave(str(error).splitlines())
    except Stopped as stopped:
        leave(str(stopped).splitlines(), stopped.code)
    except ModuleNotFoundError as error:
        if cure := missing_extra(error):
            leave([cure])
        raise
    except OSError as error:
        if error.errno in DISK:
            place = error.filename2 or error.filename or "the disk"
            cure = "free space or repair the disk, then start the command again (a run: with --resume auto)"
            leave([f"{place}: {error.strerror}; {cure}"], 1)
        if error.errno in PATH:
            leave([f"{error.filename}: {error.strerror}; give another path"])
        _leave_without_memory(error)
        raise
    except SafetensorError as error:
        if any(words in str(error) for words in FULL):
            leave([f"weights could not be written ({error}); free space or repair the disk, then start again"], 1)
        raise
    except (RuntimeError, MemoryError) as error:
        if rank() and any(words in str(error) for words in LOST):
            leave([f"rank {rank()}: lost another rank; see the messages of the others"], 1)
        _leave_without_memory(error)
        raise
    except KeyboardInterrupt:
        leave(["interrupted; start the same command again: what is complete is kept"], 128 + signal.SIGINT)
    done()
    sys.exit(0)


def _leave_without_memory(error: Exception) -> None:
    """Exit with one line if memory is exhausted."""
    if lacks_memory(error):
        what = first_line(error)
        cure = "lower stream.max_pixels, stream.chunk_tokens or batch sizes, or give the process more memory"
        leave([f"not enough memory ({what}); {cure}"], 1)


def warn(lines: Sequence[str]) -> None:
    """Print warnings to stderr, on the first rank."""
    for line in lines if rank() == 0 else ():
        print(f"warning: {line}", file=sys.stderr, flush=True)


def done() -> None:
    """Tell `launch.sh` that the command has finished; the launcher's exit code 0 does not always mean that."""
    if (unfinished := os.environ.get("OMNIMEM_UNFINISHED")) and os.environ.get("LOCAL_RANK", "0") == "0":
        Path(unfinished).unlink(missing_ok=True)


def leave(problems: Sequence[str], code: int = 2) -> NoReturn:
    """Exit with one line per problem, printed by rank 0 only, or by every rank once the process group is up."""
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    if rank() == 0 or grouped:
        for problem in problems:
            print(problem, file=sys.stderr)
    else:
        time.sleep(GRACE)
    sys.stderr.flush()
    sys.exit(code)


def rank() -> int:
    """Rank of this process among those of the launcher."""
    return int(os.environ.get("RANK", "0"))
