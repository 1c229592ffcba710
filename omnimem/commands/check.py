"""Looks at every file of a manifest or benchmark before a run does: tracks, lengths, times; prints a data report.

    python data_prep/check.py data/train.jsonl [data/test.jsonl ...] [--tracks both] [--decode]
    python data_prep/check.py --benchmark video_mme --root DIR [--set durations=[long]] [--subset] [--decode]

Exit code 2 when more samples fail than --max-failures allows, or a benchmark is not all there; each failure is a line
`file:line key: what; how to repair`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from omnimem.cli.data_report import add_policy, benchmark_report, chosen, report, shared_files
from omnimem.config import ConfigError
from omnimem.data import ManifestError, Sample, read_manifest

# --------------------------------------------------------------------------------------------------------- benchmarks


def check_benchmark(asked: argparse.Namespace) -> int:
    """Exit code: 0 all there, 2 not."""
    try:
        benchmark = chosen(asked.benchmark, asked.root, asked.settings)
        absent = [gap for gap in benchmark.gaps() if not all(path.is_file() for path in benchmark.annotations)]
        if absent:
            raise ManifestError([f"missing: {gap.what}; {gap.how}" for gap in absent])
        made = benchmark_report(benchmark, tracks=asked.tracks, decode=asked.decode, subset=asked.subset)
    except (ConfigError, ManifestError) as error:
        print(error, file=sys.stderr)
        return 2
    print(made.text())
    for problem in made.problems:
        print(problem, file=sys.stderr)
    blocked = made.miscounted is not None or any(gap.share > asked.max_failures for gap in made.gaps)
    return 2 if blocked or made.files.failed_share > asked.max_failures else 0


# ------------------------------------------------------------------------------------------------------- command line


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with 2 when it is wrong."""
    parser = argparse.ArgumentParser(description="Check the files of manifests.", allow_abbrev=False)
    parser.add_argument("manifests", type=Path, nargs="*")
    parser.add_argument("--benchmark", metavar="NAME", help="check a benchmark's folder instead of manifests")
    parser.add_argument("--root", type=Path, metavar="DIR", help="the folder of the benchmark")
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="an option of the benchmark"
    )
    parser.add_argument("--subset", action="store_true", help="fewer videos and questions than published are wanted")
    add_policy(parser)
    asked = parser.parse_args(arguments)
    if bool(asked.manifests) == bool(asked.benchmark):
        parser.error("name manifests, or --benchmark NAME --root DIR")
    if asked.benchmark and asked.root is None:
        parser.error("--benchmark needs --root DIR, the folder that it was downloaded to")
    return asked


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 usable, 2 not."""
    asked = parse(arguments)
    if asked.benchmark:
        return check_benchmark(asked)
    manifests: dict[str, list[Sample]] = {}
    problems: list[str] = []
    for path in asked.manifests:
        try:
            manifests[str(path)] = read_manifest(path, allow_absolute=asked.allow_absolute_paths)
        except ManifestError as error:
            problems += error.problems
    wrong = bool(problems)
    for name, samples in manifests.items():
        made = report(name, samples, tracks=asked.tracks, decode=asked.decode)
        print(made.text())
        problems += [failure.message for failure in made.failures]
        wrong |= made.failed_share > asked.max_failures
    for note in shared_files(manifests):
        print(f"note: {note}")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 2 if wrong else 0
