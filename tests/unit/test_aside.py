"""Files and folders are complete or absent, and what killed processes leave is removed, never that of a living one."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from omnimem import aside
from omnimem.aside import remove_leftovers, written_aside


def dead() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def left(place: Path, name: str, *, folder: bool) -> Path:
    path = place.with_name(name)
    if folder:
        path.mkdir()
        (path / "x").write_text("x")
    else:
        path.write_text("x")
    return path


@pytest.mark.parametrize("folder", [False, True])
def test_leftovers_of_dead_processes_are_removed_and_no_others(folder, tmp_path) -> None:
    place, gone = tmp_path / "out", dead()
    stray = [left(place, f".out.{gone}{end}", folder=folder) for end in ("", ".0")]
    kept = [
        left(place, name, folder=folder)
        for name in (f".out.{os.getppid()}", f".out.{os.getpid()}.7", f".outer.{gone}", f"out.{gone}", ".out.x", ".out")
    ]
    with written_aside(place, folder=folder) as partial:
        assert not any(path.exists() for path in stray)
        (partial / "a" if folder else partial).write_text("new")
    assert all(path.exists() for path in kept)
    assert (place / "a" if folder else place).read_text() == "new"


def test_leftovers_of_a_process_that_nobody_waited_for_are_removed(tmp_path) -> None:
    """In a container without an init process, a killed process stays as a zombie."""
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    stray = left(tmp_path / "out", f".out.{process.pid}.0", folder=True)
    remove_leftovers(tmp_path / "out")
    assert not stray.exists()
    process.wait()


def test_old_leftovers_are_removed_although_their_number_is_in_use_again(tmp_path, monkeypatch) -> None:
    stray = left(tmp_path / "out", f".out.{os.getppid()}.0", folder=True)
    remove_leftovers(tmp_path / "out")
    assert stray.exists()
    monkeypatch.setattr(aside, "LOCKED_AFTER", -1.0)
    remove_leftovers(tmp_path / "out")
    assert not stray.exists()


def test_a_place_without_a_name_is_an_error_of_the_path() -> None:
    with pytest.raises(IsADirectoryError, match="/"), written_aside(Path("/")):
        pass


@pytest.mark.parametrize("folder", [False, True])
def test_an_error_leaves_what_was_there(folder, tmp_path) -> None:
    place = tmp_path / "out"
    if not folder:
        place.write_text("old")

    def write() -> None:
        with written_aside(place, folder=folder) as partial:
            (partial / "a" if folder else partial).write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ([] if folder else ["out"])
    if not folder:
        assert place.read_text() == "old"


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("number", aside.DISK)
def test_an_error_of_the_disk_names_the_place(tmp_path, number, folder) -> None:
    place = tmp_path / "out"
    with pytest.raises(OSError, match="out") as caught, written_aside(place, folder=folder):
        raise OSError(number, os.strerror(number))  # as write() raises it: without a name
    assert caught.value.filename == str(place)
    with pytest.raises(OSError, match="read") as caught, written_aside(place, folder=folder):
        raise OSError(number, os.strerror(number), "/elsewhere/read")
    assert caught.value.filename == "/elsewhere/read"


WRITER = """
import sys, time
from pathlib import Path
from omnimem.aside import written_aside
with written_aside(Path(sys.argv[1]), folder=True) as partial:
    (partial / "x").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_two_writers_do_not_share_files_and_a_killed_one_is_cleaned_up(tmp_path) -> None:
    place = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(place)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        remove_leftovers(place)
        assert len(list(tmp_path.glob(".out.*"))) == 1  # it is alive
        process.kill()
    until = time.monotonic() + 10
    while list(tmp_path.glob(".out.*")) and time.monotonic() < until:
        remove_leftovers(place)
    assert list(tmp_path.iterdir()) == []
