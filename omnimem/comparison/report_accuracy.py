"""Sections of the report about accuracy: sentences, accuracies, paired differences, kinds of question, durations."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from omnimem.comparison import figures
from omnimem.comparison.figures import Mark, Scale
from omnimem.comparison.formatting import percent, points, shown, unread
from omnimem.comparison.load import Arm, axis_of
from omnimem.tasks.accuracy import DURATION, ordered

MARKS: dict[str, tuple[Mark, str]] = {"reference": ("ring", "reference"), "probe": ("bar", "probe")}
STYLES = ("first", "second", "third", "fourth", "fifth", "sixth")  # of lines in one figure

View = dict[str, Any]
Group = Mapping[str, Any]  # the summary of one benchmark, or of all pooled


def sentences(name: str, group: Group) -> list[View]:
    """The first arm compared with all others, in sentences."""
    pairs = group["pairs"]
    return [_sentence(name, pair, group["arms"]) for pair in pairs if pair["a"] == pairs[0]["a"]]


def _sentence(name: str, pair: Mapping[str, Any], arms: Mapping[str, Any]) -> View:
    a, b = shown(pair["a"]), shown(pair["b"])
    between = f"{points(pair['low'])} to {points(pair['high'])}"
    if pair["low"] is None:
        text = f"{a} against {b} on {name}: {points(pair['diff'])} points; a single video gives no interval"
    elif pair["verdict"] == "not resolved" and pair["minimum_detectable"] is None:
        text = f"{a} against {b} on {name}: {points(pair['diff'])} points in every video; "
        text += "without variance between videos nothing is known of smaller differences"
    elif pair["verdict"] == "not resolved":
        least = percent(pair["minimum_detectable"])
        text = (
            f"{a} against {b} on {name}: {points(pair['diff'])} points ({between}); "
            f"differences from about {least} points would show here"
        )
    else:
        more = "more" if pair["verdict"] == "gain" else "less"
        text = f"{a} scores {percent(abs(pair['diff']))} points {more} than {b} on {name} (95 % interval {between})"
    silent = [f"{shown(label)}: {what}" for label in (pair["a"], pair["b"]) if (what := unread(arms[label]))]
    return {"verdict": pair["verdict"], "text": "; ".join([text, *silent])}


def accuracy(name: str, group: Group, arms: Sequence[Arm]) -> View:
    """Accuracies of all arms on a benchmark."""
    rows = _rows(group["arms"] | group["probes"], group["chance"], arms)
    return {"name": name, "rules": None, **group, "rows": rows}


def _rows(entries: Mapping[str, Any], chance: float, arms: Sequence[Arm]) -> list[View]:
    """A row with a figure for each arm that has an entry."""
    return [
        {"label": arm.label, **entries[arm.label], "plot": _accuracy_plot(arm, entries[arm.label], chance)}
        for arm in arms
        if arm.label in entries
    ]


def _accuracy_plot(arm: Arm, entry: Mapping[str, Any], chance: float) -> Markup:
    mark, kind = MARKS.get(arm.role, ("diamond", "tuned") if arm.name.startswith("tuned") else ("circle", "plain"))
    scale = figures.accuracy_scale()
    return figures.interval_row(
        scale, entry["strict"], entry["strict_interval"], mark=mark, kind=kind, reference=chance
    )


def accuracy_axis() -> Markup:
    """The axis below accuracies."""
    scale = figures.accuracy_scale()
    return figures.axis_row({tick: f"{100 * tick:.0f} %" for tick in scale.ticks}, scale)


# --------------------------------------------------------------------------------------------------------- differences


def differences(named: Sequence[tuple[str, Group]], benchmarks: Sequence[str]) -> View:
    """All pairs on one scale, and each pair by kind of question on a scale of its own."""
    scale = _scale([pair for _, group in named for pair in group["pairs"]])
    pairs: dict[tuple[str, str], list[View]] = {}
    kinds: dict[tuple[str, str], list[tuple[str, View]]] = {}
    for name, group in named:
        for pair in group["pairs"]:
            key = shown(pair["a"]), shown(pair["b"])
            plot = _difference_plot(pair, scale, pair["verdict"].replace(" ", "-"))
            pairs.setdefault(key, []).append({"name": name, **pair, "plot": plot})
            if name in benchmarks:
                kinds.setdefault(key, []).append((name if len(benchmarks) > 1 else "", pair["kinds"]))
    return {
        "axis": _points_axis(scale),
        "pairs": [{"a": a, "b": b, "rows": rows} for (a, b), rows in pairs.items()],
        "kinds": [
            {"a": a, "b": b, **view} for (a, b), parts in kinds.items() if (view := _difference_by_kind(parts))["parts"]
        ],
    }


def _difference_by_kind(named: Sequence[tuple[str, Mapping[str, View]]]) -> View:
    """One part for each benchmark and axis, all on one scale."""
    scale = _scale([numbers for _, kinds in named for numbers in kinds.values()])

    def rows(kinds: Mapping[str, View], keys: Sequence[View]) -> list[View]:
        found = [(one["label"], kinds[one["key"]]) for one in keys]
        return [{"name": name, **row, "plot": _difference_plot(row, scale, "plain")} for name, row in found]

    parts = [
        {"name": name, "by": view["axis"], "rows": rows(kinds, view["kinds"])}
        for name, kinds in named
        for view in by_axis(kinds)
    ]
    return {"axis": _points_axis(scale), "parts": parts}


def _scale(pairs: Sequence[Mapping[str, Any]]) -> Scale:
    bounds = [pair[key] for pair in pairs for key in ("low", "high", "diff")]
    return figures.difference_scale([bound for bound in bounds if bound is not None])


def _points_axis(scale: Scale) -> Markup:
    return figures.axis_row({tick: points(tick).replace(".0", "") for tick in scale.ticks}, scale)


def _difference_plot(pair: Mapping[str, Any], scale: Scale, kind: str) -> Markup:
    return figures.interval_row(scale, pair["diff"], (pair["low"], pair["high"]), kind=kind, reference=0.0)


# --------------------------------------------------------------------------------------------------- kinds of question


def by_axis(kinds: Iterable[str]) -> list[View]:
    """Kinds by their axis, the labels in the order of their axis."""
    axes: dict[str, dict[str, str]] = {}
    for kind in kinds:
        axis = axis_of(kind)
        axes.setdefault(axis, {})[kind.removeprefix(f"{axis}: ")] = kind
    return [
        {"axis": axis, "kinds": [{"key": labels[label], "label": label} for label in ordered(labels)]}
        for axis, labels in axes.items()
    ]


def kinds(name: str, group: Group, arms: Sequence[Arm]) -> View:
    """Accuracies of the arms on every kind of question, by axis."""
    axes = [
        {"axis": view["axis"], "kinds": [_kind(one, group["kinds"], group["arms"], arms) for one in view["kinds"]]}
        for view in by_axis(group["kinds"])
    ]
    return {"name": name, "axes": axes}


def probes(name: str, group: Group, arms: Sequence[Arm]) -> View:
    """Probes beside full memory, which has the whole input, by the kinds of the first axis, or all questions."""
    entries = group["arms"] | group["probes"]
    few = [arm for arm in arms if arm.role == "probe"] + [arm for arm in arms if arm.name == "full_memory"][:1]
    keys = [one for view in by_axis(group["kinds"])[:1] for one in view["kinds"]]
    found = [_kind(one, group["kinds"], entries, few) for one in keys]
    if not keys:
        found = [{"name": "all questions", "chance": group["chance"], "rows": _rows(entries, group["chance"], few)}]
    return {"name": name, "kinds": found if group["probes"] else []}


def _kind(one: View, facts: Mapping[str, Any], entries: Mapping[str, Any], arms: Sequence[Arm]) -> View:
    key = one["key"]
    of_kind = {label: entry["kinds"][key] for label, entry in entries.items() if key in entry["kinds"]}
    return {"name": one["label"], **facts[key], "rows": _rows(of_kind, facts[key]["chance"], arms)}


def durations(name: str, group: Group, arms: Sequence[Arm]) -> View | None:
    """Accuracy of the first arms by duration of the stream; None if there is only one duration."""
    kinds = next((view["kinds"] for view in by_axis(group["kinds"]) if view["axis"] == DURATION), [])
    if len(kinds) < 2:
        return None
    # 1. one line per arm
    drawn = [arm.label for arm in arms if arm.label in group["arms"]][: len(STYLES)]
    lines = []
    for style, label in zip(STYLES, drawn, strict=False):
        entries = [group["arms"][label]["kinds"].get(kind["key"]) for kind in kinds]
        lines.append((style, [None if one is None else (one["strict"], one["strict_interval"]) for one in entries]))
    # 2. figure
    return {
        "name": name,
        "counts": [(kind["label"], group["kinds"][kind["key"]]["n"]) for kind in kinds],
        "legend": [{"style": style, "label": label} for style, label in zip(STYLES, drawn, strict=False)],
        "left_out": len(group["arms"]) - len(drawn),
        "chart": figures.over_places(
            lines,
            [kind["label"] for kind in kinds],
            x_title="duration of the stream",
            label=f"Accuracy on {name} against duration",
        ),
    }
