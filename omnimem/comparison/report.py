"""compare/report.html: the summary as one self-contained page, with every question and all answers."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omnimem.comparison.formatting import UNKNOWN, shown
from omnimem.comparison.load import Answer, Arm, Run
from omnimem.comparison.report_accuracy import (
    View,
    accuracy,
    accuracy_axis,
    by_axis,
    differences,
    durations,
    kinds,
    probes,
    sentences,
)
from omnimem.comparison.report_cost import budgets, costs, data_problems, traces, training
from omnimem.comparison.summary import groups, in_order
from omnimem.comparison.template import page_template

TEMPLATE = Path(__file__).with_name("report.html")
LONGEST_TEXT = 1200  # characters shown of one question or prediction
LONGEST_VALUE = 160  # characters shown of one line of provenance
DRAWN = ("loss", "temperature", "overlap", "overlap_last")  # of a run's training; without any it has no section
SHA256 = 64  # hexadecimal digits


def render(summary: Mapping[str, Any], arms: Sequence[Arm], runs: Sequence[Run]) -> str:
    """The whole page; it needs no network, and a script only to search the questions."""
    # 1. order
    arms = in_order(arms)
    paired = [arm for arm in arms if arm.role != "probe"]
    benchmarks = summary["benchmarks"]
    named = list(groups(summary, "all benchmarks pooled"))
    # 2. sections
    return page_template(TEMPLATE).render(
        title=" and ".join(benchmarks) if len(benchmarks) < 3 else f"{len(benchmarks)} benchmarks",
        summary=summary,
        sentences=sentences(*named[-1]),
        accuracy=[accuracy(name, group, arms) for name, group in named],
        accuracy_axis=accuracy_axis(),
        differences=differences(named, list(benchmarks)),
        kinds=[view for name, group in benchmarks.items() if (view := kinds(name, group, paired))["axes"]],
        probes=[view for name, group in benchmarks.items() if (view := probes(name, group, arms))["kinds"]],
        durations=[view for name, group in benchmarks.items() if (view := durations(name, group, paired))],
        costs=[view for name, group in benchmarks.items() if (view := costs(name, group))],
        data=[view for name, group in benchmarks.items() if (view := data_problems(name, group, arms))],
        budgets=budgets(runs),
        traces=traces(arms),
        training=[view for run in runs if run.metrics and any((view := training(run))[key] for key in DRAWN)],
        questions=_questions(paired),
        provenance=_provenance(arms),
    )


def _questions(arms: Sequence[Arm]) -> View:
    """All questions with all answers, compact: `o` is an index of OUTCOMES in the page's script."""
    # 1. answers of each question, by arm
    asked: dict[tuple[str, str], dict[str, Answer]] = {}
    for arm in arms:
        for name, sheet in arm.sheets.items():
            for answer in sheet.answers.values():
                asked.setdefault((name, answer.id), {})[arm.label] = answer
    # 2. rows
    rows = []
    for (name, key), answers in sorted(asked.items()):
        answer, given = next(iter(answers.values())), [answers.get(arm.label) for arm in arms]
        rows.append(
            {
                "b": name,
                "i": key,
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
        "axes": by_axis(sorted({kind for row in rows for kind in row["k"]})),
        "rows": rows,
    }


def _outcome(answer: Answer | None) -> int:
    """0 wrong, 1 right, 2 no answer, 3 not asked, 4 not read."""
    if answer is None:
        return 3
    if answer.failed:
        return 4
    return 1 if answer.correct else 0 if answer.parsed else 2


def _provenance(arms: Sequence[Arm]) -> View:
    """Facts common to all arms, and differing ones side by side."""
    flat = [dict(_flatten(arm.provenance)) | {"folder": "/".join(arm.folder.resolve().parts[-3:])} for arm in arms]
    same, differing = [], []
    for key in dict.fromkeys(key for facts in flat for key in facts):
        values = [facts.get(key, UNKNOWN) for facts in flat]
        if len(set(values)) == 1 and len(arms) > 1:
            same.append({"key": key, "value": values[0]})
        else:
            differing.append({"key": key, "values": values})
    return {"arms": [arm.label for arm in arms], "same": same, "differing": differing}


def _flatten(facts: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, value in facts.items():
        name = f"{above}.{key}" if above else str(key)
        if isinstance(value, Mapping):
            yield from _flatten(value, name)
        elif value is not None:
            yield name, _short(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _short(text: str) -> str:
    if len(text) == SHA256 and set(text) <= set("0123456789abcdef"):
        return text[:16] + "…"
    return _cut(text, LONGEST_VALUE)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[:longest] + "…"
