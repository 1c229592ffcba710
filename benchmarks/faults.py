"""Kills, signals and damaged checkpoints at random times: every run must end with the weights of an unbroken one.

python benchmarks/faults.py [--trials 30] [--seed 0] [--out runs/faults]

Each trial trains a small random model for a few steps on short videos, meets one fault, and resumes with
`--resume auto` until it has finished; tests/support/faults.py says when it passes. The kills are real. Prints tables
and writes faults.json.
"""

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.faults import ENGINES, FAULTS, preload, trial, unbroken
from support.tiny_run import write_films

from omnimem.run import provenance, write_json


def main(arguments: Sequence[str]) -> int:
    """All trials; 0 when every one passed."""
    given = _parser().parse_args(arguments)
    home = given.out.resolve()
    home.mkdir(parents=True, exist_ok=True)
    write_films(home)
    preload()
    engines = ENGINES[: given.engines]
    whole = {engine: unbroken(home, engine) for engine in engines}
    draw = random.Random(given.seed)
    trials = []
    for number in range(given.trials):
        fault, engine = FAULTS[number % len(FAULTS)], engines[number // len(FAULTS) % len(engines)]
        trials.append(trial(home, number, fault, engine, whole[engine], draw))
        print(line_of(trials[-1]), flush=True)
    print("\n".join(("", *summary(trials, "fault"), "", *summary(trials, "engine"), "")))
    passed = sum(not each["failed"] for each in trials)
    print(f"{passed} of {len(trials)} trials passed")
    facts = provenance(command=sys.argv, seed=given.seed, sha256={})
    write_json(home / "faults.json", {"provenance": facts, "passed": passed, "trials": trials})
    return 0 if passed == len(trials) else 1


def line_of(found: Mapping[str, Any]) -> str:
    """A row of the table."""
    verdict = f"FAILED: {', '.join(found['failed'])}" if found["failed"] else "same"
    codes = " ".join(map(str, found["codes"]))
    return f"{found['number']:3} | {found['fault']:38} | {found['engine']:9} | {codes:9} | {verdict} | {found['what']}"


def summary(trials: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    """A table with a row for each fault, or each engine."""
    rows = [f"| {key} | trials | passed | same weights | samples lost | samples repeated | orphans |"]
    rows.append("|---" * 7 + "|")
    for name in sorted({each[key] for each in trials}):
        these = [each for each in trials if each[key] == name]
        passed = sum(not each["failed"] for each in these)
        same = sum("same weights" not in each["failed"] for each in these)
        sums = (sum(each[what] for each in these) for what in ("lost", "repeated", "orphans"))
        rows.append("| " + " | ".join(map(str, (name, len(these), passed, same, *sums))) + " |")
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=30, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the times and places of the faults (%(default)s)")
    parser.add_argument("--engines", type=int, default=len(ENGINES), help="use the first so many engines (all)")
    parser.add_argument("--out", type=Path, default=Path("runs/faults"), metavar="DIR", help="%(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
