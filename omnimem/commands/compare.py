"""Compare arms of one or more runs, question by question, and write the report.

omnimem compare DIR [DIR ...] --out DIR     # a run folder: all its arms; an eval folder: one
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omnimem.cli.parser import Parser
from omnimem.comparison import DRAWS, compare
from omnimem.comparison.formatting import percent, points, shown, unread
from omnimem.comparison.load import axis_of
from omnimem.errors import counted
from omnimem.limits import exceeds


def main(arguments: Sequence[str]) -> None:
    """Write summary.json, the CSV files and report.html to --out, and print the numbers."""
    given = _parser().parse(arguments)
    summary = compare(
        given.folders, given.out, allow_different=given.allow_different, draws=given.draws, seed=given.seed
    )
    for line in _lines(summary):
        print(line)
    for line in summary["different"]:
        text = f"not comparable: {line}"
        print(f"\033[31m{text}\033[0m" if sys.stderr.isatty() else text, file=sys.stderr)
    print(f"report: {given.out / 'report.html'}")


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a run folder, or one of its eval/ARM")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the report")
    parser.add_argument(
        "--allow-different", action="store_true", help="compare although inputs or budgets differ; the report says so"
    )
    parser.add_argument("--draws", type=_draws, default=DRAWS, help="draws of the bootstrap (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (%(default)s)")
    return parser


def _draws(text: str) -> int:
    draws = int(text)
    if draws < 100:
        raise argparse.ArgumentTypeError(f"{draws:,} is too small for a 95 % interval; give at least 100 draws")
    if what := exceeds("bootstrap_draws", draws):
        raise argparse.ArgumentTypeError(what)
    return draws


def _lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """Results of each benchmark, and of all of them pooled if there are several."""
    groups = dict(summary["benchmarks"])
    if len(groups) > 1:
        groups["all benchmarks pooled"] = summary["pooled"]
    for name, group in groups.items():
        asked = f"{counted(group['n'], 'question')}, {counted(group['clusters'], 'video')}"
        yield f"{name}: {asked}, chance {percent(group['chance'])} %"
        kinds = _smallest_axis(group["kinds"]) if name in summary["benchmarks"] else []
        for label, entry in (group["arms"] | group["probes"]).items():
            low, high = entry["strict_interval"]
            found = f"{percent(entry['strict']):>5} % [{percent(low)}, {percent(high)}]"
            yield f"  {shown(label):24} {found}  {_parts(entry['kinds'], kinds)}".rstrip()
            if what := unread(entry):
                yield f"  {shown(label):24} {what}"
        for pair in group["pairs"]:
            yield (
                f"  {shown(pair['a'])} - {shown(pair['b'])}: {points(pair['diff'])} points "
                f"[{points(pair['low'])}, {points(pair['high'])}]: {pair['verdict']}"
            )


def _parts(entries: Mapping[str, Any], kinds: Sequence[str]) -> str:
    """Accuracies of an arm by kind."""
    found = [(kind.rpartition(": ")[2], entries[kind]["strict"]) for kind in kinds if kind in entries]
    return ", ".join(f"{shown(kind)} {percent(strict)}" for kind, strict in found)


def _smallest_axis(kinds: Iterable[str]) -> list[str]:
    """The kinds of the axis with the fewest kinds, since a line is short; the report shows all axes."""
    axes: dict[str, list[str]] = {}
    for kind in kinds:
        axes.setdefault(axis_of(kind), []).append(kind)
    return min((found for found in axes.values() if len(found) > 1), key=len, default=[])
