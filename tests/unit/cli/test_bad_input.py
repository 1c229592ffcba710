"""What a user may get wrong: every command ends with exit code 2 and one line that says how to repair it."""

from pathlib import Path

import pytest

from omnimem.commands import ask, calibrate, evaluate, finetune

CONFIG = ("--config", "tiny.yaml", "model.path=@model", "data.train=@film.jsonl")


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("memory.polcy=x", "command line memory.polcy: unknown key; did you mean 'policy'?"),
        ("memory.slots_per_layer=0", "command line memory.slots_per_layer: 0 is too small; each layer needs one audio"),
        ("data.train=gone.jsonl", "gone.jsonl: no such file; create it with "),
        ("tuning.lora.r=0", "command line tuning.lora.r: lora.r = 0 must be at least 1"),
        ("evaluate.benchmarks=[{name: recall, root: gone}]", "evaluate.benchmarks: gone/test.jsonl is missing;"),
    ],
)
def test_finetune_refuses_wrong_settings_and_missing_data(override, what, said) -> None:
    (line,) = said(finetune.main, *CONFIG, override)
    assert line.startswith(what)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("video", "what"), [("@gone.mp4", "gone.mp4"), ("@broken.mp4", "broken.mp4"), ("@silent.mp4", "silent.mp4")]
)
def test_ask_names_the_file_that_is_missing_unreadable_or_silent(video, what, said) -> None:
    settings = ("--max-pixels", "12544", "--slots", "8", "--tracks", "require_both")
    (line,) = said(ask.main, "--model", "@model", "--video", video, *settings, "What is it?")
    assert what in line
    assert ";" in line


def test_evaluate_refuses_the_adapter_of_another_base(material, said) -> None:
    benchmarks = f"evaluate.benchmarks=[{{name: recall, root: {material}, split: film}}]"
    lines = said(evaluate.main, *CONFIG, benchmarks, "--arm", "tuned", "--adapter", "@adapter")
    assert len(lines) == 1
    assert "adapter: made for another base" in lines[0]


def test_calibrate_refuses_streams_of_which_too_many_cannot_be_read(said) -> None:
    budget = "memory.budget={name: audio_visual}"
    lines = said(calibrate.main, *CONFIG, "data.train=@broken.jsonl", budget, "calibration.skip_chunks=0")
    assert "broken" in lines[0]
    assert "raise data.max_failures" in lines[-1]
