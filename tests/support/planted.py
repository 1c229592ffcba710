"""Files that run a command when they are unpickled, in each form that torch or pickle reads."""

import os
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path

import torch


class Command:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def zipped(path: Path, mark: Path) -> None:
    torch.save({"module": Command(mark)}, path)


def old_format(path: Path, mark: Path) -> None:
    torch.save({"module": Command(mark)}, path, _use_new_zipfile_serialization=False)


def plain(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps(Command(mark)))


def instance(path: Path, mark: Path) -> None:
    """By the opcode INST, which names no global apart."""
    content = b"(S'touch " + str(mark).encode() + b"'\nios\nsystem\n."
    assert any(code.name == "INST" for code, _, _ in pickletools.genops(content))
    path.write_bytes(content)


FORMS: tuple[Callable[[Path, Path], None], ...] = (zipped, old_format, plain, instance)
