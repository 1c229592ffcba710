"""compare/report.html: the summary as one self-contained page, with every question and all answers."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from omnimem.comparison import figures
from omnimem.comparison.figures import Kept, Mark, Points, Scale
from omnimem.comparison.formatting import UNKNOWN, count, many, percent, points, seconds, shown, size
from omnimem.comparison.load import Answer, Arm, Run, axis_of
from omnimem.comparison.summary import in_order
from omnimem.tasks.accuracy import DURATION, ordered

TEMPLATE = Path(__file__).with_name("report.html")
STYLE = Path(__file__).with_name("style.css")
LONGEST_TEXT = 1200  # characters shown of one question or prediction
LONGEST_VALUE = 160  # characters shown of one line of provenance
SHA256 = 64  # hexadecimal digits
MARKS: dict[str, tuple[Mark, str]] = {"reference": ("ring", "reference"), "probe": ("bar", "probe")}
COSTS: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("reading_per_second", "text model, per second of stream", seconds),
    ("first_token_seconds", "from the question to the first token", seconds),
    ("peak_memory", "most memory in use", size),
)
STYLES = ("first", "second", "third", "fourth", "fifth", "sixth")  # of lines in one figure

FULL = "full memory"

View = dict[str, Any]


def render(summary: Mapping[str, Any], arms: Sequence[Arm], runs: Sequence[Run]) -> str:
    """The whole page; it needs no network, and a script only to search the questions."""
    template = template_of(TEMPLATE)
    arms = in_order(arms)
    rivals = [arm for arm in arms if arm.role != "probe"]
    names = list(summary["benchmarks"])
    return template.render(
        title=" and ".join(names) if len(names) < 3 else f"{len(names)} benchmarks",
        summary=summary,
        sentences=_sentences(summary),
        accuracy=[_accuracy(name, group, arms) for name, group in _groups(summary)],
        accuracy_axis=_percent_axis(),
        differences=_differences(summary),
        kinds=[_kinds(name, group, rivals) for name, group in summary["benchmarks"].items()],
        probes=[_probes(name, group, arms) for name, group in summary["benchmarks"].items() if group["probes"]],
        durations=[view for name, group in summary["benchmarks"].items() if (view := _durations(name, group, rivals))],
        memory=[_memory(name, group) for name, group in summary["benchmarks"].items()],
        costs=[view for name, group in summary["benchmarks"].items() if (view := _costs(name, group, arms))],
        data=[view for name, group in summary["benchmarks"].items() if (view := _data(name, group, arms))],
        budgets=_budgets(runs),
        traces=[_trace(arm, arm.trace) for arm in arms if arm.role == "rival" and arm.trace is not None],
        training=[_training(run) for run in runs if run.metrics],
        questions=_questions(rivals),
        provenance=_provenance(arms),
    )


def template_of(page: Path) -> Template:
    """A page template with the common style sheet and number formats."""
    environment = Environment(
        loader=FileSystemLoader([page.parent, STYLE.parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "points": points,
        "shown": shown,
        "size": size,
        "count": count,
        "many": many,
        "seconds": seconds,
    }
    return environment.get_template(page.name)


def _groups(summary: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield from summary["benchmarks"].items()
    if len(summary["benchmarks"]) > 1:
        yield "all benchmarks pooled", summary["pooled"]


def _sentences(summary: Mapping[str, Any]) -> list[View]:
    """The first arm compared with all others, in sentences."""
    name, group = list(_groups(summary))[-1]
    pairs = group["pairs"]
    return [_sentence(name, pair) for pair in pairs if pair["a"] == pairs[0]["a"]]


def _sentence(name: str, pair: Mapping[str, Any]) -> View:
    a, b = shown(pair["a"]), shown(pair["b"])
    between = f"{points(pair['low'])} to {points(pair['high'])}"
    if pair["low"] is None:
        text = f"{a} against {b} on {name}: {points(pair['diff'])} points; one video says nothing about others"
    elif pair["verdict"] == "not resolved":
        least = percent(pair["minimum_detectable"])
        text = (
            f"{a} against {b} on {name}: {points(pair['diff'])} points ({between}); "
            f"differences from about {least} points would show here"
        )
    else:
        more = "more" if pair["verdict"] == "gain" else "less"
        text = f"{a} scores {percent(abs(pair['diff']))} points {more} than {b} on {name} (95 % interval {between})"
    return {"verdict": pair["verdict"], "text": text}


def _accuracy(name: str, group: Mapping[str, Any], arms: Sequence[Arm]) -> View:
    entries = group["arms"] | group["probes"]
    return {
        "name": name,
        "n": group["n"],
        "clusters": group["clusters"],
        "chance": group["chance"],
        "rules": group.get("rules"),
        "rows": [
            {"label": arm.label, **entries[arm.label], "plot": _accuracy_plot(arm, entries[arm.label], group["chance"])}
            for arm in arms
            if arm.label in entries
        ],
    }


def _accuracy_plot(arm: Arm, entry: Mapping[str, Any], chance: float) -> Markup:
    mark, kind = MARKS.get(arm.role, ("diamond", "tuned") if arm.name.startswith("tuned") else ("circle", "plain"))
    scale = figures.accuracy_scale()
    return figures.interval_row(
        scale, entry["strict"], entry["strict_interval"], mark=mark, kind=kind, reference=chance
    )


def _percent_axis() -> Markup:
    scale = figures.accuracy_scale()
    return figures.axis_row({tick: f"{100 * tick:.0f} %" for tick in scale.ticks}, scale)


def _differences(summary: Mapping[str, Any]) -> View:
    """The forest of all pairs on one scale, and each pair by kind of question on a scale of its own."""
    groups = list(_groups(summary))
    scale = _scale([pair for _, group in groups for pair in group["pairs"]])
    forest: dict[tuple[str, str], list[View]] = {}
    kinds: dict[tuple[str, str], list[tuple[str, View]]] = {}
    for name, group in groups:
        for pair in group["pairs"]:
            key = pair["a"], pair["b"]
            plot = _difference_plot(pair, scale, pair["verdict"].replace(" ", "-"))
            forest.setdefault(key, []).append({"name": name, **pair, "plot": plot})
            if group is not summary["pooled"]:
                kinds.setdefault(key, []).append((name if len(groups) > 1 else "", pair["kinds"]))
    return {
        "axis": _points_axis(scale),
        "pairs": [{"a": shown(a), "b": shown(b), "rows": rows} for (a, b), rows in forest.items()],
        "kinds": [{"a": shown(a), "b": shown(b), **_difference_by_kind(named)} for (a, b), named in kinds.items()],
    }


def _difference_by_kind(named: Sequence[tuple[str, Mapping[str, View]]]) -> View:
    """One part for each benchmark and axis, all on one scale."""
    scale = _scale([numbers for _, kinds in named for numbers in kinds.values()])
    parts = [
        {
            "name": name,
            "by": view["axis"],
            "rows": [
                {"name": one["label"], **numbers, "plot": _difference_plot(numbers, scale, "plain")}
                for one in view["kinds"]
                if (numbers := kinds[one["key"]])
            ],
        }
        for name, kinds in named
        for view in _by_axis(list(kinds))
    ]
    return {"axis": _points_axis(scale), "parts": parts}


def _scale(pairs: Sequence[Mapping[str, Any]]) -> Scale:
    bounds = [pair[key] for pair in pairs for key in ("low", "high", "diff")]
    return figures.difference_scale([bound for bound in bounds if bound is not None])


def _points_axis(scale: Scale) -> Markup:
    return figures.axis_row({tick: points(tick).replace(".0", "") for tick in scale.ticks}, scale)


def _difference_plot(pair: Mapping[str, Any], scale: Scale, kind: str) -> Markup:
    return figures.interval_row(scale, pair["diff"], (pair["low"], pair["high"]), kind=kind, reference=0.0)


def _kinds(name: str, group: Mapping[str, Any], arms: Sequence[Arm]) -> View:
    """Every kind of question, by axis."""
    axes = [
        {
            "axis": view["axis"],
            "kinds": [
                _kind(one["label"], one["key"], group["kinds"][one["key"]], group["arms"], arms)
                for one in view["kinds"]
            ],
        }
        for view in _by_axis(list(group["kinds"]))
    ]
    return {"name": name, "axes": axes}


def _probes(name: str, group: Mapping[str, Any], arms: Sequence[Arm]) -> View:
    """Probes beside full memory, which has the whole input."""
    entries = group["arms"] | group["probes"]
    few = [arm for arm in arms if arm.role == "probe"] + [arm for arm in arms if arm.name == "full_memory"][:1]
    first = _by_axis(list(group["kinds"]))[:1]
    kinds = [(one["label"], one["key"]) for view in first for one in view["kinds"]]
    return {
        "name": name,
        "kinds": [_kind(label, key, group["kinds"][key], entries, few) for label, key in kinds],
    }


def _kind(label: str, kind: str, facts: Mapping[str, Any], entries: Mapping[str, Any], arms: Sequence[Arm]) -> View:
    with_it = [arm for arm in arms if arm.label in entries and kind in entries[arm.label]["kinds"]]
    return {
        "name": label,
        **facts,
        "rows": [
            {
                "label": arm.label,
                **entries[arm.label]["kinds"][kind],
                "plot": _accuracy_plot(arm, entries[arm.label]["kinds"][kind], facts["chance"]),
            }
            for arm in with_it
        ],
    }


def _durations(name: str, group: Mapping[str, Any], arms: Sequence[Arm]) -> View | None:
    """Accuracy of the first arms by duration of the stream; None if there is only one."""
    kinds = [kind for kind in group["kinds"] if axis_of(kind) == DURATION]
    if len(kinds) < 2:
        return None
    kinds = [f"{DURATION}: {label}" for label in ordered(kind.partition(": ")[2] for kind in kinds)]
    drawn = [arm for arm in arms if arm.label in group["arms"]][: len(STYLES)]
    lines = []
    for style, arm in zip(STYLES, drawn, strict=False):
        entries = group["arms"][arm.label]["kinds"]
        found = [entries.get(kind) for kind in kinds]
        values = [None if one is None else (one["strict"], one["strict_interval"]) for one in found]
        lines.append(Points(style=style, values=values))
    places = [kind.partition(": ")[2] for kind in kinds]
    return {
        "name": name,
        "counts": [(place, group["kinds"][kind]["n"]) for place, kind in zip(places, kinds, strict=True)],
        "legend": [{"style": line.style, "label": arm.label} for line, arm in zip(lines, drawn, strict=True)],
        "left_out": len(group["arms"]) - len(drawn),
        "chart": figures.over_places(
            lines, places, x_title="duration of the stream", label=f"Accuracy on {name} against duration"
        ),
    }


def _memory(name: str, group: Mapping[str, Any]) -> View:
    return {
        "name": name,
        "rows": [{"label": label, **entry} for label, entry in (group["arms"] | group["probes"]).items()],
    }


def _costs(name: str, group: Mapping[str, Any], arms: Sequence[Arm]) -> View | None:
    """Cost of each arm; None if not measured."""
    entries = group["arms"] | group["probes"]
    costs = {arm.label: entries[arm.label]["cost"] for arm in arms if entries.get(arm.label, {}).get("cost")}
    if not costs:
        return None
    return {
        "name": name,
        "rows": [{"label": label, **cost} for label, cost in costs.items()],
        "figures": [_cost_figure(title, key, write, costs) for key, title, write in COSTS],
    }


def _cost_figure(title: str, key: str, write: Callable[[float | None], str], costs: Mapping[str, Any]) -> View:
    values = {label: None if cost[key] is None else float(cost[key]) for label, cost in costs.items()}
    scale = figures.from_zero([value for value in values.values() if value is not None])
    return {
        "title": title,
        "rows": [
            {"label": label, "value": write(value), "plot": figures.bar_row(scale, value)}
            for label, value in values.items()
        ],
    }


def _data(name: str, group: Mapping[str, Any], arms: Sequence[Arm]) -> View | None:
    """Unreadable streams, and defects of the annotations by rule."""
    lost: dict[tuple[str, str], list[str]] = {}
    for arm in arms:
        sheet = arm.sheets.get(name)
        for answer in sheet.answers.values() if sheet else ():
            if answer.failed:
                lost.setdefault((answer.id, answer.failed), []).append(shown(arm.label))
    rules: dict[str, list[Mapping[str, Any]]] = {}
    for defect in group["defects"]:
        rules.setdefault(defect["rule"], []).append(defect)
    if not lost and not rules:
        return None
    return {
        "name": name,
        "lost": [{"id": key, "reason": reason, "arms": labels} for (key, reason), labels in lost.items()],
        "rules": [{"rule": rule.replace("_", " "), "found": found} for rule, found in sorted(rules.items())],
    }


def _budgets(runs: Sequence[Run]) -> list[View]:
    """One figure for each different budget, with the runs that use it."""
    views: dict[tuple[object, ...], View] = {}
    for run in runs:
        if run.budget is None or run.budget.unlimited:
            continue
        slots = tuple((audio, visual) for audio, visual in run.budget.slots)
        key = (slots, run.budget.split)
        if key in views:
            views[key]["runs"].append(run.name)
            continue
        total, audio = run.budget.total, sum(audio for audio, _ in slots)
        views[key] = {
            "runs": [run.name],
            "split": run.budget.split,
            "slots": slots,
            "total": total,
            "audio": audio / total,
            "chart": figures.budget_bars(
                slots,
                split=run.budget.split,
                label=f"Budget by layer of {run.name}: {total:,} slots over {len(slots)} layers",
            ),
        }
    return list(views.values())


def _trace(arm: Arm, trace: Mapping[str, Any]) -> View:
    def panel(modality: str) -> View:
        kept = Kept.read(trace, modality)
        share = kept.last().mean(0)
        said = f"{shown(arm.label)}: share of {modality} tokens kept"
        weight = kept.arrived.sum()
        return {
            "modality": modality,
            "left": float((share * kept.arrived).sum() / weight) if weight else None,
            "time": figures.kept_over_time(kept, modality, label=f"{said} as the stream goes on"),
            "layers": figures.kept_by_layer(kept, modality, label=f"{said} at the end, by layer"),
        }

    return {
        "label": arm.label,
        "video": trace["video"],
        "seconds": trace["seconds"],
        "panels": [panel("visual"), panel("audio")],
    }


def _training(run: Run) -> View:
    """Loss by budget: steps with full memory and with a small budget are different tasks."""
    by_budget: dict[str, list[Mapping[str, Any]]] = {}
    for record in run.metrics:
        by_budget.setdefault(_budget_of(record), []).append(record)
    budgets = sorted(by_budget, key=lambda text: (len(text), text))
    style = {budget: STYLES[min(place, len(STYLES) - 1)] for place, budget in enumerate(budgets)}
    lines = [(style[budget], *_series(by_budget[budget], "loss")) for budget in budgets]
    lines = [line for line in lines if line[1]]
    # Full memory selects nothing, so its steps have no temperature.
    steps, temperature = _series([one for one in run.metrics if _budget_of(one) != FULL], "temperature")
    return {
        "run": run.name,
        "steps": len(run.metrics),
        "legend": [{"style": style[budget], "budget": budget} for budget in budgets] if len(budgets) > 1 else [],
        "loss": figures.curves(lines, height=190, x_title="step", label=f"Loss of {run.name} by step")
        if lines
        else None,
        "temperature": figures.curves(
            [("plain", steps, temperature)],
            height=80,
            x_title="step",
            label=f"Selection temperature of {run.name} by step",
        )
        if steps
        else None,
    }


def _budget_of(record: Mapping[str, Any]) -> str:
    """Budget of a line of metrics.jsonl; -1 means full memory."""
    slots = record.get("slots")
    if isinstance(slots, int | float):
        return f"{slots:,g} slots per layer" if slots > 0 else FULL
    return FULL if slots == "full" else ""


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    found = [record for record in records if isinstance(record.get(key), int | float)]
    return [float(record["step"]) for record in found], [float(record[key]) for record in found]


def _questions(arms: Sequence[Arm]) -> View:
    """All questions with all answers, compact: `o` is an index of OUTCOMES in the page's script."""
    asked: dict[tuple[str, str], Answer] = {}
    for arm in arms:
        for name, sheet in arm.sheets.items():
            for answer in sheet.answers.values():
                asked.setdefault((name, answer.id), answer)
    rows = []
    for (name, key), answer in sorted(asked.items()):
        given = [arm.sheets[name].answers.get(key) if name in arm.sheets else None for arm in arms]
        rows.append(
            {
                "b": name,
                "i": answer.id,
                "v": answer.video,
                "k": list(answer.kinds),
                "q": _cut(answer.question, LONGEST_TEXT),
                "g": answer.answer,
                "p": ["" if one is None else _cut(one.prediction or one.failed or "", LONGEST_TEXT) for one in given],
                "o": [_outcome(one) for one in given],
            }
        )
    return {
        "arms": [shown(arm.label) for arm in arms],
        "benchmarks": sorted({row["b"] for row in rows}),
        "axes": _by_axis(sorted({kind for row in rows for kind in row["k"]})),
        "rows": rows,
    }


def _outcome(answer: Answer | None) -> int:
    """0 wrong, 1 right, 2 no answer, 3 not asked, 4 not read."""
    if answer is None:
        return 3
    if answer.failed:
        return 4
    return 1 if answer.correct else 0 if answer.parsed else 2


def _by_axis(kinds: Sequence[str]) -> list[View]:
    """Kinds by their axis, the labels in the order of their axis."""
    axes: dict[str, list[str]] = {}
    for kind in kinds:
        axes.setdefault(axis_of(kind), []).append(kind)
    return [
        {"axis": axis, "kinds": [{"key": key, "label": key.removeprefix(f"{axis}: ")} for key in _in_order(axis, keys)]}
        for axis, keys in axes.items()
    ]


def _in_order(axis: str, keys: Sequence[str]) -> list[str]:
    labels = {key.removeprefix(f"{axis}: "): key for key in keys}
    return [labels[label] for label in ordered(labels)]


def _provenance(arms: Sequence[Arm]) -> View:
    """Facts common to all arms, and differing ones side by side."""
    flat = {arm.label: dict(_flatten(arm.provenance)) | {"folder": _end(arm.folder)} for arm in arms}
    keys = list(dict.fromkeys(key for facts in flat.values() for key in facts))
    same, differing = [], []
    for key in keys:
        values = [facts.get(key, UNKNOWN) for facts in flat.values()]
        if len(set(values)) == 1 and len(arms) > 1:
            same.append({"key": key, "value": values[0]})
        else:
            differing.append({"key": key, "values": values})
    return {"arms": list(flat), "same": same, "differing": differing}


def _flatten(facts: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, value in facts.items():
        name = f"{above}.{key}" if above else str(key)
        if isinstance(value, Mapping):
            yield from _flatten(value, name)
        elif value is not None:
            yield name, _short(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _end(folder: Path) -> str:
    return "/".join(folder.resolve().parts[-3:])


def _short(text: str) -> str:
    if len(text) == SHA256 and set(text) <= set("0123456789abcdef"):
        return text[:16] + "…"
    return _cut(text, LONGEST_VALUE)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[:longest] + "…"
