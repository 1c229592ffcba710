"""Fixtures for commands that must refuse their input."""

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from support import thinkers
from support.tiny_run import silence

from omnimem.cli.parser import run_command
from omnimem.recall.renderer import write_mp4
from omnimem.recall.worlds import WorldOptions, draw_world
from omnimem.tuning import LoraOptions, add_adapter

PROGRESS = re.compile(r"(Loading weights|calibration|tuned): .*(it|stream)/?s?.*\]")
QUESTION = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "red"}]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, videos with audio, without audio and unreadable, manifests, and an adapter of another base."""
    folder = tmp_path_factory.mktemp("material")
    thinkers.write_folder(folder / "model", rates="tiny")
    write_mp4(draw_world(3, 8, WorldOptions()), folder / "film.mp4")
    (folder / "broken.mp4").write_bytes(b"no video")
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
    """A function that runs a command in an empty folder and returns its lines on stderr; it must exit with 2."""
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
