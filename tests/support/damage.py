"""Ways in which a file can be damaged, and how a command must end then."""

import ctypes
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from omnimem.cli.parser import run_command


def _replace_by_folder(path: Path) -> None:
    path.unlink()
    (path / "x").mkdir(parents=True)


def _flip(path: Path) -> None:
    """Bytes at random places, among them the first."""
    data, draw = bytearray(path.read_bytes()), random.Random(path.name)
    for place in (0, *(draw.randrange(len(data)) for _ in range(5))):
        data[place] ^= 0x80
    path.write_bytes(data)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(max(1, path.stat().st_size))),
    "cut": _cut,
    "flipped": _flip,
    "list": lambda path: path.write_text('["a", "b"]'),
    "number": lambda path: path.write_text("3\n"),
    "null": lambda path: path.write_text("null\n"),
    "object": lambda path: path.write_text('{"a": 1}\n'),
    "deep": lambda path: path.write_text('{"a": ' * 5000 + "1" + "}" * 5000),
    "digits": lambda path: path.write_text('{"step": ' + "9" * 5000 + "}"),
    "folder": _replace_by_folder,
    "no permission": lambda path: path.chmod(0),
}


CAPABILITIES_VERSION, READS_EVERYTHING = 0x20080522, 0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


@contextmanager
def permissions_hold() -> Iterator[None]:
    """Root may read no more than a user could: this thread lacks two capabilities of root until the end."""
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(CAPABILITIES_VERSION, 0)
    held = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    assert libc.capget(header, held) == 0
    lowered = (ctypes.c_uint32 * 6)(held[0] & ~READS_EVERYTHING, *held[1:])
    assert libc.capset(header, lowered) == 0
    try:
        yield
    finally:
        assert libc.capset(header, held) == 0


def damaged(path: Path, how: str) -> None:
    """Damage a file; "no permission" needs `permissions_hold` where root runs the tests."""
    DAMAGE[how](path)
    if how == "no permission":
        with pytest.raises(PermissionError):
            path.read_bytes()


def ends(command: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """Exit code and error lines of a command; any other exception than SystemExit fails the test."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        run_command(lambda _: command() and None)
    code = leaving.value.code
    assert isinstance(code, int)
    lines = capsys.readouterr().err.splitlines()
    return code, [line for line in lines if line and not line.startswith("Loading weights")]
