"""Reads run folders and evaluation folders, and says what keeps their arms from being compared."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, final

from omnimem.budget import Budget, BudgetError

Role = Literal["rival", "reference", "probe"]

PROBES = ("blind", "vision_only", "audio_only")
REFERENCE = "full_memory"
SAME_ENTRIES = 0.001  # relative: entries are means over questions, printed with few digits
SAME_SECONDS = 0.001  # seconds of audio a question


class ComparisonError(ValueError):
    """What keeps the given folders from being compared, one line a problem."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


@final
@dataclass(frozen=True, kw_only=True)
class Answer:
    """One question as one arm answered it; `parsed` False: no answer could be read from the prediction."""

    id: str
    video: str
    kinds: tuple[str, ...]
    question: str
    answer: str
    prediction: str
    parsed: bool
    correct: bool
    prompt_sha256: str
    frames: float | None
    audio_seconds: float | None


@final
@dataclass(frozen=True, kw_only=True)
class Sheet:
    """All answers of one arm on one benchmark, by id, with what they cost."""

    answers: Mapping[str, Answer]
    peak_entries: float | None
    answer_entries: float | None
    bytes: float | None
    frames: float | None
    audio_seconds: float | None


@final
@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of answering: a model with its memory, on every benchmark it was evaluated on."""

    label: str
    name: str
    folder: Path
    sheets: Mapping[str, Sheet]
    provenance: Mapping[str, Any]
    trace: Mapping[str, Any] | None

    @property
    def title(self) -> str:
        """The label as a reader would write it."""
        return shown(self.label)

    @property
    def role(self) -> Role:
        """Probes take parts of the input away, so they are shown but never paired; the reference has no budget."""
        if self.name in PROBES:
            return "probe"
        return "reference" if REFERENCE in self.name else "rival"


@final
@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run folder says beside its answers."""

    name: str
    folder: Path
    budget: Budget | None
    metrics: tuple[Mapping[str, Any], ...]


class _Problem(ValueError):
    """One line of a ComparisonError on its way up."""


def shown(label: str) -> str:
    """The name of an arm or of a kind as a reader would write it; a run keeps its own spelling."""
    run, slash, name = label.rpartition("/")
    return f"{run} / {name.replace('_', ' ')}" if slash else name.replace("_", " ")


def read(folders: Sequence[Path]) -> tuple[list[Arm], list[Run]]:
    """All arms below the folders, each under a name of its own, and the runs they belong to.

    Raises ComparisonError with every problem found.
    """
    problems: list[str] = []
    found: dict[Path, Arm] = {}
    runs: dict[Path, Run] = {}
    for folder in folders:
        try:
            arm_folders = list(_arm_folders(folder))
        except _Problem as problem:
            problems.append(str(problem))
            continue
        for arm_folder in arm_folders:
            try:
                found[arm_folder.resolve()] = _read_arm(arm_folder)
                run_folder = _run_of(arm_folder)
                if run_folder is not None and run_folder not in runs:
                    runs[run_folder] = _read_run(run_folder)
            except _Problem as problem:
                problems.append(str(problem))
    arms = _labelled(list(found.values()))
    if not problems and all(arm.role == "probe" for arm in arms):
        problems.append(
            f"{', '.join(str(folder) for folder in folders)}: nothing to compare, since only probes "
            f"({', '.join(PROBES)}) were found; add the folder of an arm such as eval/tuned"
        )
    if problems:
        raise ComparisonError(problems)
    return arms, list(runs.values())


def differences(arms: Sequence[Arm]) -> list[str]:
    """Everything that makes the rivals unequal in input or in budget, one line each; empty when they are comparable."""
    paired = [arm for arm in arms if arm.role != "probe"]
    first, *others = paired
    lines = [line for arm in others for line in _setting_differences(first, arm)]
    lines += [line for arm in others for line in _input_differences(first, arm)]
    rivals = [arm for arm in paired if arm.role == "rival"]
    return lines + [line for arm in rivals[1:] for line in _budget_differences(rivals[0], arm)]


def _arm_folders(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise _Problem(f"{folder}: not a folder; give a run folder (runs/NAME) or one of its eval/ARM folders")
    if (folder / "summary.json").is_file() and not (folder / "eval").is_dir():
        yield folder
        return
    below = sorted(path for path in (folder / "eval").glob("*") if path.is_dir())
    if not below:
        raise _Problem(
            f"{folder}: no evaluation in it (neither summary.json nor eval/ARM/summary.json); "
            "run `python train/evaluate.py --config CONFIG` first"
        )
    yield from below


def _run_of(arm_folder: Path) -> Path | None:
    above = arm_folder.resolve().parent
    return above.parent if above.name == "eval" else None


def _labelled(arms: list[Arm]) -> list[Arm]:
    """Arms of the same name are told apart by their run folder, and by their whole path where that is not enough."""
    for label in (_run_and_name, _path):
        taken = Counter(arm.label for arm in arms)
        arms = [replace(arm, label=label(arm)) if taken[arm.label] > 1 else arm for arm in arms]
    return arms


def _run_and_name(arm: Arm) -> str:
    run = _run_of(arm.folder)
    return f"{run.name if run else arm.folder.resolve().parent.name}/{arm.name}"


def _path(arm: Arm) -> str:
    return str(arm.folder)


def _read_arm(folder: Path) -> Arm:
    path = folder / "summary.json"
    if not path.is_file():
        raise _Problem(f"{folder}: no summary.json; finish its evaluation with `python train/evaluate.py`")
    summary = _object(_parse(path, path.read_text(encoding="utf-8")), str(path))
    benchmarks = _object(summary.get("benchmarks"), f"{path} benchmarks")
    if not benchmarks:
        raise _Problem(f"{path} benchmarks: empty; evaluate the arm on a benchmark first")
    trace = folder / "trace.json"
    name = str(summary.get("arm", folder.name))
    return Arm(
        label=name,
        name=name,
        folder=folder,
        sheets={
            benchmark: _read_sheet(folder / f"{benchmark}.jsonl", _object(facts, f"{path} benchmarks.{benchmark}"))
            for benchmark, facts in benchmarks.items()
        },
        provenance=_object(summary.get("provenance", {}), f"{path} provenance"),
        trace=_read_trace(trace) if trace.is_file() else None,
    )


def _read_trace(path: Path) -> dict[str, Any]:
    trace = _object(_parse(path, path.read_text(encoding="utf-8")), str(path))
    wanted = {"video", "seconds", "bin_seconds", "chunk_ends", "arrived", "kept"}
    if wanted - trace.keys():
        raise _Problem(f"{path} {', '.join(sorted(wanted - trace.keys()))}: missing; delete the file or evaluate again")
    chunks = len(trace["chunk_ends"])
    for modality in ("audio", "visual"):
        bins, kept = len(trace["arrived"][modality]), trace["kept"][modality]
        if len(kept) != chunks or any(len(layer) != bins for layers in kept for layer in layers):
            raise _Problem(
                f"{path} kept.{modality}: does not hold {bins} bins a layer after each of {chunks} chunks; "
                "delete the file or evaluate again"
            )
    return trace


def _read_sheet(path: Path, facts: Mapping[str, Any]) -> Sheet:
    answers: dict[str, Answer] = {}
    for place, record in _json_lines(path):
        answer = _read_answer(place, record)
        if answer.id in answers:
            raise _Problem(f"{place} id: {answer.id!r} stands there twice; delete one of the two lines")
        answers[answer.id] = answer
    if not answers:
        raise _Problem(f"{path}: no answers in it; run the evaluation again")
    given = _object(facts.get("input", {}), f"{path} input")
    return Sheet(
        answers=answers,
        peak_entries=_number(facts.get("peak_entries")),
        answer_entries=_number(facts.get("answer_entries")),
        bytes=_number(facts.get("bytes")),
        frames=_number(given.get("frames")),
        audio_seconds=_number(given.get("audio_seconds")),
    )


def _read_answer(place: str, record: Mapping[str, Any]) -> Answer:
    keys = ("id", "video", "prompt_sha256", "answer", "prediction", "correct", "parsed", "kind")
    missing = [key for key in keys if key not in record]
    if missing:
        raise _Problem(f"{place} {', '.join(missing)}: missing; evaluate the arm again with this version")
    kind, prediction = record["kind"], record["prediction"]
    return Answer(
        id=str(record["id"]),
        video=str(record["video"]),
        kinds=tuple(str(one) for one in kind) if isinstance(kind, list) else (str(kind),),
        question=str(record.get("question") or ""),
        answer=str(record["answer"]),
        prediction="" if prediction is None else str(prediction),
        parsed=bool(record["parsed"]),
        correct=bool(record["correct"]) and bool(record["parsed"]),
        prompt_sha256=str(record["prompt_sha256"]),
        frames=_number(record.get("frames")),
        audio_seconds=_number(record.get("audio_seconds")),
    )


def _read_run(folder: Path) -> Run:
    budget, metrics = folder / "budget.json", folder / "metrics.jsonl"
    try:
        slots = Budget.read(budget) if budget.is_file() else None
    except BudgetError as error:
        raise _Problem(str(error)) from error
    # A resumed run repeats the steps after its last checkpoint: the later line counts.
    steps = {
        record["step"]: record for _, record in (_json_lines(metrics) if metrics.is_file() else ()) if "step" in record
    }
    return Run(name=folder.name, folder=folder, budget=slots, metrics=tuple(steps[step] for step in sorted(steps)))


def _json_lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not path.is_file():
        raise _Problem(f"{path}: missing although summary.json names it; run the evaluation again")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"{path}:{number}"
                yield place, _object(_parse(place, line), place)


def _parse(place: Path | str, text: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise _Problem(f"{place}: not JSON ({error}); mend it or write it again") from error


def _object(value: object, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Problem(f"{place}: expected a JSON object, got {json.dumps(value)[:40]}; write it again")
    return value


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _setting_differences(first: Arm, arm: Arm) -> Iterator[str]:
    a, b = arm.provenance.get("generation"), first.provenance.get("generation")
    if a is not None and b is not None and a != b:
        yield (
            f"{arm.label} and {first.label}: answers were generated with {json.dumps(a)} and {json.dumps(b)}; "
            "evaluate both with the same settings"
        )


def _input_differences(first: Arm, arm: Arm) -> Iterator[str]:
    where = f"{arm.label} and {first.label}"
    for name in sorted(set(first.sheets) | set(arm.sheets)):
        if name not in first.sheets or name not in arm.sheets:
            lacking = arm if name in first.sheets else first
            yield f"{where}: {lacking.label} was not evaluated on {name}; evaluate it there too"
            continue
        yield from _sheet_differences(f"{where}: {name}", arm.sheets[name], first.sheets[name])


def _sheet_differences(where: str, a: Sheet, b: Sheet) -> Iterator[str]:
    again = "evaluate both on the same input"
    shared = sorted(set(a.answers) & set(b.answers))
    alone = sorted(set(a.answers) ^ set(b.answers))
    if alone:
        yield (
            f"{where}: {_count(len(alone), 'question')} only one of them answered (first: {alone[0]}); "
            "finish or repeat the evaluation"
        )
    pairs = [(a.answers[key], b.answers[key]) for key in shared]
    for what, differing in (
        ("another prompt", [one.id for one, two in pairs if one.prompt_sha256 != two.prompt_sha256]),
        ("another right answer or video", [one.id for one, two in pairs if _asked(one) != _asked(two)]),
        ("another number of frames", [one.id for one, two in pairs if _differ(one.frames, two.frames, 0.0)]),
        (
            "other seconds of audio",
            [one.id for one, two in pairs if _differ(one.audio_seconds, two.audio_seconds, SAME_SECONDS)],
        ),
    ):
        if differing:
            verb = "has" if len(differing) == 1 else "have"
            yield f"{where}: {_count(len(differing), 'question')} {verb} {what} (first: {differing[0]}); {again}"
    if _differ(a.frames, b.frames, 0.0):
        yield f"{where}: {a.frames:g} and {b.frames:g} frames were seen; {again}"
    if _differ(a.audio_seconds, b.audio_seconds, SAME_SECONDS * len(shared)):
        yield f"{where}: {a.audio_seconds:g} and {b.audio_seconds:g} seconds of audio were heard; {again}"


def _budget_differences(first: Arm, arm: Arm) -> Iterator[str]:
    for name in sorted(set(first.sheets) & set(arm.sheets)):
        a, b = arm.sheets[name], first.sheets[name]
        for what, one, two in (
            ("peak entries", a.peak_entries, b.peak_entries),
            ("entries at answer time", a.answer_entries, b.answer_entries),
        ):
            if one is not None and two is not None and _differ(one, two, SAME_ENTRIES * max(one, two)):
                yield (
                    f"{arm.label} and {first.label}: {name}: {what} are {one:g} and {two:g}, not the same budget; "
                    "evaluate both with the same memory.slots_per_layer and budget"
                )


def _asked(answer: Answer) -> tuple[str, str]:
    return answer.answer, answer.video


def _differ(a: float | None, b: float | None, tolerance: float) -> bool:
    return a is not None and b is not None and abs(a - b) > tolerance


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
