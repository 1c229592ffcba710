"""Compares arms of one or more runs, question by question, and writes the report.

python train/compare.py DIR [DIR ...] --out DIR     # a run folder stands for all its arms, an eval folder for one
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omnimem.comparison import DRAWS, compare
from omnimem.comparison.load import shown
from omnimem.comparison.report import percent, points
from train.command import Parser, run_command


def main(arguments: Sequence[str]) -> None:
    """Write summary.json, the CSV files and report.html to --out, and print the numbers."""
    given = _parser().parse(arguments)
    summary = compare(
        given.folders, given.out, allow_different=given.allow_different, draws=given.draws, seed=given.seed
    )
    for line in _lines(summary):
        print(line)
    print(f"report: {given.out / 'report.html'}")


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a run folder, or one of its eval/ARM")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the report goes")
    parser.add_argument(
        "--allow-different", action="store_true", help="compare although input or budget differ; the report says so"
    )
    parser.add_argument("--draws", type=_draws, default=DRAWS, help="draws of the bootstrap (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (%(default)s)")
    return parser


def _draws(text: str) -> int:
    draws = int(text)
    if draws < 100:
        raise argparse.ArgumentTypeError(f"{draws} draws say nothing about a 95 % interval; give at least 100")
    return draws


def _lines(summary: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for name, group in summary["benchmarks"].items():
        lines.append(
            f"{name}: {group['n']:,} questions, {group['clusters']:,} videos, chance {percent(group['chance'])} %"
        )
        for label, entry in (group["arms"] | group["probes"]).items():
            low, high = entry["strict_interval"]
            kinds = ", ".join(f"{shown(kind)} {percent(numbers['strict'])}" for kind, numbers in entry["kinds"].items())
            lines.append(
                f"  {shown(label):24} {percent(entry['strict']):>5} % [{percent(low)}, {percent(high)}]  {kinds}"
            )
        for pair in group["pairs"]:
            lines.append(
                f"  {shown(pair['a'])} - {shown(pair['b'])}: {points(pair['diff'])} points "
                f"[{points(pair['low'])}, {points(pair['high'])}]: {pair['verdict']}"
            )
    return lines


if __name__ == "__main__":
    run_command(main)
