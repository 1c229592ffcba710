"""Ranks that wait for what the first one does alone: calibration and rehearsal may take longer than ddp_timeout."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from support.ranks import command
from support.tiny_run import SCRIPT, given, write_videos

from omnimem.cli import build
from omnimem.commands import finetune

TIMEOUT = 10  # seconds
CALIBRATED = (
    "memory.budget={name: audio_visual, visual_audio_ratio: 2, table: calibrate}",
    "calibration={streams: 2, skip_chunks: 0}",
)


def late(work: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*given: Any, **named: Any) -> Any:
        time.sleep(TIMEOUT + 3)
        return work(*given, **named)

    return slow


def slow_first_rank() -> None:

    build.measured_budget = late(build.measured_budget)
    finetune.rehearse_run = late(finetune.rehearse_run)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_calibration_and_a_rehearsal_longer_than_ddp_timeout_do_not_end_the_run(tmp_path) -> None:
    folder = write_videos(tmp_path)
    settings = ("train.max_steps=1", f"train.ddp_timeout={TIMEOUT}", *CALIBRATED)
    ended = command(SCRIPT, given(folder, "x", *settings), folder, ranks=2, first=slow_first_rank)
    assert "step 1 of 1" in ended.outputs[0]
