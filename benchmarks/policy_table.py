"""The table and the figure of benchmarks/policies.py: accuracy by kind and by bytes, paired, at equal entries only."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, final

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from omnimem.comparison import ComparisonError
from omnimem.comparison.statistics import ratio, resample
from omnimem.run import write_json

SAME = 0.001  # relative; entries are means over questions
DRAWS = 10_000
NAMED = 16  # of the figure's lines; those below are grey


@final
@dataclass(frozen=True, kw_only=True)
class Sheet:
    """The answers of one arm in one setting: a base model, a world and a number of slots."""

    arm: str
    model: str
    root: str
    slots: int
    fewer: bool  # may hold fewer entries than the reference
    lines: tuple[Mapping[str, Any], ...]

    @classmethod
    def read(cls, path: Path, streams: Collection[str], **facts: Any) -> "Sheet":
        """The lines of a result file about these streams."""
        rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        return cls(lines=tuple(row for row in rows if row["stream"] in streams), **facts)

    def mean(self, key: str) -> float:
        """The mean of a number over the lines of readable streams."""
        return fmean(float(line[key]) for line in self.lines if not line.get("failed"))

    @property
    def right(self) -> dict[tuple[str, str, str], bool]:
        """Whether each answer is correct; with another base model it is another question of the same stream."""
        keys = ((self.root, str(line["stream"]), f"{self.model} {line['id']}") for line in self.lines)
        return {key: bool(line["correct"]) for key, line in zip(keys, self.lines, strict=True)}


def table(sheets: Sequence[Sheet], reference: str) -> list[dict[str, Any]]:
    """A row per arm and budget, over all settings; paired with the reference, clustered by stream.

    Raises ComparisonError if arms do not hold the same entries.
    """
    problems = list(unequal(sheets, reference))
    if problems:
        raise ComparisonError(problems)
    groups: dict[tuple[int, str], list[Sheet]] = {}
    for sheet in sheets:
        groups.setdefault((sheet.slots, sheet.arm), []).append(sheet)
    rows = [_row(group, groups.get((slots, reference), [])) for (slots, _), group in groups.items()]
    return sorted(rows, key=lambda row: (-row["slots"], -row["accuracy"]))


def unequal(sheets: Sequence[Sheet], reference: str) -> Iterator[str]:
    """A line for every arm whose peak or answer-time entries differ from those of the reference."""
    known = {(sheet.model, sheet.root, sheet.slots): sheet for sheet in sheets if sheet.arm == reference}
    for sheet in sheets:
        first = known.get((sheet.model, sheet.root, sheet.slots))
        for key in ("peak_entries", "entries") if first is not None and first is not sheet else ():
            mine, its = sheet.mean(key), first.mean(key)
            if mine > its * (1 + SAME) or (mine < its * (1 - SAME) and not sheet.fewer):
                yield (
                    f"{sheet.arm} and {reference} at {sheet.slots} slots, {sheet.model}, {sheet.root}: {key} are "
                    f"{mine:g} and {its:g}, not the same budget; a method that leaves slots empty must say so (fewer)"
                )


def _row(group: Sequence[Sheet], reference: Sequence[Sheet]) -> dict[str, Any]:
    lines = [line for sheet in group for line in sheet.lines]
    kinds = sorted({str(line["kind"]) for line in lines})
    return {
        "arm": group[0].arm,
        "slots": group[0].slots,
        "n": len(lines),
        "accuracy": _share(lines),
        "kinds": {kind: _share([line for line in lines if line["kind"] == kind]) for kind in kinds},
        "peak_entries": fmean(sheet.mean("peak_entries") for sheet in group),
        "answer_entries": fmean(sheet.mean("entries") for sheet in group),
        "bytes": fmean(sheet.mean("bytes") for sheet in group),
        "settings": [{"model": s.model, "root": s.root, "accuracy": _share(s.lines)} for s in group],
        **_paired(group, reference),
    }


def _share(lines: Sequence[Mapping[str, Any]]) -> float:
    return sum(bool(line["correct"]) for line in lines) / max(1, len(lines))


def _paired(group: Sequence[Sheet], reference: Sequence[Sheet]) -> dict[str, Any]:
    """Its accuracy minus the reference's with a 95 % interval over streams."""
    mine, its = ({key: right for sheet in part for key, right in sheet.right.items()} for part in (group, reference))
    keys = sorted(mine.keys() & its.keys())
    if not keys or group[0].arm == (reference[0].arm if reference else None):
        return {}
    videos = [f"{root} {stream}" for root, stream, _ in keys]
    differences = np.array([float(mine[key]) - float(its[key]) for key in keys])
    resampling = resample(videos, draws=DRAWS, seed=0)
    found = ratio(resampling, videos, differences, np.ones(len(keys)), lowest=-1.0)
    return {"difference": found.value, "low": found.low, "high": found.high, "streams": found.clusters}


def shown(rows: Sequence[Mapping[str, Any]], reference: str) -> Iterator[str]:
    """The table as text, accuracy in per cent and differences in points."""
    kinds = sorted({kind for row in rows for kind in row["kinds"]})
    yield (
        f"{'slots':>5} {'arm':28} {'all':>6} "
        + " ".join(f"{kind[:11]:>11}" for kind in kinds)
        + (f" {'entries':>8} {'KiB':>7}  minus {reference}")
    )
    for row in rows:
        against = ""
        if "difference" in row:
            against = f"{100 * row['difference']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
        by_kind = " ".join(f"{100 * row['kinds'].get(kind, float('nan')):11.1f}" for kind in kinds)
        yield (
            f"{row['slots']:5} {row['arm']:28} {100 * row['accuracy']:6.1f} {by_kind} "
            f"{row['answer_entries']:8.2f} {row['bytes'] / 1024:7.1f}  {against}"
        )


def figure(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy against bytes, a line per arm over its budgets (the paper's figure 6); repeatable to the byte."""
    drawing = Figure(figsize=(9, 6), layout="constrained")
    axes = drawing.subplots()
    mean = {str(row["arm"]): fmean(r["accuracy"] for r in rows if r["arm"] == row["arm"]) for row in rows}
    arms = sorted(mean, key=lambda arm: (-mean[arm], arm))
    for number, arm in enumerate(arms):
        points = sorted((row["bytes"] / 1024, 100 * row["accuracy"]) for row in rows if row["arm"] == arm)
        named = number < NAMED
        style = {"color": f"C{number % 10}", "label": arm, "zorder": 3} if named else {"color": "0.85", "zorder": 1}
        line = "-" if number < 10 or not named else "--"
        axes.plot(*zip(*points, strict=True), line, marker="o", markersize=3, **style)
    if len(arms) > NAMED:
        axes.plot([], [], color="0.85", marker="o", markersize=3, label=f"{len(arms) - NAMED} others, in table.json")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("KiB per stream, text and side state included")
    axes.set_ylabel("accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    drawing.legend(loc="outside right upper", frameon=False, fontsize=8)
    with mpl.rc_context({"svg.hashsalt": "omnimem"}):
        drawing.savefig(path, metadata={"Date": None})


def write(rows: Sequence[Mapping[str, Any]], folder: Path, facts: Mapping[str, Any]) -> None:
    """table.json and accuracy_by_bytes.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "table.json", {**facts, "rows": list(rows)})
    figure(rows, folder / "accuracy_by_bytes.svg")
