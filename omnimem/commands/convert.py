"""Convert users' rows into a manifest; docs/data.md shows every accepted format with an example.

    omnimem convert my.jsonl [more.json FOLDER OWNER/NAME ...] --out data/train.jsonl [--media-root DIR]

    {"messages": [{"role", "content": "<video>..."}], "videos": [...], "audios": [...]}            ms-swift
    {"messages": [{"role", "content": [{"type": "video", "video": path}, {"type": "text", "text"}]}]}  Qwen, HF, TRL
    {"conversations": [{"from": "human", "value": "<video>..."}], "videos": [...], "audios": [...]}  LLaMA-Factory
    {"query": "<video>...", "response": "...", "videos": [...]}                                    query and response
    {"video": path, "use_audio": true, "timestamps": [start, end], "conversations": [...]}         video-SALMONN

A source is a .json or .jsonl file, a data set of `datasets` (a folder, a .parquet file or a hub id; --split, --subset),
read as written: values are kept. A turn may have `at` and one of loss, weight, train, training (true, false, 1, 0).
A row is one stream: at most one video and one audio file, before the first question. Every row becomes a sample, or a
failure that names file, row and repair. If more rows fail than --max-failures allows, nothing is written (exit code 2).
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from omnimem.cli.data_report import DataReport, Finding, add_report_options, inspect_sample, unlearned
from omnimem.cli.parser import Parser, for_command
from omnimem.data import DataSource, Failure
from omnimem.errors import capped, counted
from omnimem.formats import Target, convert_row
from omnimem.run import write_text
from omnimem.sources import rows_of
from omnimem.textfile import ManifestError


def convert(
    sources: Sequence[DataSource], media_root: Path | None, target: Target, **how: Any
) -> tuple[DataReport, list[str]]:
    """A report on all rows of all sources, and the lines of the usable samples; `how` goes to `inspect_sample`."""
    findings: list[Finding] = []
    lines: list[str] = []
    rejected: list[Failure] = []
    remarks: Counter[str] = Counter()
    used: dict[str, str] = {}
    for source in sources:
        file = Path(source.path)
        here = replace(target, media_root=media_root or (file if file.is_dir() else file.parent))
        rows = tqdm(rows_of(source), desc=source.path, unit="row", leave=False, disable=None)
        for number, (origin, row) in enumerate(rows, start=1):
            try:
                sample, line, said = convert_row(row, origin, f"{source.label}-{number:06d}", here)
                if used.setdefault(sample.id, origin) != origin:
                    raise ManifestError(
                        [f"{origin} id: {sample.id!r} is already used at {used[sample.id]}; rename one"]
                    )
            except ManifestError as error:
                rejected += [Failure(id=origin, reason="row", message=problem) for problem in error.problems]
                continue
            finding = inspect_sample(sample, **how)
            findings.append(finding)
            if not finding.failures:
                lines.append(line)
                remarks.update(said)
    notes = tuple(f"{counted(count, 'row')}: {remark}" for remark, count in remarks.items())
    notes += tuple(unlearned([finding.sample for finding in findings if not finding.failures]))
    name = ", ".join(source.path for source in sources)
    return DataReport(name=name, findings=tuple(findings), rejected=tuple(rejected), remarks=notes), lines


def main(arguments: Sequence[str]) -> None:
    """Write the manifest and print the report; raises ManifestError if too many rows fail."""
    given = _parser().parse(arguments)
    out: Path = given.out
    if out.exists() and not given.overwrite:
        raise ManifestError([f"{out}: exists already; give another --out, or --overwrite"])
    target = Target(folder=out.parent, media_root=out.parent, allow_absolute=given.allow_absolute_paths)
    # 1. convert and report
    sources = [DataSource(path=path) for path in given.sources]
    chosen = {"split": given.split or "train", "subset": given.subset}
    if (given.split or given.subset) and not any(source.is_data_set for source in sources):
        raise ManifestError(["--split and --subset are of a data set, and every source is a file of rows; remove them"])
    sources = [replace(source, **chosen) if source.is_data_set else source for source in sources]
    report, lines = convert(sources, given.media_root, target, tracks=given.tracks, decode=given.decode)
    print(report.text())
    problems = [failure.message for failure in report.failures]
    if report.failed_share > given.max_failures or not lines:
        missing = any(failure.reason == "missing" for failure in report.failures)
        where = ", give the folder of the files as --media-root" if missing and given.media_root is None else ""
        raise ManifestError([*problems, f"{out}: not written; repair the rows above{where}, or raise --max-failures"])
    for problem in capped(problems):
        print(for_command(problem), file=sys.stderr)
    # 2. write
    write_text(out, "".join(f"{line}\n" for line in lines))
    print(f"{out}: {counted(len(lines), 'sample')}")


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=".json, .jsonl, .parquet, a folder or a hub id")
    parser.add_argument("--out", type=Path, required=True, help="the manifest, in a folder above the media")
    parser.add_argument("--media-root", type=Path, help="base of relative paths (default: the folder of each file)")
    parser.add_argument("--split", help="of a data set (default: train)")
    parser.add_argument("--subset", help="configuration of a data set")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing manifest")
    add_report_options(parser)
    return parser
