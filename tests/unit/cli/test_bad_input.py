"""What a user may get wrong: every command ends with exit code 2 and one line that says how to repair it."""

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import pytest
from support import thinkers
from support.tiny_run import silence
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from omnimem.cli.parser import run_command
from omnimem.commands import ask, calibrate, evaluate, finetune
from omnimem.recall.renderer import write_mp4
from omnimem.recall.worlds import WorldOptions, draw_world
from omnimem.tuning import LoraOptions, add_adapter

PROGRESS = re.compile(r"(Loading weights|calibration|tuned): .*(it|stream)/?s?.*\]")
QUESTION = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "red"}]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, a film with sound, one without, one that is none, manifests, and an adapter of another base."""
    folder = tmp_path_factory.mktemp("material")
    thinkers.write_folder(folder / "model", rates="tiny")
    write_mp4(draw_world(3, 8, WorldOptions()), folder / "film.mp4")
    (folder / "broken.mp4").write_bytes(b"no film")
    silence(folder / "film.mp4", folder / "silent.mp4")
    for name in ("film", "broken", "silent"):
        line = {"id": name, "video": f"{name}.mp4", "audio": None, "messages": QUESTION}
        (folder / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    other = thinkers.config_of(thinkers.build_tokenizer(), tied=False, rates="tiny")
    other.text_config.intermediate_size = 64
    adapted = add_adapter(thinkers.random_model(other), LoraOptions(r=2, alpha=4.0, targets=("up_proj",)))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.1)
    adapted.save_pretrained(str(folder / "adapter"))
    return folder


@pytest.fixture
def said(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[str]]:
    """Runs a command in an empty folder and gives the lines on stderr; it must leave with 2."""
    monkeypatch.chdir(tmp_path)

    def run(main: Callable[[Sequence[str]], None], *arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["command", *(part.replace("@", f"{material}/") for part in arguments)])
        with pytest.raises(SystemExit) as leaving:
            run_command(main)
        shown = capsys.readouterr().err.replace("\r", "\n").splitlines()
        lines = [line for line in shown if line and not PROGRESS.match(line)]
        assert leaving.value.code == 2, lines
        return lines

    return run


CONFIG = ("--config", "tiny.yaml", "model.path=@model", "data.train=@film.jsonl")


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("memory.polcy=x", "command line memory.polcy: unknown key; did you mean 'policy'?"),
        ("memory.slots_per_layer=many", "command line memory.slots_per_layer: expected a whole number, got 'many'"),
        ("memory.slots_per_layer=0", "command line memory.slots_per_layer: 0 is too small; each layer needs one audio"),
        ("data.train=gone.jsonl", "gone.jsonl: no such file; create it with "),
        ("tuning.lora.r=0", "command line tuning.lora.r: lora.r = 0 must be at least 1"),
        ("tuning.lora.alpha=0", "command line tuning.lora.alpha: lora.alpha = 0 must be above 0"),
        ("train.step_timeout_seconds=-1", "command line train.step_timeout_seconds: -1 is out of range; give 0 (no"),
        (
            "evaluate.benchmarks=[{name: recall, root: gone}]",
            "evaluate.benchmarks: gone/test.jsonl is missing; make it",
        ),
    ],
)
def test_finetune_refuses_wrong_settings_and_missing_data(
    override: str, what: str, said: Callable[..., list[str]]
) -> None:
    (line,) = said(finetune.main, *CONFIG, override)
    assert line.startswith(what)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("video", "what"),
    [
        ("@gone.mp4", "gone.mp4"),
        ("@broken.mp4", "broken.mp4"),
        ("@silent.mp4", "silent.mp4"),
    ],
)
def test_ask_names_the_file_that_is_missing_unreadable_or_silent(
    video: str, what: str, said: Callable[..., list[str]]
) -> None:
    (line,) = said(
        ask.main, "--model", "@model", "--video", video, "--max-pixels", "12544", "--slots", "8", "What is it?"
    )
    assert what in line
    assert ";" in line


def test_evaluate_refuses_the_adapter_of_another_base(material: Path, said: Callable[..., list[str]]) -> None:
    benchmarks = f"evaluate.benchmarks=[{{name: recall, root: {material}, split: film}}]"
    lines = said(evaluate.main, *CONFIG, benchmarks, "--arm", "tuned", "--adapter", "@adapter")
    assert len(lines) == 1
    assert "adapter: made for another base" in lines[0]


def test_calibrate_refuses_streams_of_which_too_many_cannot_be_read(said: Callable[..., list[str]]) -> None:
    budget = "memory.budget={name: audio_visual}"
    lines = said(calibrate.main, *CONFIG, "data.train=@broken.jsonl", budget, "calibration.skip_chunks=0")
    assert "broken" in lines[0]
    assert "raise data.max_failures" in lines[-1]


def test_the_material_is_what_it_says(material: Path) -> None:
    with av.open(str(material / "silent.mp4")) as film:
        assert (len(film.streams.video), len(film.streams.audio)) == (1, 0)
    assert Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(material / "model") is not None
