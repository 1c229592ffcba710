"""The README's Python does what the README says."""

import contextlib
import io
import re

from support.paths import ROOT

from omnimem.recall.renderer import write_mp4
from omnimem.recall.worlds import COLOURS, draw_world

LAYERS, SLOTS = 6, 36  # of configs/models/tiny, and as the README says


def first_block(text: str) -> str:
    """The first Python block of a page."""
    found = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert found, "README.md shows no Python"
    return found[1]


def test_the_ten_lines_answer_a_question_about_a_file_from_a_memory_of_fixed_size(tmp_path, monkeypatch) -> None:
    world = draw_world(25, 16)
    assert any(question.text == "what colour was the star ?" for question in world.questions)
    write_mp4(world, tmp_path / "video.mp4")
    monkeypatch.chdir(tmp_path)
    block = first_block((ROOT / "README.md").read_text())
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    answers, memory = printed.getvalue().splitlines()
    assert answers in [f"['{colour}']" for colour in COLOURS]
    assert re.fullmatch(rf"{LAYERS * SLOTS} entries, \d+ bytes", memory)
