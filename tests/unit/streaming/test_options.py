"""Limits of the stream's options: a line with the limits, from the config and from the command line."""

import pytest

from omnimem.cli.parser import run_command
from omnimem.commands import ask
from omnimem.streaming.options import StreamOptions

HUGE = 10**400  # beyond float


@pytest.mark.parametrize("fps", [0.0, -1.0, float("inf"), float("-inf"), float("nan"), 1e300, 1e9, 120.5])
def test_frame_rates_without_sense_are_refused_with_the_limits(fps) -> None:
    with pytest.raises(ValueError, match="must be above 0 and at most 120"):
        StreamOptions(fps=fps)


@pytest.mark.parametrize("name", ["max_pixels", "min_pixels", "chunk_tokens"])
@pytest.mark.parametrize("value", [0, -5, 1 << 40, HUGE])
def test_sizes_without_sense_are_refused_with_the_limits(name, value) -> None:
    with pytest.raises(ValueError, match=rf"{name} = .* must be in 1\.\."):
        StreamOptions(**{name: value})


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--fps", "inf"), ("--fps", "nan"), ("--fps", "1e300"), ("--fps", "0"), ("--max-pixels", "9" * 30)],
)
def test_ask_names_the_limits(tmp_path, capsys, monkeypatch, flag, value) -> None:
    arguments = ["ask", "--model", "models/tiny", "--video", str(tmp_path / "x.mp4"), flag, value, "what ?"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as ended:
        run_command(ask.main)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert (ended.value.code, "must be" in last) == (2, True)
