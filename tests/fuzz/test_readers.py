"""Hostile variants of every file that a command reads; `python benchmarks/fuzz.py --cases 3000` runs more of them."""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import fuzzing
from support.fuzzing import SURFACES, Material, Surface, Verdicts, clean, strategies

CASES = int(os.environ.get("OMNIMEM_FUZZ", "12"))  # of each surface, times its share / 4


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material(tmp_path_factory.mktemp("material"))


@pytest.mark.parametrize("surface", SURFACES, ids=lambda surface: surface.name)
def test_hostile_input_ends_with_a_line_in_time_and_within_memory(
    surface: Surface, made: Material, tmp_path: Path
) -> None:
    verdicts = Verdicts()
    verdicts.run(surface.name, clean(surface, tmp_path, made), "clean")
    assert not verdicts.refused[surface.name]

    @settings(
        max_examples=max(2, CASES * surface.share // 4),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data: Any) -> None:
        case, what = data.draw(strategies(surface, tmp_path, made))
        verdicts.run(surface.name, case, what)
        assert not verdicts.failures

    run()


def test_a_file_that_is_read_at_another_length_is_counted(
    made: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    media, verdicts = next(surface for surface in SURFACES if surface.name == "media"), Verdicts()
    verdicts.run("media", clean(media, tmp_path, made), "clean")
    assert not verdicts.failures
    monkeypatch.setattr(fuzzing, "LENGTH", 9.0)  # of what was made
    verdicts.run("media", lambda: fuzzing.check_length("video", 8.0, 9.0), "short")
    assert len(verdicts.durations) == len(verdicts.failures) == 1
