"""What a user may get wrong: every command ends with exit code 2 and one line that says how to repair it."""

from pathlib import Path

import pytest

from omnimem.absent import why_absent
from omnimem.backbones.files import CheckpointError
from omnimem.backbones.load import family_at
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
    assert [line.startswith("warning") for line in lines] == [True, False]  # not tuned with these settings
    assert "adapter: made for another base" in lines[1]


def test_calibrate_refuses_streams_of_which_too_many_cannot_be_read(said) -> None:
    budget = "memory.budget={name: audio_visual}"
    lines = said(calibrate.main, *CONFIG, "data.train=@broken.jsonl", budget, "calibration.skip_chunks=0")
    assert "broken" in lines[0]
    assert "raise data.max_failures" in lines[-1]


def _adapter(place: Path, change: str) -> None:
    """A folder beside the run that is no adapter for it."""
    place.mkdir()
    if change == "cut":
        (place / "adapter_config.json").write_text("{}")
        (place / "adapter_model.safetensors").write_bytes(b"cut")


AUDIO_VISUAL = "memory.budget={name: audio_visual}"
UP = ("tuning.lora.r=2", "tuning.lora.alpha=4", "tuning.lora.targets=[up_proj]")
SET_UP = {  # what is said, and overrides
    "a regular expression without a match": ("lora.targets: ", "tuning.lora.targets=layers\\.\\d+\\.none"),
    "a model path that is none": ("model.path: /no/such cannot be loaded", "model.path=/no/such"),
    "an adapter that is an empty folder": ("empty: adapter_config.json is missing", "model.adapter=empty"),
    "an adapter whose weights are cut": ("adapter_model.safetensors: cannot be read", "model.adapter=cut"),
    "an adapter of another rank": ("tuning.lora.r = 16, but the adapter in ", "model.adapter=@adapter"),
    "an adapter of another base": ("adapter: made for another base than", "model.adapter=@adapter", *UP),
    "a budget table that is none": ("film.jsonl: ", "memory.budget={name: audio_visual, table: @film.jsonl}"),
    "a layer beyond the last one": (
        "tuning.stop_layer = 9 must be from 1 to 1: the model has 2 layers",
        *("tuning.gradient=released", "tuning.selection.softening=hard", "tuning.stop_layer=9"),
    ),
    "streams without a modality of the budget": (
        "the calibration streams hold no audio tokens to measure",
        *(AUDIO_VISUAL, "stream.tracks=video"),
    ),
}


@pytest.mark.parametrize("what", SET_UP)
def test_what_set_up_would_refuse_the_dry_run_refuses_in_the_same_words(what, said, monkeypatch) -> None:
    monkeypatch.setattr(finetune, "prepare_process", lambda: None)  # it would join a process group for good
    for name in ("empty", "cut"):
        _adapter(Path(name), name)
    words, *settings = SET_UP[what]
    usual = ("train.deepspeed=null", "memory.budget={name: shared}", "evaluate.after_training=false")
    dry, real = (said(finetune.main, *CONFIG, *usual, *settings, flag) for flag in ("--dry-run", "--skip-preflight"))
    assert dry == real
    assert words in dry[0]


@pytest.mark.parametrize("path", ["~/model", "$HOME/model", "a\\model", "https://hub.org/a/model"])
def test_a_model_path_that_no_shell_expanded_is_repaired(path) -> None:
    with pytest.raises(CheckpointError) as caught:
        family_at(path)
    assert str(caught.value) == f"model.path: {path} does not exist; {why_absent(path, '')}"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (("run.json", "config.yaml", "adapter/x"), ("the folder of a run; `omnimem export", "/adapter as the adapter")),
        (("run.json", "config.yaml"), ("folder of a run, which is not finished; resume it", "--format merged")),
        (("adapter_config.json",), ("is an adapter; give its base",)),
        ((), ("config.json",)),
    ],
)
def test_a_folder_of_training_given_as_a_model_is_named(files, words, tmp_path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        family_at(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert all(word in str(caught.value) for word in words)
