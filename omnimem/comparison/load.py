"""Reads run folders and evaluation folders, and says what keeps their arms from being compared."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, final

from omnimem.budget import Budget, BudgetError
from omnimem.errors import ProblemList
from omnimem.tasks.accuracy import DURATION, categories_of

Role = Literal["rival", "reference", "probe"]

PROBES = ("blind", "vision_only", "audio_only")
REFERENCE = "full_memory"
KIND = "kind"  # the axis whose labels stand by themselves
MEASURES = ("frames", "audio_seconds", "stream_seconds", "peak_entries", "entries")
SAME_ENTRIES = 0.001  # relative: entries are means over questions, printed with few digits
SAME_SECONDS = 0.01  # of audio, a question
SECONDS_DIGITS = 2


class ComparisonError(ProblemList):
    """What keeps the given folders from being compared, one line a problem."""


@final
@dataclass(frozen=True, kw_only=True)
class Answer:
    """One question as one arm answered it; `parsed` False: no answer could be read from the prediction."""

    id: str
    video: str
    kinds: tuple[str, ...]  # what it is counted under: a kind, or `axis: label`
    question: str
    options: int  # of a multiple choice; 0: any word may be the answer
    answer: str
    prediction: str
    parsed: bool
    counted: bool  # in the denominator of the official accuracy
    bare: bool  # the prediction is an answer and nothing else
    correct: bool
    failed: str | None  # why its stream could not be read
    prompt_sha256: str
    frames: float | None
    audio_seconds: float | None
    stream_seconds: float | None  # of the stream that had been read
    peak_entries: float | None
    entries: float | None


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
    cost: Mapping[str, Any]  # tokens, seconds, memory (omnimem.evaluation.summary)
    defects: Sequence[Mapping[str, Any]]
    rules: str | None


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
    arms = _with_durations(_labelled(list(found.values())))
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
        cost=_object(facts.get("cost", {}), f"{path} cost"),
        defects=facts.get("defects", []),
        rules=facts.get("rules"),
    )


def _read_answer(place: str, record: Mapping[str, Any]) -> Answer:
    keys = ("id", "video", "prompt_sha256", "answer", "prediction", "correct", "parsed", "kind")
    missing = [key for key in keys if key not in record]
    if missing:
        raise _Problem(f"{place} {', '.join(missing)}: missing; evaluate the arm again with this version")
    prediction, parsed = record["prediction"], bool(record["parsed"])
    return Answer(
        id=str(record["id"]),
        video=str(record["video"]),
        kinds=_kinds(record),
        question=str(record.get("question") or ""),
        options=int(record.get("options", 0)),
        answer=str(record["answer"]),
        prediction="" if prediction is None else str(prediction),
        parsed=parsed,
        counted=bool(record.get("counted", parsed)),
        bare=bool(record.get("bare", parsed)),
        correct=bool(record["correct"]) and parsed,
        failed=record.get("failed"),
        prompt_sha256=str(record["prompt_sha256"]),
        **{key: _number(record.get(key)) for key in MEASURES},
    )


def _kinds(record: Mapping[str, Any]) -> tuple[str, ...]:
    """What a question is counted under: its kind by its name, the labels of every other axis as `axis: label`."""
    kind = record["kind"]
    named = [str(one) for one in (kind if isinstance(kind, list) else [kind]) if one]
    axes = {axis: labels for axis, labels in record.get("categories", {}).items() if axis != KIND}
    return tuple(dict.fromkeys([*named, *(_under(axis, str(label)) for axis in axes for label in axes[axis])]))


def _under(axis: str, label: str) -> str:
    return f"{axis}: {label}"


def axis_of(kind: str) -> str:
    """The axis that a kind belongs to."""
    axis, colon, _ = kind.partition(": ")
    return axis if colon else KIND


def _with_durations(arms: Sequence[Arm]) -> list[Arm]:
    """Every question also under its duration where the benchmark names none; axes that divide nothing left out.

    The duration is the longest that any arm read up to the question: probes may have read nothing.
    """
    seconds: dict[tuple[str, str], float] = {}
    for arm in arms:
        for name, sheet in arm.sheets.items():
            for answer in sheet.answers.values():
                key = name, answer.id
                seconds[key] = max(seconds.get(key, 0.0), answer.stream_seconds or 0.0)
    kinds = {
        (name, answer.id): _with_duration(answer, seconds[name, answer.id])
        for arm in arms
        for name, sheet in arm.sheets.items()
        for answer in sheet.answers.values()
    }
    divided: dict[tuple[str, str], set[str]] = {}
    for (name, _), found in kinds.items():
        for kind in found:
            divided.setdefault((name, axis_of(kind)), set()).add(kind)

    def arranged(name: str, sheet: Sheet) -> Sheet:
        answers = {}
        for key, answer in sheet.answers.items():
            kept = [k for k in kinds[name, key] if axis_of(k) == KIND or len(divided[name, axis_of(k)]) > 1]
            answers[key] = replace(answer, kinds=tuple(kept))
        return replace(sheet, answers=answers)

    return [replace(arm, sheets={name: arranged(name, sheet) for name, sheet in arm.sheets.items()}) for arm in arms]


def _with_duration(answer: Answer, seconds: float) -> tuple[str, ...]:
    if not seconds or any(axis_of(kind) == DURATION for kind in answer.kinds):
        return answer.kinds
    (label,) = categories_of({"stream_seconds": seconds})[DURATION]
    return (*answer.kinds, _under(DURATION, label))


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
    for key, what in (("generation", "answers were generated"), ("reading", "streams were read")):
        a, b = arm.provenance.get(key), first.provenance.get(key)
        if a is not None and b is not None and a != b:
            yield (
                f"{arm.label} and {first.label}: {what} with {json.dumps(a)} and {json.dumps(b)}; "
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
    for what, said in FIELDS.items():
        differing = [(one, two) for one, two in pairs if said(one) != said(two)]
        if differing:
            one, two = differing[0]
            verb = "has" if len(differing) == 1 else "have"
            yield (
                f"{where}: {_count(len(differing), 'question')} {verb} {what} "
                f"(first: {one.id}: {said(one)} and {said(two)}); {again}"
            )
    if _differ(a.frames, b.frames, 0.0):
        yield f"{where}: {a.frames:g} and {b.frames:g} frames were seen; {again}"
    if _differ(a.audio_seconds, b.audio_seconds, SAME_SECONDS * len(shared)):
        yield f"{where}: {a.audio_seconds:g} and {b.audio_seconds:g} seconds of audio were heard; {again}"


def _budget_differences(first: Arm, arm: Arm) -> Iterator[str]:
    """Means over questions, then question by question: equal means can hide unequal budgets."""
    cure = "evaluate both with the same memory.slots_per_layer and budget"
    for name in sorted(set(first.sheets) & set(arm.sheets)):
        a, b = arm.sheets[name], first.sheets[name]
        where = f"{arm.label} and {first.label}: {name}"
        for what, one, two in (
            ("peak entries", a.peak_entries, b.peak_entries),
            ("entries at answer time", a.answer_entries, b.answer_entries),
        ):
            if one is not None and two is not None and _differ(one, two, SAME_ENTRIES * max(one, two)):
                yield f"{where}: {what} are {one:g} and {two:g}, not the same budget; {cure}"
                break
        else:
            yield from (f"{where}: {line}, not the same budget; {cure}" for line in _entry_differences(a, b))


def _entry_differences(a: Sheet, b: Sheet) -> Iterator[str]:
    pairs = [(a.answers[key], b.answers[key]) for key in sorted(set(a.answers) & set(b.answers))]
    for what, entries in (
        ("peak entries", [(one.peak_entries, two.peak_entries) for one, two in pairs]),
        ("entries at answer time", [(one.entries, two.entries) for one, two in pairs]),
    ):
        differing = [
            f"{what} of {pair[0].id} are {one:g} and {two:g}"
            for pair, (one, two) in zip(pairs, entries, strict=True)
            if one is not None and two is not None and _differ(one, two, SAME_ENTRIES * max(one, two))
        ]
        yield from differing[:1]


def _differ(a: float | None, b: float | None, tolerance: float) -> bool:
    return a is not None and b is not None and abs(a - b) > tolerance


def _said(value: float | None, digits: int) -> str:
    return "unknown" if value is None else f"{value:.{digits}f}".rstrip("0").rstrip(".")


FIELDS: Mapping[str, Callable[[Answer], str]] = {
    "another prompt": lambda answer: answer.prompt_sha256[:12],
    "another right answer or video": lambda answer: f"{answer.answer!r} of {answer.video}",
    "another outcome of reading its stream": lambda answer: answer.failed or "read",
    "another number of frames": lambda answer: _said(answer.frames, 0),
    "other seconds of audio": lambda answer: _said(answer.audio_seconds, SECONDS_DIGITS),
    "another length of stream read before it": lambda answer: _said(answer.stream_seconds, SECONDS_DIGITS),
}


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
