"""The run folder: its files, when it may be used, and the provenance of a run."""

import fcntl
import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, final

from typing_extensions import TypedDict

from omnimem.aside import written_aside
from omnimem.checksums import Origin, damage, origin_of
from omnimem.errors import UserError, counted
from omnimem.limits import read_within
from omnimem.textfile import StoredFileError, parse_stored, read_stored

PACKAGES = (
    "omnimem",
    "torch",
    "transformers",
    "peft",
    "deepspeed",
    "accelerate",
    "datasets",
    "av",
    "numpy",
    "scipy",
    "safetensors",
    "tokenizers",
)
HERE = Path(__file__).resolve().parent
FIGURE = "budget.svg"  # a run itself writes none
CALIBRATED = ("budget.json", FIGURE, "signals.svg")  # files written by omnimem calibrate before the run
LOCK = ".lock"
PATIENCE = 60.0  # seconds to wait for a process that is shutting down to release its run folder


RESTORE = "restore it, or continue the run with `omnimem finetune --resume auto`, which writes it again"


class RunError(UserError):
    """The run folder cannot be used as requested; the message names the alternatives."""


class Record(TypedDict, total=False):
    """The keys of run.json that are read again."""

    id: str
    sha256: dict[str, str | None]
    steps: int
    engine: dict[str, Any]
    earlier: list[dict[str, Any]]


class MetricsLine(TypedDict):
    """The key of a line of metrics.jsonl that is read again."""

    step: int


@final
class _FolderPath:
    """The path of a file or folder in the run folder."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, folder: "RunFolder", owner: type | None = None) -> Path:
        return folder.path / self._name


@final
@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The folder runs/<name>/ and the paths of its files."""

    path: Path

    config = _FolderPath("config.yaml")  # the resolved config
    record = _FolderPath("run.json")  # provenance (see `provenance`) and measurements of the run
    budget = _FolderPath("budget.json")  # slots of each layer and modality
    adapter = _FolderPath("adapter")  # the tuned adapter
    tensorboard = _FolderPath("tb")  # event files
    metrics = _FolderPath("metrics.jsonl")  # one line per step
    comparison = _FolderPath("compare")  # the comparison report
    partial = _FolderPath(".partial")  # a checkpoint while it is written

    def evaluation(self, arm: str) -> Path:
        """Results of one arm."""
        return self.path / "eval" / arm

    def checkpoint(self, step: int) -> Path:
        """The checkpoint after `step` steps."""
        return self.path / f"checkpoint-{step}"

    def checkpoints(self) -> list[Path]:
        """All checkpoint folders by name, oldest first; `defect` verifies them."""
        named = [path for path in self.path.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
        return sorted(named, key=step_of)

    def defect(self, checkpoint: Path) -> str | None:
        """What is wrong with a checkpoint: it is damaged, or was written by another run or after other steps."""
        return damage(checkpoint) or self.foreign(checkpoint, step_of(checkpoint))

    def foreign(self, sealed: Path, step: int | None = None) -> str | None:
        """Why a sealed folder is not of this run (after `step` steps, if given); None also where that is not known."""
        found, own = origin_of(sealed), self.id
        if None not in (found.run, own) and found.run != own:
            return f"it is of another run (id {found.run}, not {own})"
        if None not in (found.step, step) and found.step != step:
            return f"it was written after step {found.step}"
        return None

    @property
    def id(self) -> str | None:
        """The id of the run in run.json; None where it cannot be read."""
        return self._noted("id")

    @property
    def adapter_sha256(self) -> str | None:
        """Digest in run.json of the adapter that the run ended with; None where it cannot be read."""
        return self._noted("adapter", "sha256")

    def _noted(self, *keys: str) -> str | None:
        """A text in run.json, which may be missing or damaged."""
        try:
            found = json.loads(read_within(self.record))
            for key in keys:
                found = found[key]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None
        return found if isinstance(found, str) else None


def step_of(checkpoint: Path) -> int:
    """Number of completed steps in a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


@final
@dataclass(frozen=True, kw_only=True)
class Start:
    """How a run starts: its folder, its checkpoint, and the folders that are renamed first."""

    folder: RunFolder
    checkpoint: Path | None = None  # None: from the first step
    resumed: bool = False
    replaces: bool = False  # rename an older run
    untrained: bool = False  # resumed, but no start before made a step: any setting may change
    aside: tuple[Path, ...] = ()  # later or damaged checkpoints, or an old budget, to rename
    news: str = ""  # a message about them
    changed: Mapping[str, Any] = field(default_factory=dict)  # settings of `train` that a resumed run changes: old, new
    seen: tuple[object, ...] | None = None  # of the folder when this was decided (`_state`)

    @property
    def step(self) -> int:
        """Number of completed steps."""
        return step_of(self.checkpoint) if self.checkpoint else 0

    @property
    def budgeted(self) -> bool:
        """Whether the folder holds a budget that the run will use."""
        return self.folder.budget.is_file() and not self.replaces and self.folder.budget not in self.aside

    def without_old_budget(self) -> "Start":
        """The same start, without a budget that was made for other settings by the run; that of a calibration stays."""
        old = self.folder.budget
        if not old.is_file() or (self.folder.path / FIGURE).exists():
            return self
        news = f"{self.news}; {old} was made for other settings, and is now {_free(old).name}"
        return replace(self, aside=(*self.aside, old), news=news)

    def open(self, config: str, provenance: Mapping[str, Any], *, patience: float = PATIENCE) -> RunFolder:
        """Prepare the folder on disk (on one process only) and write config.yaml and run.json.

        Locks the folder for this process. Raises RunError when another one still holds it after `patience` seconds, or
        has used it since `plan` looked.
        """
        # 1. lock the folder, rename what must not stay
        hold(self.folder, patience)
        if self.seen is not None and self.seen != _state(self.folder):
            raise RunError(
                f"{self.folder.path} exists already: another process has used it since this one started; continue it "
                "with --resume auto, or give the run another name with name=..."
            )
        if self.replaces:
            self.folder.path.rename(_free(self.folder.path))
            hold(self.folder, patience)
        for path in self.aside:
            path.rename(_free(path))
        shutil.rmtree(self.folder.partial, ignore_errors=True)
        # 2. write the record and config, drop metrics of later steps
        earlier = self._earlier() if self.resumed and self.folder.record.exists() else None
        history = [*earlier.pop("earlier", []), earlier] if earlier else []
        digest = hashlib.sha256(config.encode()).hexdigest()
        former = origin_of(self.checkpoint) if self.checkpoint else Origin()
        own = (earlier or {}).get("id") or former.run or uuid.uuid4().hex[:12]
        record = {"id": own, **provenance, "config_sha256": digest, "earlier": history}
        write_json(self.folder.record, record)  # first: marks the folder as a run
        write_text(self.folder.config, config)
        keep_steps(self.folder.metrics, self.step)
        return self.folder

    def _earlier(self) -> Record | None:
        """The record of the run so far; a damaged one is renamed, since a run goes on without it."""
        record = self.folder.record
        try:
            return read_stored(record, Record, f"it is now {_free(record).name}, and the run goes on without it")
        except StoredFileError as error:
            record.rename(_free(record))
            print(error, file=sys.stderr, flush=True)
            return None


def plan(name: str, *, resume: str | None = None, overwrite: bool = False, runs: Path = Path("runs")) -> Start:
    """Decide how runs/<name> is used, without changing anything on disk.

    `resume`: None, "auto" (the newest intact checkpoint, otherwise the first step), or a checkpoint.
    Raises RunError when the folder cannot be used. Only rank 0 refuses an existing folder, because for other ranks it
    may be the one that rank 0 has just created. A resumed run waits for a process that is shutting down. Where no
    step was made before, any start continues from the first step.
    """
    folder = RunFolder(path=runs / name)
    if resume is not None and overwrite:
        raise RunError("--resume continues a run and --overwrite starts it again; give only one of them")
    if resume is not None:
        _await_release(folder)  # its last checkpoint is the one to resume from
    seen = _state(folder)
    used = folder.path.exists() and (not folder.path.is_dir() or any(_begun(path) for path in folder.path.iterdir()))
    untrained = used and _untrained(folder)
    if resume is not None:
        start = _newest(folder) if resume == "auto" else _chosen(folder, Path(resume))
        news = _again(folder) if untrained else start.news
        if resume == "auto" and start.checkpoint is None and not news:
            news = f"{folder.path}: no checkpoint to continue from; starting from the first step"
        return replace(start, resumed=used, untrained=untrained, news=news, seen=seen)
    if untrained and not overwrite:
        return Start(folder=folder, resumed=True, untrained=True, news=_again(folder), seen=seen)
    if used and not overwrite and os.environ.get("RANK", "0") == "0":
        raise RunError(
            f"{folder.path} already exists; continue it with --resume auto, give the run another name with name=..., "
            f"or start again with --overwrite, which moves it to {_free(folder.path)}"
        )
    return Start(folder=folder, replaces=used, seen=seen)


def _state(folder: RunFolder) -> tuple[object, ...]:
    """What a start of a run changes: its record and its checkpoints, and that a step was made."""
    record = folder.record.stat() if folder.record.is_file() else None
    return (record and (record.st_ino, record.st_mtime_ns), _untrained(folder), *folder.checkpoints())


def _untrained(folder: RunFolder) -> bool:
    """Whether a run ended before its first step: no checkpoint, no result, no metrics, no steps in run.json."""
    settings = {path.name for path in (folder.config, folder.record, folder.tensorboard)}
    try:
        found = [path for path in folder.path.iterdir() if _begun(path) and path.name not in settings]
        record = read_stored(folder.record, Record, "")
    except (OSError, StoredFileError):  # no folder, or a record that is missing or damaged: nothing is known
        return False
    results = [path for path in found if path != folder.metrics or path.is_dir() or path.stat().st_size]
    made = any(each.get("steps") for each in (record, *record.get("earlier", [])))
    return not (results or made or folder.partial.exists())


def _again(folder: RunFolder) -> str:
    return f"{folder.path}: no step was made in it; starting from the first step"


def _begun(path: Path) -> bool:
    """Whether a file in a run folder belongs to a run, and not to a calibration or an incomplete write (dot files)."""
    return path.name not in CALIBRATED and not path.name.startswith(".")


def provenance(*, command: Sequence[str], seed: int, sha256: Mapping[str, str | None]) -> dict[str, Any]:
    """Provenance of a run: versions, commit, command, seed, and digests of base model, adapter and data."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "seed": seed,
        "git": _commit(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "sha256": dict(sha256),
    }


def sha256(path: Path, *, suffixes: Sequence[str] = ()) -> str:
    """SHA-256 of a file, or of the sorted names and contents of a folder's files (only with one of `suffixes`)."""
    if path.is_dir():
        whole = hashlib.sha256()
        for file in sorted(path.rglob("*")):
            if file.is_file() and (not suffixes or file.suffix in suffixes):
                whole.update(f"{file.relative_to(path).as_posix()}\0{sha256(file)}\n".encode())
        return whole.hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: readers never see a partial file."""
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as partial, partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; numbers that are not finite become null."""
    write_text(path, json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")


def read_json(path: Path, shape: Any = Any, cure: str = "restore it, or write it again") -> Any:
    """The value in a JSON file of a run; raises StoredFileError (`omnimem.textfile.read_stored`)."""
    return read_stored(path, shape, cure)


def update_json(path: Path, **values: Any) -> None:
    """Update keys of the JSON object in a file; raises StoredFileError."""
    write_json(path, {**read_stored(path, dict[str, Any], RESTORE), **values})


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one line of JSON; numbers that are not finite become null."""
    with _named(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(_finite(dict(record)), allow_nan=False) + "\n")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Add the file name to an OSError: a full disk is reported without one."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def keep_steps(path: Path, last: int) -> None:
    """Drop the lines of steps after `last`, which a resumed run writes again, and damaged lines, which are counted."""
    # 1. read the lines; a crash may have truncated the last one
    if not path.exists() or path.is_char_device():  # a device has no end
        return
    with _named(path):
        lines, dropped, kept = read_within(path).split(b"\n"), 0, []
    # 2. keep those of the steps so far
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip() and parse_stored(line, MetricsLine, f"{path}:{number}", "dropped")["step"] <= last:
                kept.append(line)
        except StoredFileError:
            dropped += number < len(lines)
    write_text(path, b"".join(line + b"\n" for line in kept).decode())
    if dropped:
        print(f"{path}: dropped {counted(dropped, 'damaged line')}", file=sys.stderr, flush=True)


def hold(folder: RunFolder, patience: float = PATIENCE) -> None:
    """Create the run folder if it does not exist, and lock it until this process ends.

    Raises RunError when another process still holds it after `patience` seconds.
    """
    # 1. acquire the lock
    folder.path.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)  # never closed: that would release it
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() < until:
                time.sleep(0.2)
                continue
            holder = os.read(lock, 20).decode("ascii", "replace")
            raise RunError(
                f"{folder.path} is in use by process {holder}; wait until it has ended, or set name=..."
            ) from error
        # 2. again, if the folder was renamed while this process waited
        if not _is(lock, folder.path / LOCK):
            os.close(lock)
            return hold(folder, until - time.monotonic())
        # 3. write the process id
        os.truncate(lock, 0)
        os.write(lock, str(os.getpid()).encode())
        return


def _is(number: int, path: Path) -> bool:
    """Whether an open file is still the one at this path."""
    try:
        return os.path.samestat(os.fstat(number), path.stat())
    except FileNotFoundError:
        return False


def _await_release(folder: RunFolder, patience: float = PATIENCE) -> None:
    """Wait until no process holds the folder, at most `patience` seconds; `hold` refuses it afterwards."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        try:
            with (folder.path / LOCK).open("r+b") as file:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # closing the file releases it
            return
        except FileNotFoundError:
            return
        except BlockingIOError:
            time.sleep(0.2)


def _newest(folder: RunFolder) -> Start:
    """Start from the newest intact checkpoint; raises RunError when the folder does not hold a run."""
    checkpoints = folder.checkpoints()
    begun = folder.path.is_dir() and any(_begun(path) for path in folder.path.iterdir())
    if not checkpoints and begun and not folder.record.is_file():
        raise RunError(f"{folder.path} holds no run to resume (no run.json); set name=... or use --overwrite")
    passed: dict[Path, str] = {}
    for path in reversed(checkpoints):
        what = folder.defect(path)
        if what is None:
            return Start(folder=folder, checkpoint=path, aside=tuple(passed), news=_passed_over(passed, str(path)))
        passed[path] = what
    return Start(folder=folder, aside=tuple(passed), news=_passed_over(passed, "the first step"))


def _passed_over(passed: Mapping[Path, str], instead: str) -> str:
    each = ", ".join(f"{path} ({what}; now {_free(path).name})" for path, what in passed.items())
    return f"skipped {each}; resuming from {instead}" if passed else ""


def _chosen(folder: RunFolder, checkpoint: Path) -> Start:
    """Start from a checkpoint given by path; raises RunError when it is not one of this run, or damaged."""
    # 1. find and verify the checkpoint
    known = folder.checkpoints()
    if not known:
        raise RunError(f"{checkpoint}: {folder.path} has no checkpoint; use --resume auto to start from the first step")
    names = ", ".join(str(path) for path in known)
    chosen = next((path for path in known if path.resolve() == checkpoint.resolve()), None)
    if chosen is None:
        raise RunError(f"{checkpoint} is not a checkpoint of {folder.path}; known: {names}")
    what = folder.defect(chosen)
    if what is not None:
        raise RunError(f"{checkpoint} is damaged: {what}; use --resume auto, which takes the newest intact one")
    # 2. set later checkpoints aside
    later = tuple(path for path in known if step_of(path) > step_of(chosen))
    moved = ", ".join(f"{path} (now {_free(path).name})" for path in later)
    return Start(
        folder=folder,
        checkpoint=chosen,
        aside=later,
        news=f"set aside {moved}; resuming from {chosen}" if later else "",
    )


def _free(path: Path) -> Path:
    """The first unused name of path.1, path.2 ..."""
    number = 1
    while (moved := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return moved


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> dict[str, Any] | None:
    """Commit of the source tree, and whether it has uncommitted changes; None outside its own repository."""
    git = shutil.which("git")
    if git is None or not (HERE.parent / ".git").exists():
        return None
    ask = [git, "-C", str(HERE.parent)]
    commit = subprocess.run([*ask, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if commit.returncode:
        return None
    status = subprocess.run([*ask, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return {"commit": commit.stdout.strip(), "changed": bool(status.stdout.strip())}


def _finite(value: Any) -> Any:
    """The value with None in place of numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
