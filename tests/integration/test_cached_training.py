"""Training with the encoder cache, decoded ahead, is the same to the bit, and never decodes or encodes twice."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.tiny_run import CONFIG, TIMED, write_videos

from omnimem.backbones.qwen2_5_omni import Qwen25Omni
from omnimem.commands import finetune
from omnimem.media import FileSource

EPOCHS = ["train.max_steps=4", "train.save_strategy=no", "data.train=two.jsonl"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos, asked within a grid and after the end."""
    place = write_videos(tmp_path_factory.mktemp("cached"))
    rows = (place / "train.jsonl").read_text().splitlines(keepends=True)
    (place / "two.jsonl").write_text("".join(rows[1:3]))
    return place


def trained(place: Path, name: str, *overrides: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The lines of metrics.jsonl without times, and run.json."""
    (place / f"{name}.yaml").write_text(CONFIG.format(name=name))
    finetune.main(["--config", f"{name}.yaml", *EPOCHS, *overrides])
    lines = [json.loads(line) for line in (place / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    record = json.loads((place / "runs" / name / "run.json").read_text())
    return [{key: value for key, value in line.items() if key not in TIMED} for line in lines], record


def test_two_epochs_are_the_same_to_the_bit_with_the_cache_and_decoding_ahead(place, monkeypatch) -> None:
    monkeypatch.chdir(place)
    calls: Counter[str] = Counter()
    iterate, encode = FileSource.__iter__, Qwen25Omni.encode
    monkeypatch.setattr(FileSource, "__iter__", lambda self: calls.update(["decoded"]) or iterate(self))
    monkeypatch.setattr(Qwen25Omni, "encode", lambda self, *a, **b: calls.update(["encoded"]) or encode(self, *a, **b))
    plain, record = trained(place, "plain")
    assert "encoder_cache" not in record
    assert calls == {"decoded": 6, "encoded": 6}  # also in the preflight, and for the overlap of the selections
    calls.clear()
    cached, record = trained(place, "cached", "data.cache=true", "train.dataloader_num_workers=1")
    assert calls == {"decoded": 1, "encoded": 2}  # the other file is decoded by the worker
    counts = [line.pop("cache") for line in cached]
    assert cached == plain
    assert record["encoder_cache"] == {"hits": 8, "misses": 4, "corrupt": 0, "evicted": 0, "not_stored": 0}
    assert (counts[-1]["misses"], counts[-1]["hits"]) == (
        4,
        6,
    )  # entries of one track; the overlap is read after the log


def test_projectors_change_from_step_to_step_and_the_cache_never_holds_what_they_made(place, monkeypatch) -> None:
    monkeypatch.chdir(place)
    lora = "tuning.lora.modules_to_save=[visual_projector, audio_projector]"
    settings = ("--skip-preflight", lora, "train.max_steps=3", "train.learning_rate=0.05", "tuning.overlap_every=0")
    (place / "one.jsonl").write_text((place / "two.jsonl").read_text().splitlines(keepends=True)[0])
    plain, _ = trained(place, "own", *settings, "data.train=one.jsonl")
    cached, record = trained(place, "own-cached", *settings, "data.train=one.jsonl", "data.cache={folder: own}")
    assert [{key: value for key, value in line.items() if key != "cache"} for line in cached] == plain
    assert record["encoder_cache"] == {"hits": 4, "misses": 2, "corrupt": 0, "evicted": 0, "not_stored": 0}
