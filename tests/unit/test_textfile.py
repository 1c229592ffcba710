"""Files of JSON that hold something else than one object per line are named by their form, in one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from omnimem.data import DataSource, ManifestError, read_manifest
from omnimem.sources import read_source
from omnimem.textfile import read_objects

ASK = [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "that"}]
ROW: dict[str, Any] = {"id": "a", "video": "a.mp4", "messages": ASK}
OTHER = {**ROW, "id": "b"}
LINES = f"{json.dumps(ROW)}\n{json.dumps(OTHER)}\n"
FORMS = {  # the words that name the form, and the file
    "one pretty row": ("1 object over several lines", json.dumps(ROW, indent=2)),
    "pretty rows": ("2 objects over several lines", f"{json.dumps(ROW, indent=1)}\n{json.dumps(OTHER, indent=1)}\n"),
    "a pretty row after a line": ("2 objects over", f"{json.dumps(ROW)}\n{json.dumps(OTHER, indent=1)}\n"),
    "commas": ("commas between 2 objects", f"{json.dumps(ROW)},\n{json.dumps(OTHER)},\n"),
    "data": ("the list of 2 rows under the key 'data'", json.dumps({"data": [ROW, OTHER]})),
    "pretty data": ("the list of 1 row under the key 'data'", json.dumps({"data": [ROW]}, indent=2)),
    "with a version": ("under the key 'annotations'", json.dumps({"version": 1, "annotations": [ROW]})),
    "by id": ("2 rows, each under a key ('a')", json.dumps({"a": ROW, "b": OTHER})),
}


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
@pytest.mark.parametrize("form", FORMS)
def test_another_form_than_a_row_per_line_is_one_problem_with_its_cure(tmp_path, form, name) -> None:
    words, text = FORMS[form]
    path = tmp_path / name
    path.write_text(text)
    for read in (read_manifest, lambda path: read_source(DataSource(path=str(path)), allow_absolute=False)):
        with pytest.raises(ManifestError) as caught:
            read(path)
        (problem,) = caught.value.problems
        assert problem.startswith(f"{path}: ")
        assert words in problem
        assert "one row per line, or the rows as a list in [ ]" in problem


@pytest.mark.parametrize("text", [LINES, json.dumps(ROW), LINES.replace("\n", "\n\n")])
def test_rows_are_read_as_before(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    assert [row["id"] for _, row in read_objects(path)] == ["a", "b"][: text.count('"id"')]


@pytest.mark.parametrize("line", ["{oops", "[1]", '{"id": "a"'])
def test_a_damaged_line_keeps_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n{line}\n{json.dumps(OTHER)}\n")
    with pytest.raises(ManifestError, match=rf"^{path}:2: "):
        read_objects(path)
