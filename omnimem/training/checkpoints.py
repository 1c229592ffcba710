"""Checkpoints that are complete or absent: all ranks write a partial folder, which is then sealed and renamed."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, final

from accelerate import Accelerator
from safetensors import SafetensorError

from omnimem.checksums import Origin, put, seal
from omnimem.errors import Stopped, first_line
from omnimem.run import RunFolder, step_of
from omnimem.training.pickles import write_enums_by_value
from omnimem.training.portable import Layout, State, needs_portable, write_portable

# In the messages of torch.save when the disk is full.
CANNOT_WRITE = ("PytorchStreamWriter", "inline_container", "iostream error")


@final
class CheckpointWriter:
    """Writes the checkpoints of a run, each once, and removes old ones."""

    def __init__(
        self, folder: RunFolder, ranks: Accelerator, layout: Layout, keep: int | None, base: str | None
    ) -> None:
        """`base` is the digest of the weights that are tuned; the first rank needs it."""
        self.folder, self.ranks, self.layout, self.keep = folder, ranks, layout, keep
        self.origin = Origin(run=folder.id, base=base)
        self.parent = str(folder.path)  # where the Trainer creates checkpoint-N
        self.saved: int | None = None  # the last step that was saved

    def save(
        self,
        step: int,
        write: Callable[[], None],
        state: Callable[[], State],
        schedule: Any,
        *,
        best: int | None = None,
    ) -> None:
        """Write a checkpoint unless the step has one: the files of the Trainer, then the portable state; collective.

        `best` is the step of the best checkpoint, which is kept.
        """
        if step == self.saved:  # requested at the end of the step and again at the end of the epoch
            return
        origin = replace(self.origin, step=step)
        with written_by_all(self.folder, self.folder.checkpoint(step), self.ranks, origin) as partial:
            self.parent = str(partial.parent)
            write_enums_by_value()
            write()
            write_portable(partial, state(), self.layout, step, schedule)
        self.parent, self.saved = str(self.folder.path), step
        if self.ranks.is_main_process:
            rotate(self.folder, self.keep, best)

    def sources(self, checkpoint: str | Path | None) -> tuple[str | None, Path | None]:
        """The checkpoint to resume from, as (for the Trainer's own files, for the portable state); one is None."""
        if checkpoint is not None and needs_portable(Path(checkpoint), self.layout):
            return None, Path(checkpoint)
        return None if checkpoint is None else str(checkpoint), None


@contextmanager
def written_by_all(folder: RunFolder, place: Path, ranks: Accelerator, origin: Origin) -> Iterator[Path]:
    """A partial folder for all ranks, which the first rank seals and renames to `place` at the end; collective.

    All ranks must share the file system of the run folder. Raises Stopped, with exit code 1, when writing fails; a
    former `place` then stays as it was.
    """
    # 1. an empty partial folder
    partial = folder.partial / place.name
    if ranks.is_main_process:
        shutil.rmtree(folder.partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.wait_for_everyone()
    # 2. all ranks write
    with _explained(folder, place):
        yield partial
    ranks.wait_for_everyone()
    # 3. seal and rename
    if ranks.is_main_process:
        with _explained(folder, place):
            seal(partial, origin, ranks=ranks.num_processes)
            put(partial, place)
        shutil.rmtree(folder.partial, ignore_errors=True)


def rotate(folder: RunFolder, keep: int | None, best: int | None = None) -> None:
    """Remove all checkpoints but the newest `keep` and that of step `best`; None keeps all."""
    for path in folder.checkpoints()[: -keep if keep else 0]:
        if step_of(path) != best:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _explained(folder: RunFolder, place: Path) -> Iterator[None]:
    """Turns write errors into one line that names the last complete checkpoint and the cure."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in CANNOT_WRITE):
            raise
        free = shutil.disk_usage(folder.path).free
        whole = [path for path in folder.checkpoints() if path != place]
        left = f"{whole[-1]} is complete" if whole else "there is no earlier checkpoint"
        raise Stopped(
            f"{place} could not be written ({_reason(error)}; {free / 1e6:,.1f} MB free); {left}; free some space or "
            "repair the disk, then continue with --resume auto",
            code=1,
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, RuntimeError):
        return "only a part of a file was written"
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
