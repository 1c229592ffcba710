"""eval/<arm>/summary.json: accuracies and costs of an arm on a benchmark."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from omnimem.evaluation.left_out import counts, is_left_out
from omnimem.tasks import Defect
from omnimem.tasks.accuracy import Line, accuracy, breakdown


def summarise(lines: Sequence[Line], *, defects: Sequence[Defect] = ()) -> dict[str, Any]:
    """`official` over counted answers, `strict` over all questions; entries, bytes and costs over answered ones.

    Questions that the arm cannot answer (`left_out`) are in none of them.
    """
    # 1. answered questions and their streams
    left = [line for line in lines if is_left_out(line)]
    lines = [line for line in lines if not is_left_out(line)]
    answered = [line for line in lines if not line.get("failed")]
    kinds = sorted({str(line["kind"]) for line in lines})
    inputs = hashlib.sha256("".join(sorted(str(line["prompt_sha256"]) for line in lines)).encode()).hexdigest()
    streams = _streams(answered)
    # 2. accuracies, memory and input
    return {
        **accuracy(lines),
        "kinds": {kind: accuracy([line for line in lines if str(line["kind"]) == kind]) for kind in kinds},
        "categories": breakdown(lines),
        "peak_entries": _mean(answered, "peak_entries"),
        "answer_entries": _mean(answered, "entries"),
        "text_entries": _mean([line for line in answered if "text_entries" in line], "text_entries"),
        "bytes": _mean(answered, "bytes"),
        "input": {
            "frames": sum(int(line["frames"]) for line in streams),
            "audio_seconds": round(sum(float(line["audio_seconds"]) for line in streams), 3),
            "tracks": dict(Counter(str(line["tracks"]) for line in streams)),
            "prompt_sha256": inputs,
        },
        "cost": _cost(answered, streams),
        "failed": dict(Counter(str(line["failed"]) for line in lines if line.get("failed"))),
        "left_out": counts(left),
        "beyond_trained": _beyond_trained(answered),
        "defects": [vars(defect) for defect in [*defects, *_late(answered)]],
    }


def _streams(lines: Sequence[Line]) -> list[Line]:
    """The last line of each stream, which covers all that was read of it."""
    last: dict[str, Line] = {}
    for line in lines:
        if line["stream"] not in last or line["stream_seconds"] >= last[line["stream"]]["stream_seconds"]:
            last[line["stream"]] = line
    return list(last.values())


def _late(lines: Sequence[Line]) -> list[Defect]:
    return [Defect(rule="time_stamp", where=line["id"], what=line["late"]) for line in lines if line.get("late")]


def _beyond_trained(lines: Sequence[Line]) -> dict[str, int]:
    """Questions asked beyond the positions that the model was trained on (`positions: original`)."""
    found = [line for line in lines if line.get("beyond_trained")]
    return {
        "questions": len(found),
        "streams": len({line["stream"] for line in found}),
        "reached": max((int(line["beyond_trained"]) for line in found), default=0),
    }


def _cost(lines: Sequence[Line], streams: Sequence[Line]) -> dict[str, Any]:
    """Tokens and seconds per stream; wall seconds per second of stream."""
    # 1. totals
    length = sum(float(line["stream_seconds"]) for line in streams)
    peaks = [line["peak_memory"] for line in lines if line["peak_memory"] is not None]

    def mean(rows: Sequence[Line], group: str, key: str) -> float:
        return fmean(float(row[group][key]) for row in rows) if rows else 0.0

    def per_second(key: str) -> float | None:
        return sum(float(line["seconds"][key]) for line in streams) / length if length else None

    # 2. means
    return {
        "streams": len(streams),
        "stream_seconds": round(length, 3),
        "tokens_in": {kind: mean(streams, "tokens_in", kind) for kind in ("audio", "visual")},
        "kept": {kind: mean(lines, "kept", kind) for kind in ("audio", "visual")},
        "media_per_second": per_second("media"),
        "reading_per_second": per_second("reading"),
        "first_token_seconds": mean(lines, "seconds", "first_token"),
        "answer_seconds": mean(lines, "seconds", "answer"),
        "peak_memory": max(peaks) if peaks else None,
    }


def _mean(lines: Sequence[Line], key: str) -> float:
    return fmean(float(line[key]) for line in lines) if lines else 0.0
