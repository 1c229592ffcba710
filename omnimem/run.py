"""The run folder: when it may be used, what lies in it, and what the run was."""

import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, final

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


CALIBRATED = ("budget.json", "budget.svg", "signals.svg")  # what train/calibrate.py leaves for the run to use


class RunError(ValueError):
    """The run folder cannot be used as asked; the message names the cures."""


@final
@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """runs/<name>/ and the names of what lies in it."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def record(self) -> Path:
        """What the run was: `provenance`, and what was measured."""
        return self.path / "run.json"

    @property
    def budget(self) -> Path:
        """Slots of each layer and modality."""
        return self.path / "budget.json"

    @property
    def adapter(self) -> Path:
        """The tuned adapter."""
        return self.path / "adapter"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.path / "tb"

    @property
    def metrics(self) -> Path:
        """One line a step."""
        return self.path / "metrics.jsonl"

    @property
    def comparison(self) -> Path:
        """The report."""
        return self.path / "compare"

    def evaluation(self, arm: str) -> Path:
        """Results of one arm."""
        return self.path / "eval" / arm

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first; trainer_state.json is the last file the Trainer writes."""
        steps = {
            int(name[1]): path
            for path in self.path.glob("checkpoint-*")
            if (name := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / "trainer_state.json").is_file()
        }
        return [steps[step] for step in sorted(steps)]


@final
@dataclass(frozen=True, kw_only=True)
class Start:
    """How a run begins: in which folder, from which checkpoint, and whether an older run is moved away first."""

    folder: RunFolder
    checkpoint: Path | None = None  # None: from the first step
    resumed: bool = False
    replaces: bool = False

    @property
    def step(self) -> int:
        """Steps that are done already."""
        return int(self.checkpoint.name.rpartition("-")[2]) if self.checkpoint else 0

    def open(self, config: str, provenance: Mapping[str, Any]) -> RunFolder:
        """Make the folder ready on disk (one process alone does this) and write config.yaml and run.json."""
        if self.replaces:
            self.folder.path.rename(_free(self.folder.path))
        self.folder.path.mkdir(parents=True, exist_ok=True)
        earlier = read_json(self.folder.record) if self.resumed and self.folder.record.is_file() else None
        history = [*earlier.pop("earlier", []), earlier] if earlier else []
        write_text(self.folder.config, config)
        write_json(self.folder.record, {**provenance, "earlier": history})
        keep_steps(self.folder.metrics, self.step)
        return self.folder


def plan(name: str, *, resume: str | None = None, overwrite: bool = False, runs: Path = Path("runs")) -> Start:
    """How runs/<name> may be used; RunError names the cures. Nothing is changed on disk.

    resume: None, "auto" (the newest complete checkpoint, or the first step where there is none), or a checkpoint.
    Rank 0 alone refuses a folder that exists: to the others it may be the one that rank 0 has just made.
    """
    folder = RunFolder(path=runs / name)
    if resume is not None and overwrite:
        raise RunError("--resume continues a run and --overwrite starts it anew; give one of them")
    used = folder.path.exists() and (not folder.path.is_dir() or any(_begun(path) for path in folder.path.iterdir()))
    if resume is not None:
        checkpoint = _newest(folder) if resume == "auto" else _chosen(folder, Path(resume))
        return Start(folder=folder, checkpoint=checkpoint, resumed=used)
    if used and not overwrite and os.environ.get("RANK", "0") == "0":
        raise RunError(
            f"{folder.path} exists already; continue it with --resume auto, give the run another name with name=..., "
            f"or start anew with --overwrite, which moves it to {_free(folder.path)}"
        )
    return Start(folder=folder, replaces=used)


def _begun(path: Path) -> bool:
    """Whether a file in a run folder belongs to a run; a calibration beforehand is part of none."""
    return path.name not in CALIBRATED


def provenance(*, command: Sequence[str], seed: int, sha256: Mapping[str, str | None]) -> dict[str, Any]:
    """What a run was: versions, commit, command, seed, and digests of base, adapter and data."""
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
    """Digest of a file, or of a folder: names and contents of its files (those with one of `suffixes`), in order."""
    if path.is_dir():
        whole = hashlib.sha256()
        for file in sorted(path.rglob("*")):
            if file.is_file() and (not suffixes or file.suffix in suffixes):
                whole.update(f"{file.relative_to(path).as_posix()}\0{sha256(file)}\n".encode())
        return whole.hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all; numbers that are not finite become null."""
    write_text(path, json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def update_json(path: Path, **values: Any) -> None:
    """Set keys of the JSON object in a file."""
    write_json(path, {**read_json(path), **values})


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line of JSON; numbers that are not finite become null."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(_finite(dict(record)), allow_nan=False) + "\n")


def keep_steps(path: Path, last: int) -> None:
    """Drop the lines of steps after `last`, which a resumed run will write again, and a line cut short by a crash."""
    if not path.is_file():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _until(line, last)]
    write_text(path, "".join(f"{line}\n" for line in kept))


def _until(line: str, last: int) -> bool:
    try:
        return json.loads(line)["step"] <= last
    except json.JSONDecodeError:
        return False


def _newest(folder: RunFolder) -> Path | None:
    """The last complete checkpoint; RunError when the folder holds something else than a run."""
    checkpoints = folder.checkpoints()
    if not checkpoints and folder.path.is_dir() and any(folder.path.iterdir()) and not folder.record.is_file():
        raise RunError(f"{folder.path} holds no run to resume (no run.json); set name=... or use --overwrite")
    return checkpoints[-1] if checkpoints else None


def _chosen(folder: RunFolder, checkpoint: Path) -> Path:
    """A checkpoint of this run by its path."""
    known = folder.checkpoints()
    for path in known:
        if path.resolve() == checkpoint.resolve():
            return path
    if not known:
        raise RunError(f"{checkpoint}: {folder.path} has no complete checkpoint; use --resume auto to begin it again")
    names = ", ".join(str(path) for path in known)
    raise RunError(f"{checkpoint} is no complete checkpoint of {folder.path}; known: {names}")


def _free(path: Path) -> Path:
    """path.1, path.2 ...: the first name that is free."""
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
    """Commit of the source tree that runs, and whether it was changed since; None outside a repository of its own."""
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
    """The value with null for numbers that JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
