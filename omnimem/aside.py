"""Files and folders that are complete or absent: written beside their place, then renamed to it."""

import errno
import fcntl
import glob
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # of a disk that is full or broken
LOCKED_AFTER = 60.0  # seconds in which a new partial file is locked, with room to spare
_NUMBER = count()  # of this process


@contextmanager
def written_aside(place: Path, *, folder: bool = False) -> Iterator[Path]:
    """A new partial file or folder `.NAME.PID.N` beside `place`: renamed to it at the end, removed after an error.

    What processes that were killed have left there is removed first. The partial one is locked while it is written.
    An error of the disk names `place`.
    """
    # 1. a name of its own, locked
    place = place.resolve()
    if not place.name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(place))
    remove_leftovers(place)
    partial = place.with_name(f".{place.name}.{os.getpid()}.{next(_NUMBER)}")
    if folder:
        partial.mkdir(parents=True)
    else:
        partial.touch()
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # 2. write, rename
        yield partial
        partial.replace(place)
    except OSError as error:
        if error.errno not in DISK or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(place)) from error
    finally:
        os.close(lock)
        _remove(partial)


def remove_leftovers(place: Path) -> None:
    """Remove the partial files and folders of `place` whose process was killed, on this or another machine.

    A name of `*.SUFFIX` stands for all files with this suffix.
    """
    suffix = place.name.startswith("*.")
    pattern = rf"[^.]+{re.escape(place.name[1:])}" if suffix else re.escape(place.name)
    mine = re.compile(rf"\.{pattern}\.(\d+)(?:\.\d+)?")
    for path in place.parent.glob(f".{place.name if suffix else glob.escape(place.name)}.*"):
        found = mine.fullmatch(path.name)
        if found and _unlocked(path) and (not _alive(int(found[1])) or _older(path)):
            _remove(path)


def _alive(process: int) -> bool:
    """Whether a process runs; one that has ended, but was not waited for (a zombie), does not."""
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except (ProcessLookupError, OverflowError):
        return False
    except (OSError, IndexError):  # of another user, or no /proc
        return True


def _older(path: Path) -> bool:
    """Whether a partial file is older than the moment between creation and lock: its number is another process's."""
    with suppress(OSError):
        return time.time() - path.stat().st_ctime > LOCKED_AFTER
    return False


def _unlocked(path: Path) -> bool:
    """Whether no process, here or on another machine that shares the disk, is writing it."""
    try:
        number = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(number)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
