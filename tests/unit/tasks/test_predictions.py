"""Predictions of lmms-eval and VLMEvalKit: found again question by question, and judged as those tools judge them.

tests/recorded holds files that we made in their documented form; `score` in them is what their extraction gives.
"""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from openpyxl import Workbook
from support import task_layouts as layouts
from support.task_layouts import LMMS_LVBENCH, LMMS_VIDEO_MME, VLMEVALKIT

from omnimem.data import ManifestError, Question
from omnimem.tasks import Benchmark, LVBenchOptions, VideoMMEOptions
from omnimem.tasks.predictions import Matched, matched, read_predictions

COLUMNS = "video\tquestion\tanswer\tprediction"
EMPTY_ZIP = b"PK\x05\x06" + bytes(18)


@pytest.fixture(scope="module")
def video_mme(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(layouts.video_mme(tmp_path_factory.mktemp("video_mme")))


@pytest.fixture(scope="module")
def lvbench(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(layouts.lvbench(tmp_path_factory.mktemp("lvbench")))


def found_in(path: Path, benchmark: Benchmark) -> Matched:
    return matched(benchmark.samples(), read_predictions(path))


def questions(benchmark: Benchmark) -> list[Question]:
    return [question for sample in benchmark.samples() for question in sample.questions]


def as_workbook(table: Path, target: Path) -> Path:
    """A tsv as the xlsx that VLMEvalKit writes."""
    book = Workbook()
    sheet = book.worksheets[0]
    with table.open(newline="") as file:
        for row in csv.reader(file, delimiter="\t"):
            sheet.append([None if cell == "" else cell for cell in row])
    book.save(target)
    return target


def changed(path: Path, target: Path, changes: Sequence[dict[str, Any]]) -> Path:
    """A samples file with some keys of its first lines replaced."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line | (changes[number] if number < len(changes) else {}) for number, line in enumerate(lines)]
    layouts.write_lines(target, [{key: value for key, value in line.items() if value is not None} for line in lines])
    return target


@pytest.mark.parametrize("workbook", [False, True])
def test_verdicts_equal_those_of_the_tools_for_every_question(workbook, video_mme, lvbench, tmp_path) -> None:
    table = as_workbook(VLMEVALKIT, tmp_path / "model_Video-MME_score.xlsx") if workbook else VLMEVALKIT
    for path, benchmark, right in (
        (LMMS_VIDEO_MME, VideoMMEOptions(root=video_mme, rules="lmms_eval"), 5),
        (LMMS_LVBENCH, LVBenchOptions(root=lvbench, rules="lmms_eval"), 2),
        (table, VideoMMEOptions(root=video_mme, rules="vlmevalkit"), 5),
    ):
        found = found_in(path, benchmark)
        assert found.missing == ()
        verdicts = {q.item.id: benchmark.judge(q, found.predictions[q.item.id].text) for q in questions(benchmark)}
        assert {key: verdict.correct for key, verdict in verdicts.items()} == {
            key: prediction.score for key, prediction in found.predictions.items()
        }
        assert all(verdict.counted for verdict in verdicts.values())  # both divide by all questions
        assert sum(verdict.correct for verdict in verdicts.values()) == right


def test_another_rule_set_gives_another_number_for_the_same_predictions(video_mme) -> None:
    official = VideoMMEOptions(root=video_mme)
    found = found_in(LMMS_VIDEO_MME, official)
    verdicts = [official.judge(q, found.predictions[q.item.id].text) for q in questions(official)]
    assert (sum(v.correct for v in verdicts), sum(v.counted for v in verdicts)) == (4, 6)
    assert sum(bool(prediction.score) for prediction in found.predictions.values()) == 5


def test_predictions_are_found_by_prompt_where_nothing_else_is_known(lvbench) -> None:
    found = found_in(LMMS_LVBENCH, LVBenchOptions(root=lvbench))
    texts = {key: prediction.text for key, prediction in found.predictions.items()}
    assert texts == {"55": "D", "56": "B", "57": "(B)"}


def test_a_prompt_of_another_form_is_known_by_its_question_and_options(lvbench, tmp_path) -> None:
    prompt = "What year appears in the closing caption?\nA. 1636\nB. 1366\nC. 1363\nD. 1633\nThink first."
    file = changed(LMMS_LVBENCH, tmp_path / "samples.jsonl", [{}, {"input": prompt}])
    assert found_in(file, LVBenchOptions(root=lvbench)).predictions["56"].text == "B"


def test_older_samples_are_known_by_the_annotation_in_them(lvbench, tmp_path) -> None:
    changes = [{"input": None, "doc": {"uid": uid}, "filtered_resps": ["C"]} for uid in ("57", "55", "56")]
    file = changed(LMMS_LVBENCH, tmp_path / "samples.jsonl", [change | {"target": None} for change in changes])
    found = found_in(file, LVBenchOptions(root=lvbench))
    assert {prediction.text for prediction in found.predictions.values()} == {"C"}
    assert [*found.predictions] == ["57", "55", "56"]


@pytest.mark.parametrize(
    ("response", "text"),
    [
        ("B", "B"),
        (["B"], "B"),
        ([["B"]], "B"),
        ([[["B"]]], "B"),
        ([["B"], ["B"]], "B"),
        ([[]], ""),
        (None, ""),
        ([None], ""),
        (["['B']"], "['B']"),
    ],
)
@pytest.mark.parametrize("key", ["filtered_resps", "resps"])
def test_a_response_is_read_at_any_depth_of_lists(key, response, text, tmp_path) -> None:
    (tmp_path / "s.jsonl").write_text(json.dumps({"doc_id": 0, "target": "B", key: response, "input": "x"}) + "\n")
    assert [found.text for found in read_predictions(tmp_path / "s.jsonl")] == [text]


def test_line_ends_within_a_prediction_do_not_cut_it(lvbench, tmp_path) -> None:
    said = "C\u2028because\x85of it"  # as lmms-eval writes it: ensure_ascii=False
    file = changed(LMMS_LVBENCH, tmp_path / "samples.jsonl", [{"filtered_resps": [said]}])
    assert said in {one.text for one in found_in(file, LVBenchOptions(root=lvbench)).predictions.values()}


def test_questions_without_a_prediction_are_named(lvbench, tmp_path) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_text(LMMS_LVBENCH.read_text().splitlines()[0] + "\n")
    assert found_in(file, LVBenchOptions(root=lvbench)).missing == ("56", "57")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ([{"input": "What is this?"}], ":1: belongs to none of the questions; give the benchmark that was evaluated"),
        ([{"target": "A"}], ":1: the right answer to 55 is A there, D here; use the same edition"),
        ([{}, {"doc": {"uid": "55"}, "target": "D"}], ":2: answers 55 again after "),
    ],
)
def test_a_prediction_that_fits_no_question_or_the_wrong_one_is_refused(changes, problem, lvbench, tmp_path) -> None:
    file = changed(LMMS_LVBENCH, tmp_path / "samples.jsonl", changes)
    with pytest.raises(ManifestError) as raised:
        found_in(file, LVBenchOptions(root=lvbench))
    assert problem in raised.value.problems[0]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("x.json", "{}", "expected .jsonl, .tsv, .xlsx"),
        ("x.jsonl", "", "holds no predictions"),
        ("x.jsonl", "{}", ":1 filtered_resps: missing"),
        ("x.jsonl", '{"filtered_resps": ["A"], "doc": "x"}', ":1 doc: expected an object"),
        ("x.jsonl", '{"filtered_resps": [5]}', ":1 filtered_resps: expected text"),
        ("x.jsonl", '{"filtered_resps": [["A"], ["B"]]}', ":1 filtered_resps: holds 2 different responses"),
        ("x.jsonl", '{"resps": [[{"text": "A"}]]}', ":1 resps: expected text"),
        ("x.jsonl", '{"filtered_resps": ["A"], "score": []}', ":1 score: expected 0 or 1"),
        ("x.jsonl", '{"filtered_resps": ["A"], "score": 0.5}', ":1 score: expected 0 or 1"),
        ("x.tsv", f"{COLUMNS}\nv\tq\tA", ":2: fewer fields than the 4 columns"),
        ("x.tsv", f"{COLUMNS}\nv\tq\tA\tB\tC", ":2: more fields than the 4 columns"),
        ("x.tsv", f"{COLUMNS}\nv\tq\tA\tB\xf9".encode("latin-1"), ":2: is not UTF-8"),
        ("x.xlsx", "no workbook", "cannot be read"),
        ("x.xlsx", EMPTY_ZIP, "cannot be read"),
    ],
)
def test_a_file_of_neither_tool_is_refused(name, text, problem, tmp_path) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ManifestError, match=problem.replace(".", r"\.")):
        read_predictions(tmp_path / name)
    with pytest.raises(ManifestError, match="no such file"):
        read_predictions(tmp_path / "gone.jsonl")
