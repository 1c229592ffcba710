"""Small input that would fill memory or run for hours is refused within a second, and the limit is named and raised."""

import json
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from openpyxl import Workbook
from pyarrow import parquet
from support.thinkers import write_folder
from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

from omnimem.backbones import ModelOptions, load_backbone
from omnimem.backbones.template import TemplateFailure, render_bounded
from omnimem.budget import Budget
from omnimem.cli.parser import Parser
from omnimem.config.source import override, read
from omnimem.data import read_manifest
from omnimem.errors import UserError
from omnimem.evaluation import EvaluateOptions
from omnimem.limits import LIMITS, RAISED, exceeds, limit
from omnimem.tasks.annotations import read_parquet
from omnimem.tasks.predictions import read_predictions
from omnimem.tuning import LoraOptions

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
ITSELF = "a: &a [*a]\n"
DEEP = "a: " + "[" * 3000 + "]" * 3000


@pytest.fixture(autouse=True)
def _usual(monkeypatch) -> None:
    monkeypatch.delenv(RAISED, raising=False)


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def manifest(folder: Path, characters: int, role: str) -> Path:
    texts = {"user": "q ?", "assistant": "a", "system": "s"} | {role: "x" * characters}
    turns = [{"role": each, "content": texts[each]} for each in ("system", "user", "assistant")]
    return written(folder / "m.jsonl", json.dumps({"id": "s", "video": "a.mp4", "messages": turns}) + "\n")


def workbook(path: Path, cell: str) -> Path:
    book = Workbook()
    sheet = book.worksheets[0]
    sheet["A1"], sheet[cell] = "video", "x"
    book.save(path)
    return path


def zip_bomb(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for number in range(3):
            packed.writestr(f"xl/{number}.xml", bytes(100_000_000))
    return path


def table(path: Path, rows: int, text: str) -> Path:
    parquet.write_table(pyarrow.table({"a": [text] * rows}), path, compression="zstd")
    return path


BOMBS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "aliases": ("config_values", lambda at: read(written(at / "c.yaml", LAUGHS))),
    "alias of itself": ("too deep|config_values", lambda at: read(written(at / "c.yaml", ITSELF))),
    "deep yaml": ("too deep", lambda at: read(written(at / "c.yaml", DEEP))),
    "deep override": ("too deep", lambda at: override(read(written(at / "c.yaml", "a: 1")), ["b=" + "[" * 3000])),
    "digits in yaml": ("digits", lambda at: read(written(at / "c.yaml", "a: " + "9" * 5000))),
    "long yaml": ("config_bytes", lambda at: read(written(at / "c.yaml", "a: " + "x" * 2_000_000))),
    "rank": ("lora_rank", lambda at: LoraOptions(r=10**6)),
    "processes": ("processes", lambda at: EvaluateOptions(processes=10**6)),
    "decoders": ("processes", lambda at: EvaluateOptions(decoders=10**6)),
    "layers of a budget": (
        "budget_layers",
        lambda at: Budget.of({"format": "omnimem budget 1", "layers": 10**9, "slots": "full"}),
    ),
    "question": ("text_characters", lambda at: read_manifest(manifest(at, 10**5, "user"))),
    "answer": ("text_characters", lambda at: read_manifest(manifest(at, 10**6, "assistant"))),
    "system prompt": ("text_characters", lambda at: read_manifest(manifest(at, 10**5, "system"))),
    "zip": ("table_bytes", lambda at: read_predictions(zip_bomb(at / "a.xlsx"))),
    "rows": ("table_rows", lambda at: read_predictions(workbook(at / "a.xlsx", "A1048576"))),
    "columns": ("table_columns", lambda at: read_predictions(workbook(at / "a.xlsx", "XFD2"))),
    "parquet": ("table_bytes", lambda at: read_parquet(table(at / "a.parquet", 300, "x" * 1_000_000))),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_with_the_name_of_its_limit(name, tmp_path) -> None:
    known, explode = BOMBS[name]
    began = time.monotonic()
    with pytest.raises((UserError, ValueError), match=known) as refused:
        explode(tmp_path)
    assert time.monotonic() - began < 20
    assert len(str(refused.value)) < 500


TEMPLATES = {
    "multiplied": "{{ 'x' * 1000000000 }}",
    "doubled": "{% set n = namespace(x='x') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "loops": "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "long output": "{% for i in range(90000) %}xxxxxxxxxxxxxxxx{% endfor %}",
    "padded": "{{ 'x'.ljust(1000000000) }}",
    "power": "{{ 10 ** (10 ** 9) }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_loops_is_refused(name, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(RAISED, "template_seconds=3")
    folder = write_folder(tmp_path / "model", rates="tiny")
    (folder / "chat_template.jinja").write_text(TEMPLATES[name])
    with pytest.raises(UserError, match="chat template cannot be rendered"):
        load_backbone(ModelOptions(path=str(folder)))


def test_what_a_template_returns_or_raises_is_passed_on() -> None:
    assert render_bounded(lambda: "ä\ud800 text") == "ä\ud800 text"
    with pytest.raises(TemplateFailure, match="division"):
        render_bounded(lambda: str(1 // 0))


def test_a_model_with_countless_layers_is_refused(tmp_path) -> None:
    folder = write_folder(tmp_path / "model", rates="tiny")
    table = json.loads((folder / "config.json").read_text())
    table["text_config"]["num_hidden_layers"] = 10**9
    (folder / "config.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match=r"config.json num_hidden_layers: .*model_layers"):
        load_backbone(ModelOptions(path=str(folder)))


@pytest.mark.parametrize("stage", [None, 3])
def test_a_model_that_is_larger_than_its_files_is_refused_before_it_takes_memory(stage, tmp_path, request) -> None:
    """Also under ZeRO-3, which stays set: its construction of a model takes the memory itself."""
    folder = write_folder(tmp_path / "model", rates="tiny")
    table = json.loads((folder / "config.json").read_text())
    table["text_config"]["intermediate_size"] *= 10**6
    (folder / "config.json").write_text(json.dumps(table))
    settings = stage and HfDeepSpeedConfig({"zero_optimization": {"stage": stage}, "train_batch_size": 1})
    request.addfinalizer(unset_hf_deepspeed_config)
    with pytest.raises(UserError, match=r"config.json describes .* weights"):
        load_backbone(ModelOptions(path=str(folder)))
    assert is_deepspeed_zero3_enabled() is bool(settings)


def test_the_option_raises_a_limit(tmp_path, capsys) -> None:
    parser = Parser("x")
    parser.parse(["--limit", "lora_rank=1000000", "--limit", "text_characters=200000"])
    assert LoraOptions(r=10**6).r == 10**6
    assert read_manifest(manifest(tmp_path, 10**5, "user"))
    assert limit("config_bytes") == LIMITS["config_bytes"]
    assert exceeds("lora_rank", 10**6) is None
    for wrong in ("lora_rank", "rank=3", "lora_rank=-1", "lora_rank=1e9", "lora_rank=", "lora_rank=" + "9" * 99):
        with pytest.raises(UserError, match="--limit"):
            parser.parse(["--limit", wrong])
    assert all(name in (Path(__file__).parents[2] / "docs" / "limits.md").read_text() for name in LIMITS)
