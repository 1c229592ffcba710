"""Evaluation and run folders for the tests of the comparison."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from omnimem.budget import Budget

KINDS = {"visual": 8, "auditory": 16, "cross_modal": 16}
SKILL = {
    "full_memory": (0.97, 0.97, 0.96),
    "tuned_full_memory": (0.97, 0.98, 0.95),
    "training_free": (0.80, 0.84, 0.71),
    "tuned": (0.89, 0.90, 0.83),
    "recency": (0.48, 0.52, 0.41),
    "blind": (1 / 8, 1 / 16, 1 / 16),
    "vision_only": (0.95, 1 / 16, 1 / 16),
    "audio_only": (1 / 8, 0.96, 1 / 16),
}
ENTRIES = {"full_memory": (598.0, 598.0), "tuned_full_memory": (598.0, 598.0), "blind": (18.0, 18.0)}


def write_arm(run: Path, arm: str, *, videos: int = 6, per_kind: int = 3, benchmark: str = "recall") -> Path:
    """An eval folder in the format of design.md; answers are a function of arm, video and question."""
    folder = run / "eval" / arm
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for video in range(videos):
        for place in range(len(KINDS) * per_kind):
            kind = list(KINDS)[place % len(KINDS)]
            draw = np.random.default_rng([video, place])  # shared by the arms: hard questions are hard for all
            hardness = 0.75 * draw.random() + 0.25 * draw.random()
            answer, missing = draw.integers(KINDS[kind]), draw.random()
            noise = np.random.default_rng([video, place, len(arm)]).random()
            skill = SKILL[arm.partition("@")[0]][place % len(KINDS)] * (1 + 0.1 * math.sin(video))
            correct = bool((noise if skill < 0.2 else 0.7 * hardness + 0.3 * noise) < skill)
            parsed = missing < 0.98 or correct
            lines.append(
                {
                    "id": f"test-{video:05d}/{place:02d}",
                    "video": f"videos/test-{video:05d}.mp4",
                    "question": f"What is the {kind} answer to question {place}? <b>&amp;</b>",
                    "prompt_sha256": hashlib.sha256(f"{video} {place}".encode()).hexdigest(),
                    "answer": f"word{answer}",
                    "prediction": f"word{answer}" if correct else f"word{(answer + 1) % KINDS[kind]}" if parsed else "",
                    "correct": correct,
                    "parsed": parsed,
                    "kind": kind,
                    "categories": {"kind": [kind], "place": ["early" if place < 5 else "late"], "all": ["same"]},
                    "counted": parsed,
                    "bare": parsed and place % 4 > 0,
                    "frames": 0 if arm == "blind" else 64,
                    "audio_seconds": 0.0 if arm == "blind" else 64.0,
                    "stream_seconds": 0.0 if arm == "blind" else 64.0 if video % 2 == 0 else 400.0,
                    "peak_entries": ENTRIES.get(arm, (146.0, 96.0))[0],
                    "entries": ENTRIES.get(arm, (146.0, 96.0))[1],
                }
            )
    write_lines(folder / f"{benchmark}.jsonl", lines)
    peak, at_answer = ENTRIES.get(arm, (146.0, 96.0))
    path = folder / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {"arm": arm, "benchmarks": {}}
    summary["provenance"] = {
        "model": {"path": "configs/models/tiny", "sha256": "a" * 64},
        "adapter": "adapter" if arm == "tuned" else None,
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "commit": "0123abc",
        "policy": {"name": "recency" if arm == "recency" else "omnimem"},
        "generation": {"greedy": True, "max_new_tokens": 16},
    }
    summary["benchmarks"][benchmark] = {
        "n": len(lines),
        "peak_entries": peak,
        "answer_entries": at_answer,
        "bytes": peak * 4 * 128 * (1.0 if arm in ("recency", "full_memory", "blind") else 1.08),
        "input": {
            "frames": videos * lines[0]["frames"],
            "audio_seconds": videos * lines[0]["audio_seconds"],
            "prompt_sha256": "b" * 64,
        },
        "cost": {
            "streams": videos,
            "stream_seconds": 64.0 * videos,
            "tokens_in": {"audio": 64.0, "visual": 512.0},
            "kept": {"audio": 8.0, "visual": at_answer - 8.0},
            "media_per_second": 0.002,
            "reading_per_second": peak * 1e-5,
            "first_token_seconds": peak * 1e-4,
            "answer_seconds": peak * 1.5e-4,
            "peak_memory": int(4e8 + peak * 1e5),
        },
        "rules": "first_word",
        "defects": [{"rule": "time_stamp", "where": "test-00000/00", "what": "asked after the end"}],
    }
    path.write_text(json.dumps(summary))
    return folder


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_trace(folder: Path, *, seconds: int = 64, layers: int = 4) -> None:
    """What a memory that favours some moments kept of a stream."""
    ends, bins = list(range(8, seconds + 1, 8)), seconds // 2
    trace: dict[str, Any] = {
        "video": "videos/test-00000.mp4",
        "seconds": float(seconds),
        "bin_seconds": 2.0,
        "chunk_ends": [float(end) for end in ends],
        "arrived": {"audio": [2] * bins, "visual": [16] * bins},
        "kept": {},
    }
    for modality, arrived in (("audio", 2), ("visual", 16)):
        favour = np.random.default_rng([arrived, len(str(folder))]).random((layers, bins)) ** 3
        favour[:, ::7] = 1
        ages = np.array(ends)[:, None] - 2 * np.arange(bins)  # of each bin at each end
        shares = np.minimum(1.0, favour + np.maximum(0, 1 - ages / 12)[:, None]) * (ages > 0)[:, None]
        trace["kept"][modality] = (arrived * shares).astype(int).tolist()
    (folder / "trace.json").write_text(json.dumps(trace))


def write_run(
    run: Path, arms: tuple[str, ...] = tuple(SKILL), *, videos: int = 6, per_kind: int = 3, steps: int = 40
) -> Path:
    """A run folder with everything a report can show."""
    for arm in arms:
        folder = write_arm(run, arm, videos=videos, per_kind=per_kind)
        if arm in ("training_free", "tuned", "recency"):
            write_trace(folder)
    Budget(slots=((8, 88), (22, 74), (30, 66), (12, 84))).write(run / "budget.json")
    noise = np.random.default_rng(0)
    rows = []
    for step in range(1, steps + 1):
        full, loss = step % 3 == 0, (0.2 + 1.3 * math.exp(-3 * step / steps)) * noise.uniform(0.7, 1.3)
        temperature = 0.0 if full else 0.05 + 0.95 * (1 - step / steps)
        rows.append({"step": step, "loss": 0.6 * loss if full else loss, "temperature": temperature})
        rows[-1]["slots"] = -1.0 if full else 96.0
    write_lines(run / "metrics.jsonl", rows)
    return run


def change(path: Path, place: int, **fields: object) -> None:
    """Overwrite fields of one line of a JSONL file."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[place] |= fields
    write_lines(path, records)
