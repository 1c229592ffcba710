"""Files of a pickle format in a checkpoint: they may hold tensors, plain values and a few classes, and run no code.

DeepSpeed reads its files with `weights_only=False`, so that a file from somebody else could run any command. Here they
are examined before anything is read, and read under `weights_only`.
"""

import copyreg
import os
import pickle
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch

from omnimem.limits import read_within
from omnimem.run import RunError

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
UNREAD = ("training_args.bin",)  # written by the Trainer for people; nothing here reads it
FORCE, FORBID = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # of torch
# Classes without code of their own in the files of DeepSpeed
ENGINE = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
# Of numpy 1 and 2, in the random states that the Trainer saves; the Trainer allows them itself
RANDOM = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype")


def refuse_code(checkpoint: Path) -> None:
    """Raises RunError if a file of the checkpoint holds other objects than those named here, or leads out of it."""
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint)
        what = "is a link, which may lead to another folder" if path.is_symlink() else None
        if what is None and path.suffix in SUFFIXES and path.name not in UNREAD and path.is_file():
            what = _foreign(path)
        if what is not None:
            raise RunError(
                f"{checkpoint}: {name} {what}; nothing was read: restore the checkpoint from where the run wrote it, "
                "or give --resume another one"
            )
    _check_latest(checkpoint)


def _foreign(path: Path) -> str | None:
    """What is wrong with a file; its objects are listed, not built."""
    try:
        found = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - {*ENGINE, *RANDOM}
    except (ValueError, RuntimeError, EOFError, OSError, BadZipFile, pickle.UnpicklingError, AssertionError) as error:
        return f"is not a file of tensors ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return f"holds {', '.join(sorted(found))}, which could run code" if found else None


def _check_latest(checkpoint: Path) -> None:
    """DeepSpeed reads the folder that `latest` names; it must be one of the checkpoint."""
    for latest in checkpoint.glob("latest*"):
        try:
            name = read_within(latest).decode("utf-8", "replace").strip()
        except OSError:
            name = ""
        if not re.fullmatch(r"global_step\d+", name) or not (checkpoint / name).is_dir():
            raise RunError(
                f"{latest}: names {name[:60]!r}, not a folder global_stepN of the checkpoint; restore the file, or "
                "give --resume another checkpoint"
            )


def write_enums_by_value() -> None:
    """Pickle DeepSpeed's stage of ZeRO as a call of its class; Python before 3.11.4 calls getattr, which is refused."""
    if (module := sys.modules.get("deepspeed.runtime.zero.config")) is not None:
        stage: Any = module.ZeroStageEnum
        copyreg.pickle(stage, lambda member: (stage, (member.value,)))


@contextmanager
def weights_only() -> Iterator[None]:
    """Inside, torch.load of any library refuses what could run code, even with `weights_only=False`.

    Raises RunError in place of its UnpicklingError.
    """
    before = {name: os.environ.pop(name, None) for name in (FORCE, FORBID)}
    os.environ[FORCE] = "1"
    try:
        with torch.serialization.safe_globals(_classes()):
            yield
    except pickle.UnpicklingError as error:
        line = next((line for line in str(error).splitlines() if "GLOBAL" in line), str(error).partition("\n")[0])
        raise RunError(f"a file of the checkpoint could run code, and was not read: {line.strip()}") from error
    finally:
        os.environ.pop(FORCE)
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _classes() -> list[Any]:
    """The classes in DeepSpeed's files; none where it is not in use."""
    places = [name.rpartition(".") for name in ENGINE if "deepspeed" in sys.modules]
    return [getattr(import_module(module), name) for module, _, name in places]
