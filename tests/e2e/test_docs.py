"""README and documents are correct: code runs, links exist, lines are short."""

import contextlib
import io
import json
import re
import runpy
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import av
import numpy as np
import pytest
from pydantic import Field, TypeAdapter
from support.paths import ROOT

from omnimem.policies import PolicyOptions
from omnimem.recall.renderer import write_mp4
from omnimem.recall.worlds import COLOURS, draw_world

PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("[CS]*.md")])
LAYERS, SLOTS = 6, 36  # of configs/models/tiny, and as the page says


def prose(text: str) -> str:
    """The page without code blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_lines_are_short(page) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)) if ":" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []
    lines = [line for line in text.splitlines() if line[:1] not in ("|", "{")]  # tables and JSON lines do not wrap
    assert [line for line in lines if len(line) > 120] == []


def test_every_section_that_the_code_cites_is_on_the_page_of_the_paper() -> None:
    sections = set(re.findall(r"^## (.+)$", (ROOT / "docs/paper.md").read_text(encoding="utf-8"), re.MULTILINE))
    sources = [path for folder in ("omnimem", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    found = [name for path in sources for name in re.findall(r'docs/paper\.md, "([^"]+)"\)', path.read_text("utf-8"))]
    cited = {" ".join(name.split()) for name in found}  # a citation may be wrapped
    assert cited
    assert cited <= sections


def test_the_policy_of_the_page_streams_a_video_and_can_be_named_in_a_config(tmp_path, monkeypatch, capsys) -> None:
    write_mp4(draw_world(25, 8), tmp_path / "video.mp4")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "outlier"}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/adding_a_policy.md").read_text(), flags=re.DOTALL):
        exec(compile(block, "adding_a_policy.md", "exec"), names)
    assert capsys.readouterr().out.split("]")[1].strip() == str(LAYERS * SLOTS)
    options = names["OutlierOptions"]
    registered = TypeAdapter(Annotated[PolicyOptions | options, Field(discriminator="name")])
    assert registered.validate_python({"name": "outlier", "power": 2}) == options(power=2.0)


def test_the_figure_shows_every_method_at_its_accuracy_without_overlapping_labels() -> None:
    figures = runpy.run_path(str(ROOT / "benchmarks/figures.py"))
    panels = figures["draw"]().axes
    shown = [{"omnimem  85", "paper  74"}, {"omnimem  43", "H2O  30"}, {"omnimem  27", "full memory  95.3"}]
    for axes, some in zip(panels, shown, strict=True):
        labels = {text.get_text(): text.get_position()[1] for text in axes.texts}
        assert some <= labels.keys()
        assert len(labels) == 1 + len(figures["POLICIES"])
        places = sorted(place for text, place in labels.items() if not text.startswith("full memory"))
        assert min(b - a for a, b in pairwise(places)) > figures["LABEL_GAP"] - 1e-9
        assert places[0] >= 2


def printed_by_readme(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the example prints about `video.mp4` in a folder."""
    monkeypatch.chdir(folder)
    block = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)[0]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    return printed.getvalue().splitlines()


def test_the_code_of_the_readme_answers_a_question_from_a_memory_of_fixed_size(tmp_path, monkeypatch) -> None:
    world = draw_world(25, 16)
    assert any(question.text == "what colour was the star ?" for question in world.questions)
    write_mp4(world, tmp_path / "video.mp4")
    answers, memory = printed_by_readme(tmp_path, monkeypatch)
    assert answers in [f"['{colour}']" for colour in COLOURS]
    assert re.fullmatch(rf"{LAYERS * SLOTS} entries, \d+ bytes", memory)


@pytest.mark.parametrize(
    ("width", "height", "rate", "seconds"), [(1280, 720, 25, 3), (240, 432, 30, 1), (64, 32, 1, 5)]
)
def test_the_code_of_the_readme_runs_on_any_video(width, height, rate, seconds, tmp_path, monkeypatch) -> None:
    """Large, upright, tiny and silent ones, shorter than a chunk."""
    with av.open(str(tmp_path / "video.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(rate * seconds):
            image = np.full((height, width, 3), number % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    answers, memory = printed_by_readme(tmp_path, monkeypatch)
    assert answers.startswith("['")
    assert int(memory.split()[0]) <= LAYERS * SLOTS


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch) -> None:
    """Its code cells, in one namespace, on the bundled checkpoint."""
    monkeypatch.chdir(tmp_path)
    book = json.loads((ROOT / "examples/first_run.ipynb").read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__name__": "notebook"}
    for number, cell in enumerate(book["cells"]):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "saved without outputs"
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    full, limited = (names["held"][name] for name in ("full memory", "18 slots per layer"))
    assert full == sorted(full)
    assert max(limited) == names["layers"] * 18 < full[-1]
    assert all(len(found) == len(names["texts"]) for found in names["answers"].values())
