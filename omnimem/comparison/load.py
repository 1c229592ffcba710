"""Read run folders and evaluation folders."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, final

from pydantic import Field, FiniteFloat, NonNegativeInt
from typing_extensions import TypedDict

from omnimem.budget import Budget, BudgetError
from omnimem.comparison.formatting import shown
from omnimem.errors import ProblemList, counted
from omnimem.evaluation.left_out import is_left_out
from omnimem.limits import read_within
from omnimem.tasks.accuracy import DURATION, categories_of
from omnimem.textfile import StoredFileError, of_shape, parse_stored, read_stored

Role = Literal["budgeted", "reference", "probe"]

PROBES = ("blind", "vision_only", "audio_only", "text_only", "tuned_text_only")
REFERENCE = "full_memory"
AGAIN = "evaluate the arm again, or leave it out"
KIND = "kind"  # the axis whose labels have no prefix
MEASURES = ("frames", "audio_seconds", "stream_seconds", "peak_entries", "entries")


class ComparisonError(ProblemList):
    """The folders cannot be compared; one line per problem."""


@final
@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer of one arm to one question; `parsed` False: no answer was found in the prediction."""

    id: str
    video: str
    kinds: tuple[str, ...]  # categories: a kind, or `axis: label`
    question: str
    options: int  # of a multiple choice; 0: open answer
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
    stream_seconds: float | None  # of the stream read so far
    peak_entries: float | None
    entries: float | None


@final
@dataclass(frozen=True, kw_only=True)
class Sheet:
    """All answers of one arm on one benchmark, by id, with their cost."""

    answers: Mapping[str, Answer]
    peak_entries: float | None
    answer_entries: float | None
    text_entries: float | None  # text kept per layer, beyond the budget
    bytes: float | None
    frames: float | None
    audio_seconds: float | None
    cost: Mapping[str, Any]  # tokens, seconds, memory (omnimem.evaluation.summary)
    defects: Sequence[Mapping[str, Any]]
    rules: str | None
    left_out: Mapping[str, str] = field(default_factory=dict)  # questions that the arm cannot answer: id to reason
    beyond_trained: int = 0  # questions asked beyond the positions that the model was trained on


@final
@dataclass(frozen=True, kw_only=True)
class Arm:
    """A model with its memory, on every benchmark it was evaluated on."""

    label: str
    name: str
    folder: Path
    sheets: Mapping[str, Sheet]
    provenance: Mapping[str, Any]
    trace: Mapping[str, Any] | None

    @property
    def title(self) -> str:
        """The label as text."""
        return shown(self.label)

    @property
    def role(self) -> Role:
        """Probes lack parts of the input: they are shown, but not paired. The reference has no budget."""
        if self.name in PROBES:
            return "probe"
        return "reference" if REFERENCE in self.name else "budgeted"


@final
@dataclass(frozen=True, kw_only=True)
class Run:
    """Budget and training log of a run folder."""

    name: str
    budget: Budget | None
    metrics: tuple[Mapping[str, Any], ...]


class TokenMeans(TypedDict):
    """Mean tokens of each modality."""

    audio: FiniteFloat
    visual: FiniteFloat


class Cost(TypedDict):
    """Costs of an arm in summary.json."""

    streams: FiniteFloat
    stream_seconds: FiniteFloat
    tokens_in: TokenMeans
    kept: TokenMeans
    media_per_second: FiniteFloat | None
    reading_per_second: FiniteFloat | None
    first_token_seconds: FiniteFloat | None
    answer_seconds: FiniteFloat | None
    peak_memory: FiniteFloat | None


class DefectEntry(TypedDict):
    """A defect of the annotations (`omnimem.tasks.Defect`)."""

    rule: str
    where: str
    what: str


class Facts(TypedDict, total=False):
    """The entry of a benchmark in summary.json."""

    input: dict[str, Any]
    cost: Cost
    defects: list[DefectEntry]
    rules: str | None


class Summary(TypedDict):
    """summary.json of an arm."""

    arm: NotRequired[str]
    benchmarks: dict[str, Facts]
    provenance: NotRequired[dict[str, Any]]


class ComparedLine(TypedDict):
    """The keys of a result line that are compared."""

    kind: str | list[str] | None
    correct: bool
    parsed: bool
    question: NotRequired[str | None]
    options: NotRequired[int]
    categories: NotRequired[dict[str, list[str]]]
    failed: NotRequired[str | None]


class Step(TypedDict):
    """The keys of a line of metrics.jsonl that the report shows."""

    step: int
    loss: NotRequired[FiniteFloat | None]
    temperature: NotRequired[FiniteFloat | None]
    validation: NotRequired[dict[str, FiniteFloat | None]]


Some = Field(min_length=1)
Bins = Annotated[list[NonNegativeInt], Some]
Positive = Annotated[FiniteFloat, Field(gt=0)]


class Arrived(TypedDict):
    """Tokens by bin."""

    audio: Bins
    visual: Bins


class Kept(TypedDict):
    """Tokens by chunk, layer and bin."""

    audio: list[Annotated[list[list[NonNegativeInt]], Some]]
    visual: list[Annotated[list[list[NonNegativeInt]], Some]]


class Trace(TypedDict):
    """trace.json (omnimem.evaluation.trace)."""

    video: str
    seconds: Positive
    bin_seconds: Positive
    chunk_ends: Annotated[list[FiniteFloat], Some]
    arrived: Arrived
    kept: Kept


class _Problem(ValueError):
    """One line of a ComparisonError."""


def read(folders: Sequence[Path]) -> tuple[list[Arm], list[Run]]:
    """All arms of the folders with unique labels, and their runs.

    Raises ComparisonError with every problem found.
    """
    # 1. read all folders, collecting problems
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
            except (_Problem, StoredFileError) as problem:
                problems.append(str(problem))
    # 2. label the arms, or report the problems
    arms = _with_durations(_labelled(list(found.values())))
    if not problems and all(arm.role == "probe" for arm in arms):
        problems.append(
            f"{', '.join(str(folder) for folder in folders)}: nothing to compare, since only probes "
            f"({', '.join(PROBES)}) were found; add the folder of an arm such as eval/tuned"
        )
    if problems:
        raise ComparisonError(problems)
    return arms, list(runs.values())


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
            "run `omnimem evaluate --config CONFIG` first"
        )
    yield from below


def _run_of(arm_folder: Path) -> Path | None:
    above = arm_folder.resolve().parent
    return above.parent if above.name == "eval" else None


def _labelled(arms: list[Arm]) -> list[Arm]:
    """Arms with the same name are labelled with the name of their run folder, or with their path if that is shared."""

    def run_and_name(arm: Arm) -> str:
        run = _run_of(arm.folder)
        return f"{run.name if run else arm.folder.resolve().parent.name}/{arm.name}"

    for label in (run_and_name, lambda arm: str(arm.folder)):
        taken = Counter(arm.label for arm in arms)
        arms = [replace(arm, label=label(arm)) if taken[arm.label] > 1 else arm for arm in arms]
    return arms


def _read_arm(folder: Path) -> Arm:
    # 1. summary
    path = folder / "summary.json"
    if not path.is_file():
        raise _Problem(f"{folder}: no summary.json; finish its evaluation with `omnimem evaluate`")
    summary = read_stored(path, Summary, AGAIN)
    benchmarks = summary["benchmarks"]
    if not benchmarks:
        raise _Problem(f"{path} benchmarks: empty; evaluate the arm on a benchmark first")
    # 2. answers and trace
    trace = folder / "trace.json"
    name = str(summary.get("arm", folder.name))
    return Arm(
        label=name,
        name=name,
        folder=folder,
        sheets={
            benchmark: _read_sheet(folder / f"{benchmark}.jsonl", facts) for benchmark, facts in benchmarks.items()
        },
        provenance=summary.get("provenance", {}),
        trace=_read_trace(trace) if trace.exists() else None,
    )


def _read_trace(path: Path) -> dict[str, Any]:
    trace = read_stored(path, Trace, "delete the file or evaluate again")
    chunks = len(trace["chunk_ends"])
    for modality in ("audio", "visual"):
        bins, kept = len(trace["arrived"][modality]), trace["kept"][modality]
        sizes = {len(layers) for layers in kept}
        if len(kept) != chunks or len(sizes) > 1 or any(len(layer) != bins for layers in kept for layer in layers):
            raise _Problem(
                f"{path} kept.{modality}: does not hold {counted(bins, 'bin')} per layer after each of "
                f"{counted(chunks, 'chunk')}; delete the file or evaluate again"
            )
    return trace


def _read_sheet(path: Path, facts: Mapping[str, Any]) -> Sheet:
    # 1. answers
    answers: dict[str, Answer] = {}
    left: dict[str, str] = {}
    beyond = 0
    for place, record in _json_lines(path):
        answer = _read_answer(place, record)
        if answer.id in answers or answer.id in left:
            raise _Problem(f"{place} id: {answer.id!r} occurs twice; delete one of the two lines")
        beyond += bool(record.get("beyond_trained"))
        if answer.failed is not None and is_left_out(record):
            left[answer.id] = answer.failed
        else:
            answers[answer.id] = answer
    if not answers and not left:
        raise _Problem(f"{path}: no answers in it; run the evaluation again")
    # 2. input and cost
    given = facts.get("input", {})
    return Sheet(
        answers=answers,
        peak_entries=_number(facts.get("peak_entries")),
        answer_entries=_number(facts.get("answer_entries")),
        text_entries=_number(facts.get("text_entries")),
        bytes=_number(facts.get("bytes")),
        frames=_number(given.get("frames")),
        audio_seconds=_number(given.get("audio_seconds")),
        cost=facts.get("cost", {}),
        defects=facts.get("defects", []),
        rules=facts.get("rules"),
        left_out=left,
        beyond_trained=beyond,
    )


def _read_answer(place: str, record: Mapping[str, Any]) -> Answer:
    # 1. check the keys
    keys = ("id", "video", "prompt_sha256", "answer", "prediction", "correct", "parsed", "kind")
    missing = [key for key in keys if key not in record]
    if missing:
        raise _Problem(f"{place} {', '.join(missing)}: missing; evaluate the arm again with this version")
    of_shape(record, ComparedLine, place, AGAIN)
    # 2. convert the values
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
    """Categories of a question: its kinds by name, the labels of other axes as `axis: label`."""
    kind, axes = record["kind"], record.get("categories", {})
    named = [str(one) for one in [*(kind if isinstance(kind, list) else [kind]), *axes.get(KIND, ())] if one]
    kinds = [_under(KIND, name) if ": " in name else name for name in named]  # a colon would be that of an axis
    others = [_under(axis, str(label)) for axis in axes if axis != KIND for label in axes[axis]]
    return tuple(dict.fromkeys([*kinds, *others]))


def _under(axis: str, label: str) -> str:
    return f"{axis}: {label}"


def axis_of(kind: str) -> str:
    """The axis that a kind belongs to."""
    axis, colon, _ = kind.partition(": ")
    return axis if colon else KIND


def _with_durations(arms: Sequence[Arm]) -> list[Arm]:
    """Add durations where the benchmark has none; drop axes with one label.

    The duration is the longest that any arm read before the question: probes may have read nothing.
    """
    every = [(name, one) for arm in arms for name, sheet in arm.sheets.items() for one in sheet.answers.values()]
    # 1. kinds with durations, by benchmark and question
    seconds: dict[tuple[str, str], float] = {}
    for name, answer in every:
        key = name, answer.id
        seconds[key] = max(seconds.get(key, 0.0), answer.stream_seconds or 0.0)
    kinds = {(name, answer.id): _with_duration(answer, seconds[name, answer.id]) for name, answer in every}
    # 2. axes with several labels
    different = {(name, kind) for (name, _), found in kinds.items() for kind in found}
    labels = Counter((name, axis_of(kind)) for name, kind in different)
    kept = {
        (name, key): tuple(kind for kind in found if axis_of(kind) == KIND or labels[name, axis_of(kind)] > 1)
        for (name, key), found in kinds.items()
    }

    def arranged(name: str, sheet: Sheet) -> Sheet:
        answers = {key: replace(answer, kinds=kept[name, key]) for key, answer in sheet.answers.items()}
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
    # A resumed run repeats the steps after its last checkpoint: the later line counts. A validation has its own line.
    steps: dict[int, dict[str, Any]] = {}
    for place, record in _json_lines(metrics) if metrics.is_file() else ():
        if "step" in record:
            step = of_shape(record, Step, place, "delete the line")["step"]
            steps[step] = {**steps.get(step, {}), **record}
    return Run(name=folder.name, budget=slots, metrics=tuple(steps[step] for step in sorted(steps)))


def _json_lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not path.is_file():
        raise _Problem(f"{path}: missing although summary.json names it; run the evaluation again")
    for number, line in enumerate(_bytes_of(path).split(b"\n"), start=1):
        if line.strip():
            place = f"{path}:{number}"
            yield place, parse_stored(line, dict[str, Any], place, "delete the line, or evaluate again")


def _bytes_of(path: Path) -> bytes:
    try:
        return read_within(path)
    except OSError as error:
        raise _Problem(f"{path}: cannot be read ({error.strerror}); run the evaluation again") from error


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
