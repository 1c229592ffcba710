"""Predictions of other tools, matched to the questions of a benchmark, to be judged by our rules.

lmms-eval 0.7.3: `*_samples_<task>.jsonl`, one object per line: `input` (the prompt), `filtered_resps` (the answer,
without reasoning), `target`, and the value of the task's metric: an object with `question_id` and `score` (videomme),
or true and false (lvbench). Older files hold the annotation under `doc`.
VLMEvalKit: `<model>_Video-MME*.tsv` or .xlsx with the columns `video`, `question`, `answer` and `prediction`; its
`_score` file also has `score`.
"""

import csv
import io
import math
import os.path
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final
from zipfile import ZipFile

from omnimem.absent import why_absent
from omnimem.data import Question, Sample
from omnimem.errors import counted, first_line, lacks_memory
from omnimem.extras import optional
from omnimem.limits import exceeds, limit
from omnimem.tasks.annotations import Row
from omnimem.textfile import ManifestError, got, read_objects, read_text

if TYPE_CHECKING:
    import openpyxl
else:
    openpyxl = optional("openpyxl")

SHOWN = 5  # problems
LACKING = "\ud800"  # in place of the fields that a line lacks; no text holds this half of a character


@final
@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The text of a model, and the fields that identify its question."""

    origin: str  # file:line
    text: str
    question_id: str | None = None
    video: str | None = None
    question: str | None = None
    prompt: str | None = None
    answer: str | None = None  # the right one, according to the file
    score: bool | None = None  # the tool's own verdict


def read_predictions(path: Path) -> list[Prediction]:
    """The predictions of a file, by its suffix; raises ManifestError."""
    readers = {".jsonl": _lmms_eval, ".tsv": _vlmevalkit_tsv, ".xlsx": _vlmevalkit_xlsx}
    if path.suffix not in readers:
        raise ManifestError([f"{path}: expected {', '.join(readers)}: the samples of lmms-eval or a VLMEvalKit table"])
    if not os.path.isfile(path):
        cure = why_absent(path, "give the predictions that lmms-eval or VLMEvalKit wrote")
        raise ManifestError([f"{path}: no such file; {cure}"])
    try:
        found = list(readers[path.suffix](path))
    except ManifestError:
        raise
    except Exception as error:  # openpyxl and zipfile raise many kinds for a damaged file
        if lacks_memory(error):
            raise
        what = f"{path}: cannot be read ({first_line(error)}); give the file as the tool wrote it"
        raise ManifestError([what]) from error
    if not found:
        raise ManifestError([f"{path}: holds no predictions; run the tool with --log_samples, or give another file"])
    return found


def _lmms_eval(path: Path) -> Iterator[Prediction]:
    for origin, row in read_objects(path):
        key = next((key for key in ("filtered_resps", "resps") if key in row), None)
        if key is None:
            raise ManifestError([f"{origin} filtered_resps: missing; give a samples file of lmms-eval (--log_samples)"])
        metric, doc = _metric(row), row.get("doc") or {}
        if not isinstance(doc, dict):
            raise ManifestError([f"{origin} doc: expected an object, got {got(doc)}; give the file as written"])
        yield Prediction(
            origin=origin,
            text=_response(row[key], f"{origin} {key}"),
            question_id=_text(metric.get("question_id") or doc.get("question_id") or doc.get("uid")),
            video=_text(metric.get("videoID") or doc.get("videoID")),
            question=_text(doc.get("question")),
            prompt=_text(row.get("input")),
            answer=_text(row.get("target")),
            score=_score(metric.get("score"), origin),
        )


def _response(value: Any, where: str) -> str:
    """The text of a response, at any depth of lists; null and empty lists are no text.

    Raises ManifestError when it is of another kind, or holds several texts that differ.
    """
    # 1. the leaves of the nested lists
    leaves, waiting = [], [value]
    while waiting:
        leaf = waiting.pop(0)
        if isinstance(leaf, list):
            waiting = [*leaf, *waiting]
        else:
            leaves.append("" if leaf is None else leaf)
    # 2. one text
    wrong = next((leaf for leaf in leaves if not isinstance(leaf, str)), None)
    if wrong is not None:
        raise ManifestError([f"{where}: expected text, got {got(wrong)}; give the file as written"])
    if len(set(leaves)) > 1:
        count = len(set(leaves))
        raise ManifestError([f"{where}: holds {count} different responses to one question; keep one of them"])
    return leaves[0] if leaves else ""


def _metric(row: Row) -> Row:
    """The task's metric, whose name ends with `score`, as an object."""
    for name, value in row.items():
        if name.endswith("score"):
            return value if isinstance(value, dict) else {"score": value}
    return {}


def _vlmevalkit_tsv(path: Path) -> Iterator[Prediction]:
    csv.field_size_limit(2**24)  # options and subtitles are longer than the default allows
    table = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter="\t", restval=LACKING)
    yield from _vlmevalkit(path, table.fieldnames or [], enumerate(table, start=2))


def _vlmevalkit_xlsx(path: Path) -> Iterator[Prediction]:
    with ZipFile(path) as packed:
        if what := exceeds("table_bytes", sum(each.file_size for each in packed.infolist())):
            raise ManifestError([f"{path}: unpacked, its size in bytes of {what}"])
    book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    try:
        sheet: Any = book.worksheets[0]
        for name, size in (("table_columns", sheet.max_column or 0), ("table_rows", sheet.max_row or 0)):
            if what := exceeds(name, size):
                raise ManifestError([f"{path}: the size of the table of {what}"])
        most, width = limit("table_rows"), sheet.max_column or limit("table_columns")
        rows = sheet.iter_rows(values_only=True, max_row=most + 1, max_col=width)
        header = [str(name) for name in next(rows, ())]
        yield from _vlmevalkit(
            path, header, ((n, dict(zip(header, row, strict=True))) for n, row in enumerate(rows, 2))
        )
    finally:
        book.close()


def _vlmevalkit(path: Path, header: Sequence[str], rows: Iterator[tuple[int, Row]]) -> Iterator[Prediction]:
    lacking = [name for name in ("video", "question", "answer", "prediction") if name not in header]
    if lacking:
        raise ManifestError([f"{path} {', '.join(lacking)}: no such column; give a Video-MME table of VLMEvalKit"])
    for number, row in rows:
        if what := exceeds("table_rows", number):
            raise ManifestError([f"{path}:{number}: the number of rows of {what}"])
        if None in row or LACKING in row.values():
            fields = "more" if None in row else "fewer"
            raise ManifestError(
                [f"{path}:{number}: {fields} fields than the {counted(len(header), 'column')}; give it as written"]
            )
        yield Prediction(
            origin=f"{path}:{number}",
            text=str(row["prediction"] or ""),
            question_id=_text(row.get("question_id")),
            video=_text(row["video"]),
            question=_text(row["question"]),
            answer=_text(row["answer"]),
            score=_score(row.get("score"), f"{path}:{number}"),
        )


def _text(value: Any) -> str | None:
    return None if value in (None, "") else str(value)


def _score(value: Any, origin: str) -> bool | None:
    """0 or 1 in any notation; VLMEvalKit's -1, and NaN for an empty cell, mean no verdict."""
    try:
        number = math.nan if value in (None, "") else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.inf
    if number > 0 and number != 1:
        raise ManifestError([f"{origin} score: expected 0 or 1, got {got(value)}; give the file as written"])
    return number == 1 if number >= 0 else None


# ----------------------------------------------------------------------------------------------------------- matching


@final
@dataclass(frozen=True, kw_only=True)
class Matched:
    """Predictions by the id of their question."""

    predictions: Mapping[str, Prediction]
    missing: tuple[str, ...]  # ids of questions without a prediction


def matched(samples: Sequence[Sample], predictions: Sequence[Prediction]) -> Matched:
    """Match predictions to questions: by id, else by video and question, else by prompt.

    Raises ManifestError if a prediction matches no question or several, a question has two, or right answers differ.
    """
    # 1. match each prediction
    asked = [(sample, question) for sample in samples for question in sample.questions]
    index = _QuestionIndex(asked)
    problems: list[str] = []
    found: dict[str, Prediction] = {}
    for prediction in predictions:
        questions = index.find(prediction)
        if len(questions) != 1:
            several = counted(len(questions), "question") if questions else "none of the questions"
            problems.append(f"{prediction.origin}: belongs to {several}; give the benchmark that was evaluated")
            continue
        (question,) = questions
        if prediction.answer not in (None, question.answer):
            problems.append(
                f"{prediction.origin}: the right answer to {question.item.id} is {prediction.answer} there, "
                f"{question.answer} here; use the same edition of the annotations"
            )
        if question.item.id in found:
            before = found[question.item.id].origin
            problems.append(f"{prediction.origin}: answers {question.item.id} again after {before}; keep one of them")
        found[question.item.id] = prediction
    # 2. report all problems
    if problems:
        more = [f"and {counted(len(problems) - SHOWN, 'problem')} more"] if len(problems) > SHOWN else []
        raise ManifestError([*problems[:SHOWN], *more])
    missing = tuple(question.item.id for _, question in asked if question.item.id not in found)
    return Matched(predictions=found, missing=missing)


@final
class _QuestionIndex:
    """Indexes of questions by the fields of a prediction."""

    def __init__(self, asked: Sequence[tuple[Sample, Question]]) -> None:
        self._asked = asked
        self._ids = {question.item.id: question for _, question in asked}
        self._questions: dict[tuple[str, str], list[Question]] = {}
        self._prompts: dict[str, list[Question]] = {}
        for sample, question in asked:
            self._questions.setdefault((sample.id, _plain(question.item.question)), []).append(question)
            self._prompts.setdefault(_plain(question.text), []).append(question)

    def find(self, prediction: Prediction) -> list[Question]:
        """Questions of the first index that has any."""
        if prediction.question_id in self._ids:
            return [self._ids[prediction.question_id]]
        if prediction.video and prediction.question:
            return self._questions.get((prediction.video, _plain(prediction.question)), [])
        prompt = _plain(prediction.prompt or "")
        return self._prompts.get(prompt) or [each for _, each in self._asked if _contains(prompt, each)]


def _contains(prompt: str, question: Question) -> bool:
    """Whether a prompt contains the question and its options."""
    texts = [_plain(text) for text in (question.item.question, *question.item.options)]
    return texts[0] != "" and all(text in prompt for text in texts)


def _plain(text: str) -> str:
    """Text with normalised blanks."""
    return " ".join(text.split())
