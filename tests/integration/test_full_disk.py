"""A disk that fills up during an export or an evaluation: a line, exit code 1, no partial files."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.damage import ends
from support.finished_run import write_run
from support.thinkers import write_folder

from omnimem.evaluation.results import Results
from omnimem.evaluation.sharding import Shard
from omnimem.run import write_json

EXPORT = "from omnimem.cli.parser import run_command; from omnimem.commands.export import main; run_command(main)"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("full")
    base = write_folder(place / "base", rates="tiny")
    return write_run(place / "run", base).path


def export(run: Path, out: Path, kind: str, limit: int | None = None) -> subprocess.Popen[str]:
    """An export in a process of its own, whose files may have `limit` bytes."""

    def restrict() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-c", EXPORT, "--run", str(run), "--format", kind, "--out", str(out)]
    return subprocess.Popen(command, preexec_fn=restrict, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


@pytest.mark.parametrize(("kind", "limit"), [("merged", 60_000), ("adapter", 1000)])
def test_an_export_to_a_full_disk_leaves_nothing(kind, limit, run, tmp_path) -> None:
    with export(run, tmp_path / "out", kind, limit) as process:
        errors = process.communicate(timeout=300)[1]
    lines = [line for line in errors.splitlines() if line and not line.startswith(("Loading", "Writing", "["))]
    assert process.returncode == 1, errors
    assert "Traceback" not in errors
    assert any("free space" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_leaves_is_removed_by_the_next_one(run, tmp_path) -> None:
    with export(run, tmp_path / "out", "merged") as process:
        until = time.monotonic() + 200
        while not list(tmp_path.glob(".out.*")) and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert len(list(tmp_path.glob(".out.*"))) == 1
    with export(run, tmp_path / "out", "adapter") as process:
        process.communicate(timeout=300)
    assert process.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_ends_an_evaluation_with_the_name_of_the_file(tmp_path, capsys) -> None:
    results = Results(tmp_path, "recall", [], Shard())
    (tmp_path / "recall.jsonl").symlink_to("/dev/full")
    code, lines = ends(lambda: results.append([{"id": "x"}]), capsys)
    assert code == 1
    (line,) = lines
    assert line.startswith(f"{tmp_path}/recall.jsonl: No space left on device; free space")


@pytest.mark.parametrize("number", [1, 2])
def test_a_write_that_fails_leaves_the_former_file(number, tmp_path, monkeypatch, capsys) -> None:
    path, calls = tmp_path / "x.json", []
    write_json(path, {"a": 1})
    sync = os.fsync

    def failing(file: int) -> None:
        calls.append(file)
        if len(calls) == number:
            raise OSError(28, "No space left on device")
        sync(file)

    def write() -> None:
        for value in (2, 3):
            write_json(path, {"a": value})

    monkeypatch.setattr(os, "fsync", failing)
    code, lines = ends(write, capsys)
    assert code == 1
    assert lines[0].startswith(f"{path}: No space left")
    assert [each.name for each in tmp_path.iterdir()] == ["x.json"]
    assert path.read_text() == f'{{\n "a": {number}\n}}\n'
