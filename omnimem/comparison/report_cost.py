"""Sections of the report about cost, data, budgets, kept tokens and training."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omnimem.comparison import figures
from omnimem.comparison.figures import Kept
from omnimem.comparison.formatting import percent, seconds, shown, size
from omnimem.comparison.load import Arm, Run
from omnimem.comparison.report_accuracy import STYLES, Group, View
from omnimem.errors import counted

COSTS: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("reading_per_second", "text model, per second of stream", seconds),
    ("first_token_seconds", "from the question to the first token", seconds),
    ("peak_memory", "most memory in use", size),
)
FULL = "full memory"


def costs(name: str, group: Group) -> View | None:
    """Cost of each arm; None if not measured."""
    entries = group["arms"] | group["probes"]
    found = {label: entry["cost"] for label, entry in entries.items() if entry["cost"]}
    if not found:
        return None
    return {
        "name": name,
        "rows": [{"label": label, **cost} for label, cost in found.items()],
        "figures": [_cost_figure(title, key, write, found) for key, title, write in COSTS],
    }


def _cost_figure(title: str, key: str, write: Callable[[float | None], str], costs: Mapping[str, Any]) -> View:
    values = {label: None if cost[key] is None else float(cost[key]) for label, cost in costs.items()}
    scale = figures.from_zero([value for value in values.values() if value is not None])
    rows = [
        {"label": label, "value": write(value), "plot": figures.bar_row(scale, value)}
        for label, value in values.items()
    ]
    return {"title": title, "rows": rows}


def data_problems(name: str, group: Group, arms: Sequence[Arm]) -> View | None:
    """Unreadable streams, and defects of the annotations by rule; None if there are none."""
    # 1. unreadable streams
    failed: dict[tuple[str, str], list[str]] = {}
    for arm in arms:
        for answer in arm.sheets[name].answers.values() if name in arm.sheets else ():
            if answer.failed:
                failed.setdefault((answer.id, answer.failed), []).append(shown(arm.label))
    # 2. defects
    rules: dict[str, list[Mapping[str, Any]]] = {}
    for defect in group["defects"]:
        rules.setdefault(defect["rule"], []).append(defect)
    if not failed and not rules:
        return None
    return {
        "name": name,
        "failed": [{"id": key, "reason": reason, "arms": labels} for (key, reason), labels in failed.items()],
        "rules": [{"rule": rule.replace("_", " "), "found": found} for rule, found in sorted(rules.items())],
    }


def budgets(runs: Sequence[Run]) -> list[View]:
    """One figure for each different budget, with the runs that use it."""
    users: dict[tuple[tuple[tuple[int, int], ...], bool], list[str]] = {}
    for run in runs:
        if run.budget is not None and not run.budget.unlimited:
            slots = tuple((audio, visual) for audio, visual in run.budget.slots)
            users.setdefault((slots, run.budget.split), []).append(run.name)
    return [_budget(slots, split, names) for (slots, split), names in users.items()]


def _budget(slots: Sequence[tuple[int, int]], split: bool, runs: Sequence[str]) -> View:
    total = sum(map(sum, slots))
    label = f"Budget by layer of {runs[0]}: {counted(total, 'slot')} over {counted(len(slots), 'layer')}"
    return {
        "runs": runs,
        "split": split,
        "slots": slots,
        "total": total,
        "audio": sum(audio for audio, _ in slots) / total,
        "chart": figures.budget_bars(slots, split=split, label=label),
    }


def traces(arms: Sequence[Arm]) -> list[View]:
    """Kept tokens of the traced stream of each arm with a budget."""
    return [
        {
            "label": arm.label,
            "video": arm.trace["video"],
            "panels": [_kept(arm.label, arm.trace, modality) for modality in ("visual", "audio")],
        }
        for arm in arms
        if arm.role == "budgeted" and arm.trace is not None
    ]


def _kept(label: str, trace: Mapping[str, Any], modality: str) -> View:
    kept = Kept.read(trace, modality)
    arrived, left = kept.arrived.sum(), kept.kept[-1].mean(0).sum()
    title = f"{shown(label)}: fraction of {modality} tokens kept"
    return {
        "modality": modality,
        "left": float(left / arrived) if arrived else None,
        "time": figures.kept_over_time(kept, modality, label=f"{title} over time"),
        "layers": figures.kept_by_layer(kept, modality, label=f"{title} at the end, by layer"),
    }


def training(run: Run) -> View:
    """Loss by budget (steps with full memory and with a small budget are different tasks), and temperature."""
    # 1. loss
    by_budget: dict[str, list[Mapping[str, Any]]] = {}
    for record in run.metrics:
        by_budget.setdefault(_budget_of(record), []).append(record)
    names = sorted(by_budget, key=lambda text: (len(text), text))
    styles = {name: STYLES[min(place, len(STYLES) - 1)] for place, name in enumerate(names)}
    lines = [(styles[name], *_series(by_budget[name], "loss")) for name in names]
    lines = [line for line in lines if line[1]]
    title = f"Loss of {run.name} by step"
    loss = figures.curves(lines, height=190, x_title="step", label=title) if lines else None
    # 2. temperature: full memory selects nothing, so its steps have none
    steps, values = _series([record for record in run.metrics if _budget_of(record) != FULL], "temperature")
    title = f"Selection temperature of {run.name} by step"
    line = ("plain", steps, values)
    # 3. validation and drift of selection
    overlaps = _overlaps(run)
    label = f"Tokens that {run.name} and the untuned model both keep, by step"
    return {
        "run": run.name,
        "steps": len(run.metrics),
        "legend": [{"style": styles[name], "budget": name} for name in names] if len(names) > 1 else [],
        "loss": loss,
        "validation": _validation(run),
        "temperature": figures.curves([line], height=80, x_title="step", label=title) if steps else None,
        "overlap": figures.curves([("plain", *overlaps)], height=80, x_title="step", label=label)
        if len(overlaps[0]) > 1
        else None,
        "overlap_last": percent(overlaps[1][-1]) if overlaps[0] else None,
    }


VALIDATED = (("loss", "loss"), ("accuracy", "share of right answers"))


def _validation(run: Run) -> list[View]:
    """Curves of loss and accuracy on the validation streams, at the budget and with full memory."""
    found = [{"step": record["step"], **record["validation"]} for record in run.metrics if record.get("validation")]
    views = []
    for key, words in VALIDATED:
        lines, legend = [], []
        for style, of, name in ((STYLES[0], "", "at the budget"), (STYLES[1], "full_", FULL)):
            steps, values = _series(found, f"{of}{key}")
            if steps:
                lines.append((style, steps, values))
                legend.append({"style": style, "budget": name})
        if lines:
            title = f"Validation of {run.name}: {words} by step"
            figure = figures.curves(lines, height=110, x_title="step", label=title)
            views.append({"figure": figure, "what": words, "legend": legend})
    return views


def _overlaps(run: Run) -> tuple[list[float], list[float]]:
    """Steps, and the share of kept tokens that the untuned model keeps too."""
    found = [{"step": record["step"], **(record.get("selection_overlap") or {})} for record in run.metrics]
    return _series(found, "mean")


def _budget_of(record: Mapping[str, Any]) -> str:
    """Budget of a line of metrics.jsonl; -1 means full memory."""
    slots = record.get("slots")
    if isinstance(slots, int | float):
        return f"{counted(slots, 'slot')} per layer" if slots > 0 else FULL
    return FULL if slots == "full" else ""


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    found = [record for record in records if isinstance(record.get(key), int | float)]
    return [float(record["step"]) for record in found], [float(record[key]) for record in found]
