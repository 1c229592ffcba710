"""The progress bar: lines where a terminal has no width, as in some containers."""

import fcntl
import os
import pty
import struct
import sys
import termios
from types import SimpleNamespace
from typing import Any

import pytest

from omnimem.training.logging import Progress


@pytest.mark.parametrize("columns", [0, 80, None], ids=["no_width", "terminal", "file"])
def test_the_bar_becomes_lines_without_a_width(columns, monkeypatch, capsys, tmp_path) -> None:
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns or 0, 0, 0))
    place = (tmp_path / "log").open("w") if columns is None else os.fdopen(follower, "w")
    monkeypatch.setattr(sys, "stderr", place)
    unused: Any = None
    state: Any = SimpleNamespace(is_world_process_zero=True, max_steps=10, global_step=0)
    with Progress() as progress:
        progress.on_train_begin(unused, state, unused)
        state.global_step = 1
        logs = {"loss": 2.0, "loss_at/8": 3.0, "loss_at/full": 1.5, "slots": -1.0, "learning_rate": 1e-3}
        progress.on_log(unused, state, unused, logs)
    place.close()
    os.close(leader)
    shown = capsys.readouterr().out
    assert shown.startswith("step 1 of 10: loss 2, mean 1.5, slots full, rate 0.001, 00:00 left") == (columns != 80)
