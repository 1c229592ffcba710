"""compare/summary.json and its CSV files: all numbers of a comparison; the report shows them."""

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omnimem.comparison import statistics
from omnimem.comparison.load import KIND, PROBES, Answer, Arm, Sheet, axis_of
from omnimem.comparison.statistics import Estimate, Resampling
from omnimem.errors import counted

DIGITS = 6
SHOWN = ("full_memory", "tuned_full_memory", "training_free", "tuned", "*", *PROBES)  # * stands for all others
PAIRED = ("tuned", "training_free", "*", "tuned_full_memory", "full_memory")
SAME_BYTES = 0.01  # relative
SPLIT = ("tokens_in", "kept")  # by modality

Key = tuple[str, str]  # benchmark, question id
Answers = Mapping[Key, Answer]


def in_order(arms: Sequence[Arm]) -> list[Arm]:
    """Arms in the order of all tables: full memory, training-free, tuned, others by name, then the probes."""
    return sorted(arms, key=lambda arm: (_place(arm, SHOWN), arm.label))


def summarise(arms: Sequence[Arm], *, draws: int, seed: int, warnings: Sequence[str]) -> dict[str, Any]:
    """Accuracies, paired differences and their intervals: per benchmark, and pooled over all questions of all of them.

    Accuracy `official` counts parsed answers only, `strict` counts a missing answer as wrong; differences are strict,
    over the questions that both arms were asked. Videos of the same name in two benchmarks count as one video.
    """
    # 1. accuracies and differences of each benchmark
    arms = in_order(arms)
    names = sorted({name for arm in arms for name, sheet in arm.sheets.items() if sheet.answers})
    benchmarks = {name: _group(arms, (name,), draws=draws, seed=seed) for name in names}
    _adjust(list(benchmarks.values()))
    # 2. costs, rules and defects
    for name, group in benchmarks.items():
        for entry in (group["arms"], group["probes"]):
            for arm in arms:
                if arm.label in entry:
                    entry[arm.label] |= _cost(arm.sheets[name])
        sheets = [arm.sheets[name] for arm in arms if name in arm.sheets]
        group["rules"] = next((sheet.rules for sheet in sheets if sheet.rules), None)
        group["defects"] = _defects(sheets)
        group["left_out"] = {
            arm.label: dict(Counter(arm.sheets[name].left_out.values()))
            for arm in arms
            if name in arm.sheets and arm.sheets[name].left_out
        }
        beyond = {arm.label: arm.sheets[name].beyond_trained for arm in arms if name in arm.sheets}
        group["beyond_trained"] = {label: count for label, count in beyond.items() if count}
    # 3. all benchmarks pooled
    pooled = _group(arms, tuple(names), draws=draws, seed=seed)
    _adjust([pooled])
    return {
        "benchmarks": benchmarks,
        "pooled": pooled,
        "settings": {"draws": draws, "seed": seed, "confidence": statistics.CONFIDENCE, "power": statistics.POWER},
        "different": list(warnings),
        "notes": _notes(arms),
    }


def arm_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each benchmark, arm and kind (`all` first), as in arms.csv."""
    return [
        {"benchmark": name, "arm": arm, "kind": kind, **_flat(numbers)}
        for name, group in groups(summary)
        for arm, entry in (group["arms"] | group["probes"]).items()
        for kind, numbers in ({"all": entry} | entry["kinds"]).items()
    ]


def pair_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each benchmark, pair and kind (`all` first), as in pairs.csv."""
    return [
        {"benchmark": name, "a": pair["a"], "b": pair["b"], "kind": kind, **_flat(numbers)}
        for name, group in groups(summary)
        for pair in group["pairs"]
        for kind, numbers in ({"all": pair} | pair["kinds"]).items()
    ]


FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # first characters of what a spreadsheet computes


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows under the union of their columns; an unknown number is an empty field."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows({column: _cell(value) for column, value in row.items()} for row in rows)


def _cell(value: Any) -> Any:
    """The value, with an apostrophe before text that a spreadsheet would run as a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def groups(summary: Mapping[str, Any], pooled: str = "pooled") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each benchmark of a summary, and all of them pooled under the given name if there are several."""
    yield from summary["benchmarks"].items()
    if len(summary["benchmarks"]) > 1:
        yield pooled, summary["pooled"]


def pairs(arms: Sequence[Arm]) -> Iterator[tuple[Arm, Arm]]:
    """Every two arms that may be paired: tuned before training-free before the controls before full memory."""
    paired = [arm for arm in in_order(arms) if arm.role != "probe"]
    paired.sort(key=lambda arm: _place(arm, PAIRED))
    for place, a in enumerate(paired):
        for b in paired[place + 1 :]:
            yield a, b


def chance(answers: Sequence[Answer]) -> float:
    """Mean over questions of 1 / options; without options 1 / (different right answers among questions of its kind)."""
    right: dict[tuple[str, ...], set[str]] = {}
    for answer in answers:
        right.setdefault(_kind_of(answer), set()).add(answer.answer)
    return float(np.mean([1 / (answer.options or len(right[_kind_of(answer)])) for answer in answers]))


def _kind_of(answer: Answer) -> tuple[str, ...]:
    return tuple(kind for kind in answer.kinds if axis_of(kind) == KIND)


def _place(arm: Arm, names: Sequence[str]) -> int:
    kind = arm.name.partition("@")[0]  # tuned@checkpoint-80
    return names.index(kind if kind in names else "*")


def _group(arms: Sequence[Arm], names: Sequence[str], *, draws: int, seed: int) -> dict[str, Any]:
    # 1. answers by arm, and all questions
    sheets = {
        arm.label: {(name, key): sheet.answers[key] for name, sheet in given for key in sorted(sheet.answers)}
        for arm in arms
        if (given := [(name, arm.sheets[name]) for name in names if name in arm.sheets and arm.sheets[name].answers])
    }
    asked = {key: answer for sheet in sheets.values() for key, answer in sheet.items()}
    resampling = statistics.resample([answer.video for answer in asked.values()], draws=draws, seed=seed)
    # 2. accuracies
    of_kinds = {kind: list(_of_kind(asked, kind).values()) for kind in _kinds(asked.values())}
    probes = {arm.label for arm in arms if arm.role == "probe"}
    accuracy = {label: _arm(resampling, sheet) for label, sheet in sheets.items()}
    return {
        "n": len(asked),
        "clusters": len(resampling.videos),
        "chance": round(chance(list(asked.values())), DIGITS),
        "kinds": {
            kind: {"n": len(answers), "chance": round(chance(answers), DIGITS)} for kind, answers in of_kinds.items()
        },
        "arms": {label: entry for label, entry in accuracy.items() if label not in probes},
        "probes": {label: entry for label, entry in accuracy.items() if label in probes},
        "pairs": [
            _pair(resampling, a.label, b.label, sheets[a.label], sheets[b.label])
            for a, b in pairs(arms)
            if a.label in sheets and b.label in sheets and set(sheets[a.label]) & set(sheets[b.label])
        ],
    }


def _of_kind(answers: Answers, kind: str) -> Answers:
    return {key: answer for key, answer in answers.items() if kind in answer.kinds}


def _kinds(answers: Iterable[Answer]) -> list[str]:
    return sorted({kind for answer in answers for kind in answer.kinds})


def _arm(resampling: Resampling, answers: Answers) -> dict[str, Any]:
    kinds = {kind: _accuracy(resampling, list(_of_kind(answers, kind).values())) for kind in _kinds(answers.values())}
    return _accuracy(resampling, list(answers.values())) | {"kinds": kinds}


def _accuracy(resampling: Resampling, answers: Sequence[Answer]) -> dict[str, Any]:
    # 1. estimates
    videos = [answer.video for answer in answers]
    correct = np.array([answer.correct for answer in answers], dtype=np.float64)
    counted = np.array([answer.counted for answer in answers], dtype=np.float64)
    official = statistics.ratio(resampling, videos, correct * counted, counted, lowest=0.0)
    strict = statistics.ratio(resampling, videos, correct, np.ones_like(correct), lowest=0.0)
    # 2. numbers
    return {
        "n": len(answers),
        "clusters": strict.clusters,
        "official": _rounded(official.value),
        "official_interval": _bounds(official),
        "strict": _rounded(strict.value),
        "strict_interval": _bounds(strict),
        "no_answer": _rounded(float(np.mean([not answer.parsed for answer in answers]))),
        "format": _rounded(float(np.mean([answer.bare for answer in answers]))),
        "failed": sum(answer.failed is not None for answer in answers),
    }


def _pair(resampling: Resampling, a: str, b: str, of_a: Answers, of_b: Answers) -> dict[str, Any]:
    two = [(of_a[key], of_b[key]) for key in of_a if key in of_b]
    by_kind = {
        kind: _difference(resampling, [pair for pair in two if kind in pair[0].kinds])
        for kind in _kinds(one for one, _ in two)
    }
    return {"a": a, "b": b} | _difference(resampling, two) | {"kinds": by_kind}


def _difference(resampling: Resampling, two: Sequence[tuple[Answer, Answer]]) -> dict[str, Any]:
    # 1. estimate
    a = np.array([one.correct for one, _ in two], dtype=np.bool_)
    b = np.array([other.correct for _, other in two], dtype=np.bool_)
    difference = a.astype(np.float64) - b.astype(np.float64)
    videos = [one.video for one, _ in two]
    found = statistics.ratio(resampling, videos, difference, np.ones_like(difference), lowest=-1.0)
    # 2. numbers
    return {
        "n": len(two),
        "clusters": found.clusters,
        "diff": _rounded(found.value),
        "low": _rounded(found.low),
        "high": _rounded(found.high),
        "a_only": int(np.count_nonzero(a & ~b)),
        "b_only": int(np.count_nonzero(b & ~a)),
        "p": _rounded(found.p),
        "p_mcnemar": _rounded(statistics.mcnemar_exact(a, b)),
        "minimum_detectable": _rounded(statistics.minimum_detectable(found.error, found.clusters)),
    }


def _adjust(groups: Sequence[dict[str, Any]]) -> None:
    """Add `p_holm` and `verdict` to every pair; Holm's family is one pair of arms over all benchmarks."""
    families: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for group in groups:
        for pair in group["pairs"]:
            families.setdefault((pair["a"], pair["b"]), []).append(pair)
    for family in families.values():
        raw = np.array([math.nan if pair["p"] is None else pair["p"] for pair in family], dtype=np.float64)
        for pair, adjusted in zip(family, statistics.holm(raw), strict=True):
            low, high = (math.nan if pair[bound] is None else pair[bound] for bound in ("low", "high"))
            pair["p_holm"] = _rounded(float(adjusted))
            pair["verdict"] = statistics.verdict(low, high, float(adjusted))


def _cost(sheet: Sheet) -> dict[str, Any]:
    return {
        "peak_entries": sheet.peak_entries,
        "answer_entries": sheet.answer_entries,
        "text_entries": sheet.text_entries,
        "bytes": sheet.bytes,
        "frames": sheet.frames,
        "audio_seconds": sheet.audio_seconds,
        "cost": dict(sheet.cost) or None,
    }


def _defects(sheets: Sequence[Sheet]) -> list[dict[str, Any]]:
    """Defects of all arms, each once: they concern the data."""
    found = {json.dumps(dict(defect), sort_keys=True): dict(defect) for sheet in sheets for defect in sheet.defects}
    return list(found.values())


def _notes(arms: Sequence[Arm]) -> list[str]:
    """Notes on questions left out, or asked beyond the trained positions, and on unequal bytes at equal entries."""
    notes = [
        f"{name}: {arm.title} leaves out {counted(count, 'question')} ({reason.replace('_', ' ')}), which are in none "
        "of its accuracies; differences are over the questions that both arms answered"
        for arm in arms
        for name, sheet in sorted(arm.sheets.items())
        for reason, count in Counter(sheet.left_out.values()).items()
    ]
    notes += [
        f"{name}: {arm.title} answers {counted(sheet.beyond_trained, 'question')} beyond the positions that the model "
        "was trained on; see stream.positions"
        for arm in arms
        for name, sheet in sorted(arm.sheets.items())
        if sheet.beyond_trained
    ]
    budgeted = [arm for arm in arms if arm.role == "budgeted"]
    for name in sorted({name for arm in budgeted for name in arm.sheets}):
        of_arms = {arm.title: arm.sheets[name].bytes for arm in budgeted if name in arm.sheets}
        sizes = {title: size for title, size in of_arms.items() if size is not None}
        if sizes and max(sizes.values()) > (1 + SAME_BYTES) * min(sizes.values()):
            most, least = max(sizes, key=lambda title: sizes[title]), min(sizes, key=lambda title: sizes[title])
            more = 100 * (sizes[most] / sizes[least] - 1)
            notes.append(f"{name}: {most} holds {more:.1f} % more bytes than {least} at the same entries")
    return notes


def _flat(numbers: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in numbers.items():
        if isinstance(value, list):
            flat |= {key.replace("interval", "low"): value[0], key.replace("interval", "high"): value[1]}
        elif isinstance(value, Mapping) and key != "kinds":
            flat |= {f"{key}_{name}" if key in SPLIT else name: one for name, one in _flat(value).items()}
        elif key not in ("kinds", "a", "b"):
            flat[key] = value
    return flat


def _bounds(estimate: Estimate) -> list[float | None]:
    return [_rounded(estimate.low), _rounded(estimate.high)]


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, DIGITS)
