"""The run folder: never lost, never mixed up, and it says what the run was."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from omnimem import run
from omnimem.checksums import seal


def checkpoint(folder: Path, step: int, *, whole: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "global_step").mkdir(parents=True)
    (path / "trainer_state.json").write_text("{}")
    (path / "global_step" / "weights.pt").write_bytes(bytes(range(100)))
    if whole:
        seal(path, step=step)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def used(runs: Path, name: str = "x") -> Path:
    """A run folder with a run in it."""
    run.plan(name, runs=runs).open("name: x\n", {"seed": 1})
    return runs / name


def trained(runs: Path) -> Path:
    """A run folder with a run that made a step."""
    folder = used(runs)
    run.append_line(folder / "metrics.jsonl", {"step": 1})
    return folder


def begin(folder: run.RunFolder) -> None:
    """What another process does."""
    run.write_json(folder.record, {"seed": 2})


@pytest.mark.parametrize(
    ("existed", "options"),
    [(False, {}), *((existed, one) for existed in (False, True) for one in ({"overwrite": True}, {"resume": "auto"}))],
)
def test_a_start_never_takes_what_another_one_began_after_it_was_planned(existed, options, tmp_path) -> None:
    if existed:
        begin(run.RunFolder(path=tmp_path / "x"))
    start = run.plan("x", runs=tmp_path, **options)
    begin(start.folder)
    with pytest.raises(run.RunError, match="exists already: another process has used it"):
        start.open("name: x\n", {"seed": 1})
    assert run.read_json(start.folder.record) == {"seed": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_an_existing_run_is_refused_with_all_three_cures_and_left_as_it_was(tmp_path) -> None:
    folder = trained(tmp_path)
    with pytest.raises(run.RunError, match=r"--resume auto.*name=.*--overwrite") as error:
        run.plan("x", runs=tmp_path)
    assert "\n" not in str(error.value)
    assert names(folder) == [".lock", "config.yaml", "metrics.jsonl", "run.json"]


@pytest.mark.parametrize("resume", [None, "auto"])
@pytest.mark.parametrize("left", [(), ("budget.json",), ("tb/events",), ("metrics.jsonl",)])
def test_a_run_that_made_no_step_does_not_keep_its_name(resume, left, tmp_path) -> None:
    folder = used(tmp_path)
    for name in left:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    start = run.plan("x", resume=resume, runs=tmp_path)
    assert (start.untrained, start.replaces, start.news) == (True, False, run._again(start.folder))
    start.open("name: x\na: 1\n", {"seed": 2})
    record = run.read_json(folder / "run.json")
    assert (record["seed"], [part["seed"] for part in record["earlier"]]) == (2, [1])
    assert all((folder / name).exists() for name in left)


@pytest.mark.parametrize(
    "left",
    ["metrics.jsonl", "checkpoint-1/x", "checkpoint-1.1/x", ".partial/x", "adapter/x", "eval/x", "compare/x", "other"],
)
@pytest.mark.parametrize("when", ["before", "after the plan"])
def test_a_run_with_a_trace_of_a_step_keeps_its_name(left, when, tmp_path) -> None:
    folder = used(tmp_path)
    start = run.plan("x", runs=tmp_path)
    (folder / left).parent.mkdir(exist_ok=True)
    (folder / left).write_text('{"step": 1}')
    with pytest.raises(run.RunError, match=r"already exists|exists already"):
        run.plan("x", runs=tmp_path) if when == "before" else start.open("name: x\n", {})
    assert (folder / left).read_text() == '{"step": 1}'


@pytest.mark.parametrize("record", [{"steps": 1}, {"steps": 0, "earlier": [{"steps": 3}]}, "damaged"])
def test_a_record_of_steps_or_none_that_can_be_read_keeps_the_name(record, tmp_path) -> None:
    run.write_json(used(tmp_path) / "run.json", record)
    with pytest.raises(run.RunError, match="already exists"):
        run.plan("x", runs=tmp_path)


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_budget_that_a_failed_run_made_for_other_settings_is_renamed(calibrated, tmp_path) -> None:
    folder = used(tmp_path)
    (folder / "budget.json").write_text("{}")
    if calibrated:
        (folder / "budget.svg").touch()
    start = run.plan("x", runs=tmp_path).without_old_budget()
    assert start.budgeted == calibrated
    start.open("name: x\n", {})
    assert (folder / "budget.json").exists() == calibrated
    assert (folder / "budget.json.1").exists() != calibrated
    assert ("is now budget.json.1" in start.news) != calibrated


def test_another_rank_does_not_take_the_folder_of_rank_0_for_an_old_run(tmp_path, monkeypatch) -> None:
    trained(tmp_path)
    monkeypatch.setenv("RANK", "1")
    assert run.plan("x", runs=tmp_path).step == 0


@pytest.mark.parametrize("broken", ["run.json", "config.yaml"])
def test_a_run_killed_while_its_folder_was_created_continues_with_resume_auto(broken, tmp_path, monkeypatch) -> None:
    sound = run.write_text

    def full(path: Path, text: str) -> None:
        if path.name == broken:
            path.with_name(f".{path.name}.77").write_text(text[:3])  # what kill -9 leaves
            raise OSError(28, "No space left on device", str(path))
        sound(path, text)

    monkeypatch.setattr(run, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        used(tmp_path)
    monkeypatch.setattr(run, "write_text", sound)
    run.plan("x", resume="auto", runs=tmp_path).open("name: x\n", {"seed": 1})
    assert {"config.yaml", "run.json"} <= set(names(tmp_path / "x"))


def test_a_text_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch) -> None:
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*x\.json"):
        run.write_text(tmp_path / "x.json", "{}")
    assert names(tmp_path) == []


def test_overwrite_moves_the_old_run_to_the_next_free_number(tmp_path) -> None:
    for seed in range(3):
        run.plan("x", overwrite=True, runs=tmp_path).open("name: x\n", {"seed": seed})
    seeds = {path.name: run.read_json(path / "run.json")["seed"] for path in tmp_path.iterdir()}
    assert seeds == {"x": 2, "x.1": 0, "x.2": 1}


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("global_step/weights.pt", bytes(range(60)), "global_step/weights.pt has 60 of 100 bytes"),
        (
            "global_step/weights.pt",
            bytes([1, *range(1, 100)]),
            "global_step/weights.pt has changed (sha256 f1516a1725b1, sealed as bce0aff19cf5)",
        ),
        ("sealed.json", b'{"files": {}}', "sealed.json lists no files"),
        ("trainer_state.json", None, "trainer_state.json is missing"),
        ("sealed.json", None, "sealed.json is missing"),
        ("sealed.json", b'{"files": ["weights.pt"', "sealed.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_and_named_and_refused_if_given(name, content, what, tmp_path) -> None:
    folder = used(tmp_path)
    older, newest = checkpoint(folder, 9), checkpoint(folder, 10)
    (newest / name).unlink()
    if content is not None:
        (newest / name).write_bytes(content)
    with pytest.raises(run.RunError, match=rf"checkpoint-10 is damaged: {re.escape(what)}; use --resume auto"):
        run.plan("x", resume=str(newest), runs=tmp_path)
    start = run.plan("x", resume="auto", runs=tmp_path)
    assert (start.checkpoint, start.step) == (older, 9)
    assert start.news == f"skipped {newest} ({what}; now checkpoint-10.1); resuming from {older}"
    start.open("name: x\n", {})
    assert names(folder) == [".lock", "checkpoint-10.1", "checkpoint-9", "config.yaml", "run.json"]
    assert run.plan("x", resume="auto", runs=tmp_path).news == ""


@pytest.mark.parametrize("there", ["nothing", "calibration", "a run without a checkpoint"])
def test_a_resumed_run_without_a_checkpoint_says_that_it_starts(there, tmp_path) -> None:
    folder = run.RunFolder(path=tmp_path / "x")
    if there == "calibration":
        run.write_json(folder.budget, {})
    elif there != "nothing":
        begin(folder)
        run.append_line(folder.metrics, {"step": 1})
    start = run.plan("x", resume="auto", runs=tmp_path)
    assert start.news == f"{folder.path}: no checkpoint to continue from; starting from the first step"
    assert run.plan("x", overwrite=True, runs=tmp_path).news == ""


def test_going_back_to_an_older_checkpoint_leaves_the_later_ones_behind(tmp_path) -> None:
    folder = used(tmp_path)
    older = checkpoint(folder, 9)
    checkpoint(folder, 10)
    start = run.plan("x", resume=str(older), runs=tmp_path)
    assert start.news == f"set aside {folder}/checkpoint-10 (now checkpoint-10.1); resuming from {older}"
    start.open("name: x\n", {})
    assert run.plan("x", resume="auto", runs=tmp_path).checkpoint == older


def test_a_partial_checkpoint_is_removed_on_resume(tmp_path) -> None:
    folder = used(tmp_path)
    checkpoint(folder / ".partial", 3, whole=False)
    run.plan("x", resume="auto", runs=tmp_path).open("name: x\n", {})
    assert names(folder) == [".lock", "config.yaml", "run.json"]


HOLDING = """
import sys, time
from pathlib import Path
from omnimem import run
run.hold(run.RunFolder(path=Path(sys.argv[1])))
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


def test_a_run_folder_belongs_to_one_process_until_it_ends(tmp_path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDING, str(tmp_path / "x"), "60"], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    start = run.plan("x", runs=tmp_path)
    with pytest.raises(run.RunError, match=rf"x is in use by process {holder.pid}; wait until it has ended"):
        start.open("name: x\n", {}, patience=0.3)
    assert not (tmp_path / "x" / "config.yaml").exists()
    holder.kill()
    start.open("name: x\n", {}, patience=10.0)
    assert holder.wait() < 0
    holder.stdout.close()
    assert (tmp_path / "x" / "config.yaml").is_file()


def test_resume_from_a_checkpoint_of_another_run_is_refused(tmp_path) -> None:
    checkpoint(used(tmp_path), 5)
    other = checkpoint(used(tmp_path, "y"), 5)
    with pytest.raises(run.RunError, match=r"is not a checkpoint of .*x; known: .*checkpoint-5"):
        run.plan("x", resume=str(other), runs=tmp_path)
    assert run.plan("y", resume=str(other), runs=tmp_path).checkpoint == other


def test_a_resumed_run_keeps_the_earlier_records(tmp_path) -> None:
    used(tmp_path)
    for seed in (2, 3):
        run.plan("x", resume="auto", runs=tmp_path).open("name: x\n", {"seed": seed})
    record = run.read_json(tmp_path / "x" / "run.json")
    assert (record["seed"], [part["seed"] for part in record["earlier"]]) == (3, [1, 2])


def test_a_resumed_run_drops_the_metrics_that_it_will_write_again(tmp_path) -> None:
    folder = used(tmp_path)
    checkpoint(folder, 2)
    for step in (1, 2, 3):
        run.append_line(folder / "metrics.jsonl", {"step": step})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a crash in the middle of a line
    run.plan("x", resume="auto", runs=tmp_path).open("name: x\n", {})
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_numbers_that_json_cannot_hold_become_null(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    run.append_line(path, {"loss": float("nan"), "kept": {"audio": [1.5, float("inf")]}})
    assert json.loads(path.read_text()) == {"loss": None, "kept": {"audio": [1.5, None]}}


def test_a_value_that_cannot_be_written_leaves_the_old_file(tmp_path) -> None:
    path = tmp_path / "run.json"
    run.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        run.write_json(path, {"a": object()})
    run.update_json(path, b=2)
    assert run.read_json(path) == {"a": 1, "b": 2}
    assert [each.name for each in tmp_path.iterdir()] == ["run.json"]


def test_the_digest_of_a_folder_changes_with_names_and_contents(tmp_path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"weights")
    assert run.sha256(file) == hashlib.sha256(b"weights").hexdigest()
    first = run.sha256(tmp_path, suffixes=[".safetensors"])
    (tmp_path / "README.md").touch()
    assert run.sha256(tmp_path, suffixes=[".safetensors"]) == first
    file.rename(tmp_path / "b.safetensors")
    second = run.sha256(tmp_path, suffixes=[".safetensors"])
    (tmp_path / "b.safetensors").write_bytes(b"Weights")
    assert len({first, second, run.sha256(tmp_path, suffixes=[".safetensors"]), run.sha256(tmp_path)}) == 4


def test_provenance_names_versions_commit_command_and_seed() -> None:
    said = run.provenance(command=["train/finetune.py", "a=1"], seed=7, sha256={"base": "ab", "adapter": None})
    assert said["packages"]["torch"].startswith("2.")
    assert (said["seed"], said["command"], said["sha256"]["base"]) == (7, ["train/finetune.py", "a=1"], "ab")
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(run.__file__).parent)
    assert said["git"] is None or said["git"]["commit"] == head.stdout.strip()
    assert said["python"] == ".".join(map(str, sys.version_info[:3]))
