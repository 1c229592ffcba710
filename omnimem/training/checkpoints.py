"""Checkpoints that are whole or absent, on any number of ranks: written aside, sealed, and put in place at once."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError

from omnimem.checksums import put, seal
from omnimem.run import RunFolder
from omnimem.training.shutdown import Stopped

CANNOT_WRITE = ("PytorchStreamWriter", "inline_container", "iostream error")  # how torch.save says that a disk is full


@contextmanager
def written_by_all(folder: RunFolder, place: Path, ranks: Accelerator) -> Iterator[Path]:
    """A folder that every rank writes into; once all have, the first seals it and gives it the name `place`.

    The folder of the run must lie on a file system that all ranks share. Raises Stopped, with exit code 1, when
    something cannot be written; what `place` was before then stays.
    """
    partial = folder.partial / place.name
    if ranks.is_main_process:
        shutil.rmtree(folder.partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.wait_for_everyone()
    with _explained(folder, place):
        yield partial
    ranks.wait_for_everyone()
    if ranks.is_main_process:
        with _explained(folder, place):
            seal(partial, ranks=ranks.num_processes)
            put(partial, place)
        shutil.rmtree(folder.partial, ignore_errors=True)


def rotate(folder: RunFolder, keep: int | None) -> None:
    """Remove the oldest checkpoints but `keep`; the newest was just written."""
    for path in folder.checkpoints()[: -keep if keep else 0]:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _explained(folder: RunFolder, place: Path) -> Iterator[None]:
    """Turns the errors of writing into a line that says what is left and how to go on."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in CANNOT_WRITE):
            raise
        free = shutil.disk_usage(folder.path).free
        whole = [path for path in folder.checkpoints() if path != place]
        left = f"{whole[-1]} is whole" if whole else "there is no earlier one"
        raise Stopped(
            f"{place} could not be written ({_reason(error)}; {free / 1e6:,.1f} MB free); {left}; make room or mend "
            "the disk, then go on with --resume auto",
            code=1,
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, RuntimeError):
        return "the disk took only a part of a file"
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
