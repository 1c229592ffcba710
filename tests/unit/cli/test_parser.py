"""Commands: overrides anywhere, no abbreviations, and exit codes that mean something."""

import errno
import threading
from collections.abc import Sequence

import pytest
import torch
from safetensors import SafetensorError

from omnimem.cli import parser as command
from omnimem.cli.parser import Parser, for_command, run_command
from omnimem.config import ConfigError
from omnimem.errors import Stopped


def parser() -> Parser:
    made = Parser("Says what it was told.")
    made.add_config()
    made.add_argument("--resume")
    made.add_argument("--dry-run", action="store_true")
    return made


def left(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> str:
    """What parsing says before it leaves with exit code 2."""
    with pytest.raises(SystemExit) as leaving:
        parser().parse(arguments)
    assert leaving.value.code == 2
    return capsys.readouterr().err


def run(error: Exception | None) -> None:
    """Run a command that raises `error`."""

    def main(arguments: Sequence[str]) -> None:
        if error is not None:
            raise error

    run_command(main)


def outcome(capsys: pytest.CaptureFixture[str], error: Exception | None) -> tuple[object, list[str]]:
    """(exit code, lines on stderr) of a command that raises `error`."""
    with pytest.raises(SystemExit) as leaving:
        run(error)
    return leaving.value.code, capsys.readouterr().err.splitlines()


def test_overrides_may_stand_anywhere_and_the_launchers_rank_is_accepted() -> None:
    given = parser().parse(["--local_rank=1", "a.b=1", "--config", "x.yaml", "c=2", "--resume", "auto", "d=[3,4]"])
    assert given.overrides == ["a.b=1", "c=2", "d=[3,4]"]
    assert (given.config, given.resume, given.dry_run, given.local_rank) == ("x.yaml", "auto", False, 1)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--config", "x.yaml", "--res", "auto"], "unrecognized arguments: --res"),
        (["--config", "x.yaml", "--train.max_steps=3"], "settings have no dashes: write section.key=value"),
        (["a=1"], "the following arguments are required: --config"),
        (["--config"], "expected one argument"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(arguments, what, capsys) -> None:
    said = left(capsys, arguments)
    assert what in said
    assert said.count("\n") == 1
    assert "--help" in said


def test_every_problem_of_the_user_is_a_line_and_the_exit_code_is_2(capsys) -> None:
    problems = ["a.yaml:1 x: wrong; mend it", "a.yaml:2 y: wrong; mend it"]
    assert outcome(capsys, ConfigError(problems)) == (2, problems)


@pytest.mark.parametrize(
    ("local_rank", "error", "told"),
    [("0", None, True), ("1", None, False), ("0", ConfigError(["x"]), False), ("0", Stopped("y", 143), False)],
)
def test_the_first_rank_of_a_machine_records_its_end(local_rank, error, told, tmp_path, monkeypatch, capsys) -> None:
    unfinished = tmp_path / "unfinished"
    unfinished.touch()
    monkeypatch.setenv("OMNIMEM_UNFINISHED", str(unfinished))
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    outcome(capsys, error)
    assert unfinished.exists() != told


def test_an_error_that_is_not_the_users_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="a bug"):
        run(ValueError("a bug"))


def test_other_ranks_are_silent_and_give_rank_0_time_to_speak(capsys, monkeypatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)  # an earlier test may have joined
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(command.time, "sleep", waited.append)
    assert outcome(capsys, ConfigError(["x"])) == (2, [])
    assert waited == [command.GRACE]


def test_a_rank_whose_peers_have_ended_does_not_bury_their_words(capsys, monkeypatch) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    lost = RuntimeError("[/x/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:44958")
    monkeypatch.setenv("RANK", "1")
    assert outcome(capsys, lost) == (1, ["rank 1: lost another rank; see the messages of the others"])
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RuntimeError, match="closed by peer"):  # the first one has nobody to speak for it
        run(lost)


FULL_DISK = (
    OSError(28, "No space left on device", "out/x"),
    OSError(122, "Disk quota exceeded", "out/x"),
    OSError(27, "File too large", "a", None, "out/x"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
)
NO_MEMORY = (
    MemoryError(),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    ),
    OSError(12, "Cannot allocate memory"),
    RuntimeError("can't start new thread"),
    ImportError("failed to map segment from shared object: Cannot allocate memory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
)


@pytest.mark.parametrize("error", [*FULL_DISK, *NO_MEMORY], ids=str)
def test_a_full_disk_or_memory_is_one_line_and_exit_code_1(error, capsys) -> None:
    code, lines = outcome(capsys, error)
    assert code == 1
    assert len(lines) == 1
    assert ";" in lines[0]
    assert ("memory" in lines[0]) == (error in NO_MEMORY)


def test_ctrl_c_is_one_line_and_exit_code_130(capsys) -> None:
    def main(arguments: Sequence[str]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as leaving:
        run_command(main)
    assert leaving.value.code == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("interrupted; ")


def test_other_errors_keep_their_traceback(capsys) -> None:
    for error in (RuntimeError("x"), OSError(5000, "odd"), SafetensorError("header")):
        with pytest.raises(type(error)):
            run(error)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "a: 3 tokens; raise stream.chunk_tokens, or lower stream.fps",
            "a: 3 tokens; raise --chunk-tokens, or lower --fps",
        ),
        ("lower stream.chunk_tokens or memory.slots_per_layer", "lower --chunk-tokens or --slots"),
        ("set data.allow_absolute_paths: true", "give --allow-absolute-paths"),
        ("has no audio track; use tracks: video", "has no audio track; give --tracks video"),
        ("lower evaluate.decoders", "lower evaluate.decoders"),
        ("set model.dtype=float32", "set model.dtype=float32"),
    ],
)
def test_a_hint_names_an_option_of_a_command_without_config_and_a_setting_of_others(line, expected) -> None:
    parser = Parser("x")
    for name in ("--chunk-tokens", "--fps", "--slots", "--tracks"):
        parser.add_argument(name)
    parser.add_argument("--allow-absolute-paths", action="store_true")
    parser.parse([])
    assert for_command(line) == expected
    configured = Parser("x")
    configured.add_config()
    configured.add_argument("--tracks")
    configured.parse(["--config", "x"])
    assert for_command(line) == line


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "events"), "events: No space left on device; free space"),
        (RuntimeError("shapes differ"), "Traceback"),
    ],
)
def test_an_error_of_another_thread_is_a_line_unless_it_is_a_fault(error, said, capsys, monkeypatch) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    with pytest.raises(SystemExit):
        run_command(lambda _: None)

    def fail() -> None:
        raise error

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    found = capsys.readouterr().err
    assert said in found
    assert ("Traceback" in found) is (said == "Traceback")
