"""Faults at random times: every run, evaluation, export and calibration must end with the results of an unbroken one.

python benchmarks/faults.py [--trials 30] [--seed 0] [--engines N] [--out runs/faults]

Each trial trains a small random model for a few steps on short videos, meets one fault, and resumes with
`--resume auto` until it has finished; or it starts another command on a finished run, kills it and starts it again.
tests/support/faults.py and command_faults.py define when a trial passes. The kills are real. Prints tables and writes
faults.json into --out.
"""

import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.command_faults import KILLED, kill_trial
from support.faults import ENGINES, FAULTS, Fault, preload, trial, unbroken
from support.tiny_run import write_videos

from benchmarks.tables import markdown
from omnimem.cli.parser import Parser, run_command
from omnimem.run import provenance, write_json

COUNTS = ("lost", "repeated", "orphans")


def main(arguments: Sequence[str]) -> None:
    """Run all trials; exit code 1 if one failed."""
    parser = Parser(__doc__)
    parser.add_argument("--trials", type=int, default=30, help="number of trials (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the times and places of the faults (%(default)s)")
    parser.add_argument("--engines", type=int, default=len(ENGINES), help="number of engines to use (all)")
    parser.add_argument("--out", type=Path, default=Path("runs/faults"), metavar="DIR", help="%(default)s")
    given = parser.parse(arguments)
    # 1. unbroken runs
    home = given.out.resolve()
    home.mkdir(parents=True, exist_ok=True)
    write_videos(home)
    preload()
    engines = ENGINES[: given.engines]
    whole = {engine: unbroken(home, engine) for engine in engines}
    finished = {command: command.unbroken(home) for command in KILLED}
    # 2. trials
    draw, trials, every = random.Random(given.seed), [], (*FAULTS, *KILLED)
    for number in range(given.trials):
        fault, engine = every[number % len(every)], engines[number // len(every) % len(engines)]
        if isinstance(fault, Fault):
            found = trial(home, number, fault, engine, whole[engine], draw)
        else:
            found = kill_trial(home, number, fault, finished[fault], draw)
        trials.append(found)
        verdict = f"FAILED: {', '.join(found['failed'])}" if found["failed"] else "same"
        codes = " ".join(map(str, found["codes"]))
        print(
            f"{number:3} | {fault.name:38} | {found['engine']:9} | {codes:9} | {verdict} | {found['what']}", flush=True
        )
    # 3. results
    print(f"\n{summary(trials, 'fault')}\n\n{summary(trials, 'engine')}\n")
    passed = sum(not each["failed"] for each in trials)
    print(f"{passed} of {len(trials)} trials passed")
    facts = provenance(command=sys.argv, seed=given.seed, sha256={})
    write_json(home / "faults.json", {"provenance": facts, "passed": passed, "trials": trials})
    if passed < len(trials):
        sys.exit(1)


def summary(trials: Sequence[Mapping[str, Any]], key: str) -> str:
    """A table with a row for each fault, or each engine."""
    rows = []
    for name in sorted({each[key] for each in trials}):
        these = [each for each in trials if each[key] == name]
        passed = sum(not each["failed"] for each in these)
        same = sum("same weights" not in each["failed"] for each in these)
        rows.append([name, len(these), passed, same, *(sum(each[k] for each in these) for k in COUNTS)])
    titles = [key, "trials", "passed", "same weights", *(f"samples {k}" for k in COUNTS[:2]), COUNTS[2]]
    return markdown(titles, rows)


if __name__ == "__main__":
    run_command(main)
