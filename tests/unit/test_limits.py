"""Small input that would fill memory or run for hours is refused within a second, and the limit is named and raised."""

import contextlib
import gc
import json
import os
import threading
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

from omnimem.backbones import ModelOptions, load_backbone, template
from omnimem.backbones.template import TemplateFailure, render_bounded
from omnimem.budget import Budget
from omnimem.checksums import damage, origin_of
from omnimem.cli.parser import Parser
from omnimem.comparison import load
from omnimem.config.exported import Exported
from omnimem.config.source import override, read
from omnimem.data import read_manifest
from omnimem.errors import UserError
from omnimem.evaluation import EvaluateOptions
from omnimem.limits import LIMITS, RAISED, exceeds, limit, read_within
from omnimem.tasks.annotations import read_parquet
from omnimem.tasks.predictions import read_predictions
from omnimem.training.pickles import refuse_code
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


@pytest.mark.parametrize("released", [True, False], ids=["for a moment", "for ever"])
def test_a_child_that_waits_for_a_lock_of_another_thread_is_replaced(released, monkeypatch) -> None:
    """A forked child has the locks as they were, and none of the threads that would release them."""
    monkeypatch.setattr(template, "PAUSE", 0.05)
    lock = threading.Lock()
    lock.acquire()
    if released:
        threading.Timer(0.5, lock.release).start()

    def render() -> str:
        with lock:
            return "text"

    if released:
        assert render_bounded(render) == "text"
    else:
        with pytest.raises(TemplateFailure, match=r"5 forked processes waited for locks of other threads"):
            render_bounded(render)


def test_a_child_collects_no_garbage_of_its_parent(monkeypatch) -> None:
    """A decoder, say, whose end waits for threads that only the parent has."""
    monkeypatch.setattr(template, "PAUSE", 0.05)
    parent = os.getpid()

    class Decoder:
        def __init__(self) -> None:
            self.own = self

        def __del__(self) -> None:
            if os.getpid() != parent:
                threading.Event().wait()

    gc.collect()
    Decoder()
    assert render_bounded(lambda: str(sum(len([[]]) for _ in [[[]] for _ in range(10**5)]))) == "100000"
    assert gc.isenabled()


def test_a_child_that_works_is_not_taken_for_one_that_waits(monkeypatch) -> None:
    monkeypatch.setattr(template, "PAUSE", 0.02)

    def render() -> str:
        until = time.process_time() + 0.5
        while time.process_time() < until:
            pass
        return "text"

    assert render_bounded(render) == "text"


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


ENDLESS: dict[str, Callable[[Path], object]] = {
    "device": lambda path: path.symlink_to("/dev/zero"),
    "pipe": os.mkfifo,
    "sparse": lambda path: path.touch() or os.truncate(path, 40 << 30),
}
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "config": ("c.yaml", read),
    "manifest": ("m.jsonl", read_manifest),
    "budget": ("budget.json", Budget.read),
    "export": ("omnimem.json", lambda path: Exported.read(path.parent)),
    "checkpoint": ("config.json", lambda path: load_backbone(ModelOptions(path=str(path.parent)))),
    "tokenizer": ("tokenizer.json", lambda path: load_backbone(ModelOptions(path=str(path.parent)))),
    "template": ("chat_template.jinja", lambda path: load_backbone(ModelOptions(path=str(path.parent)))),
    "answers": ("recall.jsonl", lambda path: list(load._json_lines(path))),
    "latest": ("latest", lambda path: refuse_code(path.parent)),
}


@pytest.mark.parametrize("kind", ENDLESS)
@pytest.mark.parametrize("reader", READERS)
def test_files_without_an_end_are_refused_and_not_read(reader, kind, tmp_path) -> None:
    name, action = READERS[reader]
    if kind == "pipe" and reader in ("config", "manifest"):
        pytest.skip("the user may name a pipe")
    if reader in ("tokenizer", "template"):
        write_folder(tmp_path)
        (tmp_path / name).unlink(missing_ok=True)
    ENDLESS[kind](tmp_path / name)
    with pytest.raises((UserError, ValueError), match=name):
        action(tmp_path / name)


@pytest.mark.parametrize("kind", ENDLESS)
@pytest.mark.parametrize("place", ["sealed.json", "file"])
def test_a_seal_that_names_a_file_without_an_end_is_damaged(place, kind, tmp_path) -> None:
    (tmp_path / "sealed.json").write_text(json.dumps({"files": {"file": {"bytes": 0, "sha256": "x"}}}))
    (tmp_path / place).unlink(missing_ok=True)
    ENDLESS[kind](tmp_path / place)
    assert damage(tmp_path)
    assert origin_of(tmp_path).run is None


def test_a_pipe_that_the_user_names_is_read_up_to_the_limit(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(RAISED, "file_bytes=2000000")
    for size, fits in ((2_000_000, True), (2_000_001, False)):
        path = tmp_path / str(size)
        os.mkfifo(path)
        writer = threading.Thread(target=_written, args=(path, size), daemon=True)
        writer.start()
        if fits:
            assert len(read_within(path, pipe=True)) == size
        else:
            with pytest.raises(OSError, match="file_bytes"):
                read_within(path, pipe=True)
        writer.join()


def _written(path: Path, size: int) -> None:
    with contextlib.suppress(BrokenPipeError):
        path.write_bytes(bytes(size))
