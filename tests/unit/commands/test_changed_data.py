"""A resumed run says when its rows are not those that it was started with."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from omnimem.commands.finetune import changed_data
from omnimem.data import Sample
from omnimem.sources import digest

ROWS = [Sample(id="a", video=Path("a.mp4"), audio=None, messages=())]
PREFIXED = [Sample(id="a", video=Path("a.mp4"), audio=None, prefix="Choose.", messages=())]
OTHER = [Sample(id="a", video=Path("a.mp4"), audio=None, end=3.0, messages=())]


@pytest.mark.parametrize(
    ("record", "rows", "warned"),
    [
        (json.dumps({"sha256": {"data": digest(ROWS)}}), ROWS, False),
        (json.dumps({"sha256": {"data": digest(ROWS)}}), OTHER, True),
        (json.dumps({"sha256": {"data": digest(ROWS)}}), PREFIXED, True),
        (json.dumps({}), ROWS, False),
        ("damaged", ROWS, False),
    ],
)
def test_other_rows_on_resume_are_a_warning(record, rows, warned, tmp_path) -> None:
    (tmp_path / "run.json").write_text(record)
    start: Any = SimpleNamespace(
        checkpoint=tmp_path, folder=SimpleNamespace(path=tmp_path, record=tmp_path / "run.json")
    )
    assert bool(changed_data(start, rows)) is warned
    start.checkpoint = None
    assert changed_data(start, rows) == []
