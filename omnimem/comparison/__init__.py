"""Comparison of arms of one or more runs, paired by question: JSON, CSV and one self-contained page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omnimem.comparison.differences import differences
from omnimem.comparison.load import Arm, ComparisonError, Run, read
from omnimem.comparison.report import render
from omnimem.comparison.summary import arm_rows, pair_rows, summarise, write_csv
from omnimem.run import write_json, write_text

__all__ = ["Arm", "ComparisonError", "Run", "compare", "differences", "read", "render", "summarise"]

DRAWS = 10_000


def compare(
    folders: Sequence[Path], out: Path, *, allow_different: bool = False, draws: int = DRAWS, seed: int = 0
) -> dict[str, Any]:
    """Write summary.json, arms.csv, pairs.csv and report.html of the arms in the folders to `out`; the summary.

    Raises ComparisonError if a folder cannot be read, or if input or budget differ without `allow_different`.
    """
    arms, runs = read(folders)
    different = differences(arms)
    if different and not allow_different:
        raise ComparisonError([*different, "nothing was written; --allow-different compares them anyway, in red"])
    summary = summarise(arms, draws=draws, seed=seed, warnings=different)
    page = render(summary, arms, runs)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "summary.json", summary)
    write_csv(out / "arms.csv", arm_rows(summary))
    write_csv(out / "pairs.csv", pair_rows(summary))
    write_text(out / "report.html", page)
    return summary
