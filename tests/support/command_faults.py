"""Trials of `kill -9` at random times in an evaluation, an export or a calibration, each followed by the same command.

A trial passes when the second start ends with exit code 0 and the results of an unbroken command, bit for bit, and
neither a partial result nor a temporary file is left.
"""

import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from support.faults import Launched, started, strike
from support.tiny_run import given

RUN = "whole-plainx1"  # the unbroken run on one rank (`support.faults.unbroken`)
TIMES = ("seconds", "peak_memory")  # of an answer


@final
@dataclass(frozen=True, kw_only=True)
class Killed:
    """A command that is killed."""

    name: str
    script: str
    arguments: Callable[[Path, str], Sequence[str]]  # of the folder of all runs' parent, and the name of the trial
    results: Callable[[Path, str], dict[str, Any]]

    def start(self, home: Path, name: str) -> Launched:
        return started(home, name, self.script, self.arguments(home, name))

    def unbroken(self, home: Path) -> tuple[float, dict[str, Any]]:
        """Seconds that it takes, and its results."""
        name, begun = f"whole-{self.script}", time.monotonic()
        prepare(home, name)
        code = self.start(home, name).ended()
        if code:
            raise RuntimeError(f"the unbroken {self.script} ended with {code}:\n{(home / f'{name}.log').read_text()}")
        return time.monotonic() - begun, self.results(home, name)


def prepare(home: Path, name: str) -> None:
    """A copy of the unbroken run, without results of other trials."""
    for path in (home / "runs" / name, home / f"{name}-out"):
        shutil.rmtree(path, ignore_errors=True)
    (home / f"{name}.log").unlink(missing_ok=True)
    shutil.copytree(home / "runs" / RUN, home / "runs" / name)


def _evaluation(home: Path, name: str) -> list[str]:
    recall = f"evaluate.benchmarks=[{{name: recall, root: {home}, split: train}}]"
    return given(home, name, recall, "evaluate.max_new_tokens=4", "--arm", "training_free", "--arm", "tuned")


def _answers(home: Path, name: str) -> dict[str, Any]:
    """Answers by arm without times, and the summary's accuracy."""
    found: dict[str, Any] = {}
    for folder in sorted((home / "runs" / name / "eval").glob("*")):
        lines = [json.loads(line) for line in (folder / "recall.jsonl").read_text().splitlines()]
        found[folder.name] = [{key: line[key] for key in line if key not in TIMES} for line in lines]
        entry = next(iter(json.loads((folder / "summary.json").read_text())["benchmarks"].values()))
        found[f"{folder.name} strict"] = entry["strict"]
    return found


def _export(home: Path, name: str) -> list[str]:
    return ["--run", f"runs/{name}", "--format", "merged", "--out", f"{name}-out"]


def _exported(home: Path, name: str) -> dict[str, Any]:
    """Bytes by file, without the card and the description, which name the run."""
    folder = home / f"{name}-out"
    files = (path for path in sorted(folder.rglob("*")) if path.suffix in (".safetensors", ".jinja"))
    return {path.name: path.read_bytes() for path in files}


def _calibration(home: Path, name: str) -> list[str]:
    wanted = ("memory.budget={name: audio_visual}", "calibration.skip_chunks=0", "calibration.streams=4")
    return given(home, name, *wanted, "--out", f"{name}-out/budget.json")


def _calibrated(home: Path, name: str) -> dict[str, Any]:
    return json.loads((home / f"{name}-out" / "budget.json").read_text())


KILLED = (
    Killed(name="kill -9 in an evaluation", script="evaluate", arguments=_evaluation, results=_answers),
    Killed(name="kill -9 in an export", script="export", arguments=_export, results=_exported),
    Killed(name="kill -9 in a calibration", script="calibrate", arguments=_calibration, results=_calibrated),
)


def kill_trial(
    home: Path, number: int, killed: Killed, whole: tuple[float, dict[str, Any]], draw: random.Random
) -> dict[str, Any]:
    """Start a command, kill it, start it again; the row of the table."""
    # 1. kill
    name, begun, (seconds, expected) = f"trial-{number}", time.monotonic(), whole
    prepare(home, name)
    at = draw.uniform(0.0, seconds)
    run = killed.start(home, name)
    time.sleep(at)
    for process in (run.launcher, *run.ranks):
        strike(process, signal.SIGKILL)
    codes, orphans = [run.ended()], run.orphans()
    # 2. start again; a command that had finished refuses to write over its result
    whole_already = killed.script == "export" and (home / f"{name}-out").exists()
    if not whole_already:
        run = killed.start(home, name)
        codes.append(run.ended())
        orphans += run.orphans()
    # 3. compare
    found = killed.results(home, name) if codes[-1] == 0 or whole_already else {}
    left = [path.name for folder in (home, home / "runs" / name) for path in folder.glob(f".{name}*")]
    checks = {
        "finished": codes[-1] == 0 or whole_already,
        "same results": found == expected,
        "no orphans": not orphans,
        "nothing left": not left,
        "tidy": "Traceback" not in (home / f"{name}.log").read_text(),
    }
    return {
        "number": number,
        "fault": killed.name,
        "engine": killed.script,
        "what": f"after {at:.1f} of {seconds:.1f} s",
        "codes": codes,
        "output": left,
        "failed": [name for name, holds in checks.items() if not holds],
        "lost": 0,
        "repeated": 0,
        "orphans": len(orphans),
        "seconds": round(time.monotonic() - begun, 1),
    }
