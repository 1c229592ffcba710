"""launch.sh: exit codes are passed on, and no process outlives it."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.paths import ROOT

from omnimem.commands.demo import DEMOS

RANKS = """#!/usr/bin/env bash
echo "$$" >> pids
sleep 60 & echo "$!" >> pids
echo "$*" > arguments
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with launch.sh, and a `deepspeed` that leaves a process behind, as the real one does when killed."""
    shutil.copy(ROOT / "launch.sh", tmp_path)
    (tmp_path / "bin").mkdir()
    return tmp_path


def start(folder: Path, ending: str, *arguments: str) -> subprocess.Popen[str]:
    stub = folder / "bin" / "deepspeed"
    stub.write_text(f"{RANKS}{ending}\n")
    stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    command = [str(folder / "launch.sh"), *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, stderr=subprocess.PIPE)


def running(folder: Path) -> list[int]:
    """Which of the processes that the stub noted are still there."""
    numbers = [int(line) for line in (folder / "pids").read_text().split()]
    return [number for number in numbers if Path(f"/proc/{number}/cmdline").exists() and not is_zombie(number)]


def is_zombie(number: int) -> bool:
    return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def given(folder: Path) -> tuple[int, str]:
    """The port that `deepspeed` was told, and its other arguments."""
    words = (folder / "arguments").read_text().split()
    place = words.index("--master_port")
    return int(words[place + 1]), " ".join((*words[:place], *words[place + 2 :]))


def until(folder: Path, lines: int) -> None:
    """Wait until the stub has noted so many processes."""
    for _ in range(200):
        if (folder / "arguments").exists() and len((folder / "pids").read_text().split()) == lines:
            return
        time.sleep(0.05)
    raise AssertionError("the command never started")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_every_process_of_the_run(folder, number) -> None:
    launched = start(folder, "wait", "finetune", "x.yaml", "a.b=[1, 2]", "name=y")
    until(folder, 2)
    launched.send_signal(number)
    launched.communicate(timeout=20)
    assert launched.returncode == 128 + number
    assert running(folder) == []
    assert given(folder)[1] == "train/finetune.py --config x.yaml a.b=[1, 2] name=y"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            ("--hostfile", "nodes", "--resume", "auto"),
            "--hostfile nodes train/finetune.py --config x.yaml --resume auto",
        ),
        (("a.b=1", "--num_gpus=2", "--dry-run"), "--num_gpus=2 train/finetune.py --config x.yaml a.b=1 --dry-run"),
        (("--force_multi", "a.b=1"), "--force_multi train/finetune.py --config x.yaml a.b=1"),
    ],
)
def test_the_launchers_own_options_stand_before_the_script(folder, before, after) -> None:
    start(folder, "", "finetune", "x.yaml", *before).communicate(timeout=20)
    assert given(folder)[1] == after


def test_a_node_started_by_itself_must_know_the_port_of_all(folder) -> None:
    node = ("finetune", "x.yaml", "--hostfile", "nodes", "--no_ssh", "--node_rank", "1", "--master_addr", "10.0.0.1")
    launched = start(folder, "", *node)
    _, said = launched.communicate(timeout=20)
    assert launched.returncode == 2
    assert said == (
        "launch.sh: --no_ssh starts the ranks of one node; give every node the same --master_addr and --master_port\n"
    )
    start(folder, "", *node, "--master_port", "4711").communicate(timeout=20)
    assert given(folder)[0] == 4711


FINISHES = """#!/usr/bin/env bash
finish() { sleep 1; echo finished > finished; exit 143; }
trap finish TERM
echo "$$" >> pids
echo rank > arguments
while :; do sleep 0.1; done
"""
ENDED = 'trap "touch ended; exit 1" TERM\nLOCAL_RANK=0 ./rank & wait $!'


def start_rank(folder: Path, body: str = FINISHES) -> subprocess.Popen[str]:
    """launch.sh with a rank below its `deepspeed`."""
    (folder / "rank").write_text(body)
    (folder / "rank").chmod(0o755)
    launched = start(folder, ENDED, "finetune", "x.yaml")
    until(folder, 3)
    time.sleep(0.3)  # both have set their traps
    return launched


def test_a_signal_lets_ranks_finish_and_leaves_the_launcher_of_deepspeed_alone(folder) -> None:
    launched = start_rank(folder)
    launched.send_signal(signal.SIGTERM)
    launched.communicate(timeout=20)
    assert launched.returncode == 128 + signal.SIGTERM
    assert (folder / "finished").exists()
    assert not (folder / "ended").exists()
    assert running(folder) == []


@pytest.mark.slow
def test_a_second_signal_does_not_wait_for_ranks(folder) -> None:
    launched = start_rank(folder, FINISHES.replace("sleep 1", "sleep 50 & wait"))
    launched.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert launched.poll() is None
    launched.send_signal(signal.SIGINT)
    launched.communicate(timeout=30)
    assert launched.returncode == 128 + signal.SIGTERM
    assert not (folder / "finished").exists()
    assert running(folder) == []


def test_the_exit_code_is_passed_on_and_ranks_left_behind_are_ended(folder) -> None:
    launched = start(folder, "exit 2", "finetune", "x.yaml")
    launched.communicate(timeout=20)
    assert launched.returncode == 2
    assert running(folder) == []


@pytest.mark.parametrize(
    ("ending", "options", "code"),
    [
        ("", (), 1),
        ('rm "$OMNIMEM_UNFINISHED"', (), 0),
        ("", ("--hostfile", "nodes"), 0),
        ("", ("--hostfile", "nodes", "--no_ssh", "--master_port", "4711"), 1),
    ],
)
def test_a_deepspeed_that_says_0_before_the_first_rank_of_the_machine_came_to_its_end_is_not_believed(
    folder, ending, options, code, monkeypatch
) -> None:
    """The real one does so when its launch.py is killed; of other machines nothing is known."""
    monkeypatch.setenv("TMPDIR", str(temporary := folder / "temporary"))
    temporary.mkdir()
    launched = start(folder, ending, "finetune", "x.yaml", *options)
    _, said = launched.communicate(timeout=20)
    assert launched.returncode == code
    words = "launch.sh: deepspeed was stopped before training had finished; continue with --resume auto\n"
    assert said == (words if code else "")
    assert list(temporary.iterdir()) == []


def test_a_base_that_no_demo_has_is_one_line(folder) -> None:
    launched = start(folder, "", "demo", "--base", "large")
    _, said = launched.communicate(timeout=20)
    assert (launched.returncode, said.count("\n")) == (2, 1)
    assert "large" in said
    assert all(base in said for base in DEMOS)


@pytest.mark.parametrize("arguments", [(), ("fly",), ("test", "--fast"), ("finetune",), ("demo", "now")])
def test_anything_else_shows_the_usage_and_exits_with_2(folder, arguments) -> None:
    launched = start(folder, "", *arguments)
    _, said = launched.communicate(timeout=20)
    assert launched.returncode == 2
    assert said.startswith("usage: ./launch.sh demo")
    assert not (folder / "pids").exists()


CHECKS = {
    "test": (".venv", "constraints.txt", ("ruff", "lint-imports", "pyright", "python")),
    "test-lowest": (".venv-lowest", "constraints-lowest.txt", ("python",)),
}
NOTES = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS"
[[ "$(basename "$0") $*" != *"$FAILS"* ]]
"""


def checked(folder: Path, command: str, fails: str) -> tuple[int, str, list[str]]:
    """The exit code and output of `command` where each tool only notes its call, and that of `fails` fails."""
    venv, pins, tools = CHECKS[command]
    (folder / venv / "bin").mkdir(parents=True)
    (folder / "temporary").mkdir()
    for name in ("pyproject.toml", pins):
        shutil.copy(ROOT / name, folder)
    for tool in tools:
        (folder / venv / "bin" / tool).write_text(NOTES)
        (folder / venv / "bin" / tool).chmod(0o755)
    sums = subprocess.run(
        ["cksum"],
        input=b"".join((folder / name).read_bytes() for name in ("pyproject.toml", pins)),
        capture_output=True,
        check=True,
    )
    (folder / venv / "installed").write_bytes(sums.stdout)
    environment = {**os.environ, "CALLS": str(folder / "calls"), "FAILS": fails, "TMPDIR": str(folder / "temporary")}
    done = subprocess.run(
        [str(folder / "launch.sh"), command], cwd=folder, env=environment, text=True, capture_output=True, timeout=60
    )
    return done.returncode, done.stdout + done.stderr, (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize(("command", "calls"), [("test", 5), ("test-lowest", 5)])
def test_checks_that_pass_exit_with_0_and_leave_no_file(folder, command, calls) -> None:
    code, said, called = checked(folder, command, "no such call")
    assert (code, len(called)) == (0, calls), said
    assert "unbound" not in said
    assert "FAILED" not in said
    assert list((folder / "temporary").iterdir()) == []


@pytest.mark.parametrize(
    ("command", "fails"),
    [
        ("test", "ruff check"),
        ("test", "ruff format"),
        ("test", "lint-imports"),
        ("test", "pyright"),
        ("test", "python -m pytest"),
        ("test-lowest", "synthesize.py"),
        ("test-lowest", "--dry-run"),
        ("test-lowest", "name=plain"),
        ("test-lowest", "name=engine"),
        ("test-lowest", "python -m pytest"),
    ],
)
def test_a_check_that_fails_is_named_and_exits_with_1(folder, command, fails) -> None:
    code, said, called = checked(folder, command, fails)
    assert code == 1, said
    assert "FAILED: " in said
    assert any(fails in call for call in called)
    assert any("-m pytest" in call for call in called)  # the others ran
    assert list((folder / "temporary").iterdir()) == []
