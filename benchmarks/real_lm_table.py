"""The tables and the figure of benchmarks/real_lm.py, paired with a reference arm and clustered by text."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from benchmarks.policy_table import DRAWS, NAMED
from omnimem.comparison.statistics import ratio, resample
from omnimem.run import write_json

Row = Mapping[str, Any]
FREE = ("full", "empty")  # arms without a budget
# measure: values of a result, one per question or one per text; None where the result has none
MEASURES: dict[str, Callable[[Row], list[float]]] = {
    "rank1": lambda row: [float(answer["rank"] == 0) for answer in row["questions"]],
    "exact": lambda row: [float(answer["exact"]) for answer in row["questions"]],
    "logp": lambda row: [float(answer["logp"]) for answer in row["questions"]],
    "held": lambda row: [float(row["held"])],
    "verbatim": lambda row: [float(row["verbatim"])] if "verbatim" in row else [],
    "value_held": lambda row: [float(row["value_held"])] if "value_held" in row else [],
    "fact_held": lambda row: [float(row["fact_held"])] if "fact_held" in row else [],
    "first_held": lambda row: [float(row["first_held"])] if "first_held" in row else [],
    "overlap": lambda row: [float(row["overlap"])] if "overlap" in row else [],
    "entries": lambda row: [float(row["entries"])] if "entries" in row else [],
    "cpu": lambda row: [float(row["cpu"])],
}
PAIRED = ("rank1", "exact", "logp", "held", "verbatim")
PERCENT = ("rank1", "exact", "value_held", "fact_held", "first_held", "overlap")
UNPROTECTED = "loss of next prose, minus that with a protected first token"
TITLES = {
    "rank1": "rank-1 %",
    "exact": "exact %",
    "logp": "log p",
    "held": "loss of next prose",
    "verbatim": "loss, given again",
    "value_held": "value held %",
    "fact_held": "fact held %",
    "first_held": "first token held %",
    "overlap": "overlap %",
    "entries": "entries",
    "cpu": "CPU-s",
}


def tables(rows: Sequence[Row], reference: str) -> list[dict[str, Any]]:
    """One entry per cell, slots and arm: means over its texts, differences to the reference on texts that both have."""
    groups: dict[tuple[str, int, str], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row["cell"], row["slots"], row["arm"]), {})[row["text"]] = row
    found = []
    for (cell, slots, arm), mine in groups.items():
        sizes = {key[1] for key in groups if key[0] == cell and key[1]} if arm in FREE else {slots}
        for size in sizes:
            its = groups.get((cell, size, reference), {})
            entry = {"cell": cell, "slots": size, "arm": arm, "texts": len(mine)}
            entry |= {name: _mean(mine.values(), values) for name, values in MEASURES.items()}
            if arm != reference:
                entry |= {f"{name} difference": _paired(mine, its, MEASURES[name]) for name in PAIRED}
            if cell.startswith("sinks"):  # the same streams with the first token protected
                kept = groups.get((cell.replace("sinks", "needles"), slots, arm), {})
                entry["unprotected"] = _paired(mine, kept, MEASURES["held"])
            found.append(entry)
    return sorted(found, key=lambda entry: (entry["cell"], -entry["slots"], -(entry["rank1"] or 0), entry["held"]))


def _mean(rows: Any, values: Callable[[Row], list[float]]) -> float | None:
    found = [value for row in rows for value in values(row)]
    return fmean(found) if found else None


def _paired(
    mine: Mapping[str, Row], its: Mapping[str, Row], values: Callable[[Row], list[float]]
) -> dict[str, float] | None:
    """Mean difference with a 95 % interval over texts; None without common texts."""
    names, differences = [], []
    for text in sorted(mine.keys() & its.keys()):
        pairs = zip(values(mine[text]), values(its[text]), strict=True)
        apart = [a - b for a, b in pairs]
        names += [text] * len(apart)
        differences += apart
    if not differences:
        return None
    resampling = resample(names, draws=DRAWS, seed=0)
    found = ratio(resampling, names, np.array(differences), np.ones(len(differences)), lowest=-1.0)
    return {"value": found.value, "low": found.low, "high": found.high, "texts": found.clusters}


def _shown(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        scale, digits = (100, 1) if name in PERCENT else (1, 3)
        parts = [f"{scale * value[key]:+.{digits}f}" for key in ("value", "low", "high")]
        return f"{parts[0]} [{parts[1]}, {parts[2]}]"
    if name in PERCENT:
        return f"{100 * value:.1f}"
    return f"{value:.0f}" if name == "entries" else f"{value:.3f}"


def markdown(entries: Sequence[Mapping[str, Any]], reference: str) -> Iterator[str]:
    """One table per cell and number of slots."""
    for cell, slots in dict.fromkeys((entry["cell"], entry["slots"]) for entry in entries):
        mine = [entry for entry in entries if (entry["cell"], entry["slots"]) == (cell, slots)]
        names = [name for name in MEASURES if any(entry[name] is not None for entry in mine)]
        paired = [name for name in PAIRED if name in names]
        yield f"\n### {cell}, {slots} slots per layer; differences to {reference}\n"
        sinks = [UNPROTECTED] if any(entry.get("unprotected") for entry in mine) else []
        heads = [TITLES[name] for name in names] + sinks + [f"{TITLES[name]}, minus {reference}" for name in paired]
        yield "| " + " | ".join(["arm", "texts", *heads]) + " |"
        yield "|" + "---|" * (2 + len(heads))
        for entry in mine:
            plain = [_shown(name, entry[name]) for name in names]
            plain += [_shown("held", entry.get("unprotected")) for _ in sinks]
            against = [_shown(name, entry.get(f"{name} difference")) for name in paired]
            yield "| " + " | ".join([entry["arm"], str(entry["texts"]), *plain, *against]) + " |"


def figure(entries: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Facts found and loss of the next prose against slots, a line per arm; repeatable to the byte."""
    drawing = Figure(figsize=(11, 5), layout="constrained")
    panels = drawing.subplots(1, 2)
    arms = list(dict.fromkeys(entry["arm"] for entry in sorted(entries, key=lambda entry: -(entry["rank1"] or 0))))
    for axes, (name, label) in zip(
        panels, (("rank1", "right value first of 20, %"), ("held", "loss of the next 127 tokens, nats")), strict=True
    ):
        for number, arm in enumerate(arms):
            scale = 100 if name in PERCENT else 1
            points = sorted((entry["slots"], scale * entry[name]) for entry in entries if entry["arm"] == arm)
            named = number < NAMED
            style = {"color": f"C{number % 10}", "zorder": 3} if named else {"color": "0.85", "zorder": 1}
            text = {"label": arm} if named and name == "rank1" else {}
            line = "-" if number < 10 or not named else "--"
            axes.plot(*zip(*points, strict=True), line, marker="o", markersize=3, **style, **text)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        tokens = entries[0]["cell"].rpartition("-")[2]
        axes.set_xlabel(f"slots per layer, of {tokens} tokens")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    drawing.legend(loc="outside right upper", frameon=False, fontsize=8)
    with mpl.rc_context({"svg.hashsalt": "omnimem"}):
        drawing.savefig(path, metadata={"Date": None})


def write_tables(rows: Sequence[Row], folder: Path, reference: str) -> str:
    """table.json, table.md and real_lm.svg in a folder; returns the table as text."""
    entries = tables(rows, reference)
    write_json(folder / "table.json", {"reference": reference, "rows": entries})
    text = "\n".join(markdown(entries, reference)) + "\n"
    (folder / "table.md").write_text(text)
    facts = [entry for entry in entries if entry["cell"].startswith("needles") and entry["arm"] != "empty"]
    if facts:  # of the length with the most budgets
        sizes = {cell: len({e["slots"] for e in facts if e["cell"] == cell}) for cell in {e["cell"] for e in facts}}
        chosen = max(sorted(sizes), key=lambda cell: sizes[cell])
        figure([entry for entry in facts if entry["cell"] == chosen], folder / "real_lm.svg")
    return text
