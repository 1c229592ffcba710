"""Check every file of a manifest or a benchmark before a run (tracks, lengths, times), and print a data report.

    omnimem check data/train.jsonl [data/test.jsonl ...] [--tracks both] [--decode]
    omnimem check --benchmark video_mme --root DIR [--set durations=[long]] [--subset] [--decode]

Exit code 2 if more samples fail than --max-failures allows, or if parts of a benchmark are missing. Each failure is one
line: `file:line key: what; how to repair`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from omnimem.cli.data_report import (
    add_benchmark_options,
    add_report_options,
    benchmark_from,
    benchmark_report,
    manifest_report,
    require_annotations,
    shared_files,
    unlearned,
)
from omnimem.cli.parser import Parser, for_command
from omnimem.data import ManifestError, Sample, read_manifest
from omnimem.errors import capped

Outcome = tuple[list[str], bool]  # all problems, and whether they are more than allowed


def main(arguments: Sequence[str]) -> None:
    """Print the report, then the problems on stderr; raises ManifestError if there are more than allowed."""
    given = _parsed(arguments)
    problems, refused = check_benchmark(given) if given.benchmark else check_manifests(given)
    if refused:
        raise ManifestError(problems)
    for problem in capped(problems):
        print(for_command(problem), file=sys.stderr)


def check_benchmark(given: argparse.Namespace) -> Outcome:
    """Report on the folder of a benchmark."""
    benchmark = benchmark_from(given.benchmark, given.root, given.settings)
    require_annotations(benchmark)
    report = benchmark_report(benchmark, tracks=given.tracks, decode=given.decode, subset=given.subset)
    print(report.text())
    incomplete = report.miscounted is not None or any(gap.share > given.max_failures for gap in report.gaps)
    return report.problems, incomplete or report.files.failed_share > given.max_failures


def check_manifests(given: argparse.Namespace) -> Outcome:
    """Report on each manifest, and on files that two of them share."""
    # 1. read
    manifests: dict[str, list[Sample]] = {}
    problems: list[str] = []
    for path in given.manifests:
        try:
            manifests[str(path)] = read_manifest(path, allow_absolute=given.allow_absolute_paths, text_only=True)
        except ManifestError as error:
            problems += error.problems
    refused = bool(problems)
    # 2. report on those that could be read
    for name, samples in manifests.items():
        report = manifest_report(name, samples, tracks=given.tracks, decode=given.decode)
        print(report.text())
        problems += [failure.message for failure in report.failures]
        refused |= report.failed_share > given.max_failures
    # 3. note what they are for, and what they share
    silent = [f"{name}: {note}" for name, samples in manifests.items() for note in unlearned(samples)]
    for note in [*silent, *shared_files(manifests)]:
        print(f"note: {note}")
    return problems, refused


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("manifests", type=Path, nargs="*")
    add_benchmark_options(parser, name="check the folder of a benchmark instead of manifests", required=False)
    parser.add_argument("--subset", action="store_true", help="accept fewer videos and questions than published")
    add_report_options(parser)
    given = parser.parse(arguments)
    if bool(given.manifests) == bool(given.benchmark):
        parser.error("name manifests, or --benchmark NAME --root DIR")
    if given.benchmark and given.root is None:
        parser.error("--benchmark needs --root DIR, the folder that it was downloaded to")
    return given
