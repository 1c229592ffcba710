"""Accuracies over the lines of a result file: of all questions, and of each category of the benchmark."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Line = Mapping[str, Any]

DURATION = "duration"
LENGTHS = (  # seconds of stream before the question, for benchmarks without durations
    (120.0, "up to 2 min"),
    (600.0, "2 to 10 min"),
    (1800.0, "10 to 30 min"),
    (3600.0, "30 to 60 min"),
    (float("inf"), "over 60 min"),
)


def accuracy(lines: Sequence[Line]) -> dict[str, float | int]:
    """official = Σ correct / Σ counted; over all n questions: strict = Σ correct, no_answer = Σ not parsed, format =
    Σ bare.
    """
    count = len(lines)
    right, parsed, counted, bare = (
        sum(bool(line[key]) for line in lines) for key in ("correct", "parsed", "counted", "bare")
    )
    return {
        "n": count,
        "official": right / counted if counted else 0.0,
        "strict": right / count if count else 0.0,
        "no_answer": (count - parsed) / count if count else 0.0,
        "format": bare / count if count else 0.0,
    }


def breakdown(lines: Sequence[Line]) -> dict[str, dict[str, dict[str, float | int]]]:
    """The accuracy of each label of each axis; a question with several labels counts under each."""
    groups: dict[str, dict[str, list[Line]]] = {}
    for line in lines:
        for axis, labels in categories_of(line).items():
            for label in labels:
                groups.setdefault(axis, {}).setdefault(label, []).append(line)
    return {axis: {label: accuracy(found[label]) for label in ordered(found)} for axis, found in groups.items()}


def categories_of(line: Line) -> dict[str, list[str]]:
    """Labels by axis; if the benchmark has no durations, the length of the stream up to the question."""
    given = {axis: list(labels) for axis, labels in line.get("categories", {}).items()}
    seconds = line.get("stream_seconds")
    if DURATION not in given and seconds is not None:
        given[DURATION] = [next(label for most, label in LENGTHS if seconds <= most)]
    return given


def ordered(labels: Iterable[str]) -> list[str]:
    """By name; durations from short to long."""
    order = ("short", "medium", "long", *(label for _, label in LENGTHS))
    return sorted(labels, key=lambda label: (order.index(label) if label in order else len(order), label))
