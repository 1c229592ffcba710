"""What every command shares: arguments, overrides anywhere, and exit codes.

0 done; 2 the user's input was wrong (one line a problem, no traceback); 128 + the signal's number (143: SIGTERM, 130:
SIGINT) stopped on request, with a checkpoint; 1 anything else.
"""

import argparse
import errno
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from omnimem.backbones import LayoutError
from omnimem.backbones.qwen2_5_omni import CheckpointError
from omnimem.budget import BudgetError
from omnimem.calibration import CalibrationError
from omnimem.comparison.load import ComparisonError
from omnimem.config import ConfigError
from omnimem.data import ManifestError, TooManyFailures
from omnimem.evaluation import EvaluationError
from omnimem.extras import missing_extra
from omnimem.footprint import ShapesError
from omnimem.media import MediaError
from omnimem.policies.base import PolicyError
from omnimem.run import RunError
from omnimem.training.shutdown import Stopped
from omnimem.tuning import AdapterError, GradientError

USER_ERRORS = (
    AdapterError,
    BudgetError,
    CalibrationError,
    CheckpointError,
    LayoutError,
    ComparisonError,
    ConfigError,
    EvaluationError,
    GradientError,
    ManifestError,
    MediaError,
    PolicyError,
    RunError,
    ShapesError,
    TooManyFailures,
)
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)
# How gloo and NCCL say that another rank has ended, which the first one tells in words of ours.
GONE = ("closed by peer", "reset by peer", "remote process exited")
# A rank that is not to speak waits before it ends: once one is gone, the launcher stops rank 0, message and all.
GRACE = 30.0  # seconds


class Parser(argparse.ArgumentParser):
    """Options and overrides in any order, no abbreviations; an error is one line."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # inserted by `deepspeed`

    def add_config(self) -> None:
        """The option --config, and `key=value` overrides anywhere."""
        self.add_argument("--config", required=True, metavar="YAML", help="a path, or a name in configs/")
        self.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that replace those of the config")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The arguments; `overrides` may stand between options."""
        return self.parse_intermixed_args(list(arguments))

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """After --help: that is an end as well."""
        if status == 0:
            done()
        super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2 and one line."""
        leave([f"{self.prog}: {message}; see {self.prog} --help"])


def run_command(main: Callable[[Sequence[str]], int | None]) -> NoReturn:
    """Run a command with the process's arguments and leave with its exit code."""
    try:
        code = main(sys.argv[1:]) or 0
    except USER_ERRORS as error:
        leave(str(error).splitlines())
    except Stopped as stopped:
        leave(str(stopped).splitlines(), stopped.code)
    except ModuleNotFoundError as error:
        if cure := missing_extra(error):
            leave([cure])
        raise
    except OSError as error:
        if error.errno in DISK:
            leave([f"{error.filename}: {error.strerror}; make room or mend the disk; runs go on with --resume auto"], 1)
        if error.errno in PLACE:
            leave([f"{error.filename}: {error.strerror}; give a place that can be used"])
        raise
    except RuntimeError as error:
        if rank() and any(words in str(error) for words in GONE):
            leave([f"rank {rank()}: lost another rank, which may have said why"], 1)
        raise
    done()
    sys.exit(code)


def done() -> None:
    """Tell `launch.sh` that the command came to its end: the 0 of the launcher between them may mean something else."""
    if (unfinished := os.environ.get("OMNIMEM_UNFINISHED")) and os.environ.get("LOCAL_RANK", "0") == "0":
        Path(unfinished).unlink(missing_ok=True)


def leave(problems: Sequence[str], code: int = 2) -> NoReturn:
    """Exit with one line a problem, said once: by rank 0, or by whoever met it once the ranks work on their own."""
    alone = torch.distributed.is_available() and torch.distributed.is_initialized()
    if rank() == 0 or alone:
        for problem in problems:
            print(problem, file=sys.stderr)
    else:
        time.sleep(GRACE)
    sys.stderr.flush()
    sys.exit(code)


def rank() -> int:
    """Number of this process among those of the launcher."""
    return int(os.environ.get("RANK", "0"))
