"""Every file of a run, an export and a model, damaged in every way: a line with its name and the cure, exit code 2."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import pytest
from support.comparison_runs import write_arm, write_trace
from support.damage import DAMAGE, damaged, ends, permissions_hold
from support.finished_run import config_of, write_run
from support.thinkers import write_folder

from omnimem.backbones import ModelOptions, load_backbone
from omnimem.checksums import damage
from omnimem.cli.eval_fingerprint import EvalFingerprint
from omnimem.commands import ask, compare, export
from omnimem.config import dump, load, refuse_changes
from omnimem.evaluation.results import Results
from omnimem.evaluation.sharding import Shard
from omnimem.recall.renderer import write_mp4
from omnimem.recall.worlds import draw_world
from omnimem.run import RunFolder, plan, sha256
from omnimem.training.portable import Layout, layout_of

MODEL = (
    "config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
)
# Readers of a run folder, and the files that each reads
RESUMED = ("run.json", "metrics.jsonl", "config.yaml")
EXPORTED = (
    "run.json",
    "config.yaml",
    "budget.json",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "eval/tuned/summary.json",
    "compare/summary.json",
)
COMPARED = (
    "eval/tuned/summary.json",
    "eval/tuned/recall.jsonl",
    "eval/tuned/trace.json",
    "budget.json",
    "metrics.jsonl",
)
NOT_REFUSED = {
    ("metrics.jsonl", "folder"),
    ("metrics.jsonl", "empty"),
    ("metrics.jsonl", "object"),
    ("metrics.jsonl", "cut"),
}


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("base") / "base", rates="tiny")


@pytest.fixture(scope="session")
def whole(tmp_path_factory, base) -> Path:
    """A run with all files, which the tests copy."""
    place = tmp_path_factory.mktemp("whole") / "runs"
    folder = write_run(place / "x", base)
    folder.metrics.write_text("".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in range(1, 9)))
    for arm in ("tuned", "training_free"):
        write_arm(folder.path, arm, videos=2, per_kind=1)
    write_trace(folder.evaluation("tuned"))
    compare.main([str(folder.path), "--out", str(folder.comparison), "--draws", "100"])
    return place


@pytest.fixture
def run(whole, tmp_path) -> RunFolder:
    shutil.copytree(whole, tmp_path / "runs")
    return RunFolder(path=tmp_path / "runs" / "x")


@pytest.fixture(autouse=True)
def no_privilege() -> Iterator[None]:
    """As root, files without permission cannot be read either."""
    with permissions_hold() if os.geteuid() == 0 else nullcontext():
        yield


def check(command: Callable[[], object], path: Path, capsys, *, refused: bool = True) -> None:
    code, lines = ends(command, capsys)
    assert code == (2 if refused else 0), lines
    assert lines
    assert all(path.name in line or path.parent.name in line for line in lines), lines
    assert all(len(line) < 600 for line in lines), lines
    assert any(";" in line or "expected" in line for line in lines), lines


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", RESUMED)
def test_a_run_with_a_damaged_file_can_be_continued(name, how, run, base, capsys) -> None:
    settings = config_of(base)

    def resume() -> None:
        start = plan("x", resume="auto", runs=run.path.parent)
        if start.resumed and run.config.exists():
            refuse_changes(settings, run.config)
        start.open(dump(settings), {"seed": 1}, patience=0.0)

    damaged(run.path / name, how)
    if name == "config.yaml":
        check(resume, run.config, capsys)
        shutil.rmtree(run.config) if run.config.is_dir() else run.config.unlink()  # as the message says
    if name == "metrics.jsonl" and how in ("folder", "no permission"):
        check(resume, run.metrics, capsys)
        shutil.rmtree(run.metrics) if run.metrics.is_dir() else run.metrics.unlink()
    code, lines = ends(resume, capsys)
    assert code == 0
    assert json.loads(run.record.read_text())["seed"] == 1
    assert all(name in line for line in lines), lines
    kept = run.metrics.read_text().splitlines() if run.metrics.exists() else []
    assert all(json.loads(line)["step"] <= 4 for line in kept)
    if name == "run.json" and how != "object":  # all its keys are optional
        assert run.record.with_name("run.json.1").exists()
        assert lines


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", EXPORTED)
def test_an_export_of_a_damaged_run_is_refused(name, how, run, tmp_path, capsys) -> None:
    if name.startswith(("eval", "compare")):  # only results of these weights are read
        tuned = run.evaluation("tuned") / "summary.json"
        record = json.loads(tuned.read_text())
        record["provenance"]["sha256"] = {"adapter": sha256(run.adapter, suffixes=(".safetensors",))}
        tuned.write_text(json.dumps(record))
    damaged(run.path / name, how)
    out = tmp_path / "out"
    unread = name.startswith(("eval", "compare")) and (how == "folder" or (name[0], how) == ("e", "object"))
    check(
        lambda: export.main(["--run", str(run.path), "--format", "adapter", "--out", str(out)]),
        run.path / name,
        capsys,
        refused=True,
    ) if not unread else None
    assert unread or not out.exists()
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", COMPARED)
def test_a_comparison_of_a_damaged_run_is_refused(name, how, run, tmp_path, capsys) -> None:
    damaged(run.path / name, how)

    def compared() -> None:
        compare.main([str(run.path), "--out", str(tmp_path / "out"), "--draws", "100"])

    if (name, how) in NOT_REFUSED or (name, how) == ("budget.json", "folder"):
        assert ends(compared, capsys)[0] == 0  # without training curves or budget
        return
    check(compared, run.path / name, capsys)


@pytest.mark.parametrize("how", DAMAGE)
def test_results_with_damaged_settings_are_moved_aside(how, run, capsys) -> None:
    target = run.evaluation("tuned")
    (target / "setting.json").write_text('{"benchmarks": {}}')
    damaged(target / "setting.json", how)

    def prepare() -> None:
        fingerprint = EvalFingerprint(run=load(run.config, ["train={}"]), folder=run, adapter=run.adapter)
        settings = {"benchmarks": {}}
        vars(fingerprint)["_of"] = lambda arm, tuned: settings  # not of interest here
        arm = type("Arm", (), {"name": "tuned"})()
        EvalFingerprint.prepare(fingerprint, [(arm, True)], leading=True)

    assert ends(prepare, capsys)[0] == 0
    assert (run.path / "eval_earlier" / "tuned.1" / "recall.jsonl").is_file()
    assert json.loads((target / "setting.json").read_text()) == {"benchmarks": {}}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_export_is_refused(how, run, base, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    export.main(["--run", str(run.path), "--format", "adapter", "--out", str(out)])
    damaged(out / "omnimem.json", how)
    write_mp4(draw_world(0, 4), tmp_path / "clip.mp4")
    given = ["--model", str(base), "--adapter", str(out), "--video", str(tmp_path / "clip.mp4"), "What?"]
    if how == "folder":
        assert ends(lambda: ask.main(given), capsys)[0] == 2
        return
    check(lambda: ask.main(given), out / "omnimem.json", capsys)


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", MODEL)
def test_a_damaged_model_folder_is_refused(name, how, tmp_path, capsys) -> None:
    folder = write_folder(tmp_path / "model", rates="tiny", hub=True)
    damaged(folder / name, how)
    unread = {("tokenizer_config.json", "object"), ("chat_template.jinja", "object")}
    if (name, how) in unread and name == "tokenizer_config.json":
        return
    code, lines = ends(lambda: load_backbone(ModelOptions(path=str(folder))), capsys)
    assert code == 2, lines
    assert len(lines) == 1
    assert ";" in lines[0]
    assert "template" in lines[0] or name in lines[0] or str(folder) in lines[0]


@pytest.mark.parametrize("how", [*DAMAGE, "infinite", "odd names"])
def test_a_damaged_seal_makes_a_checkpoint_damaged(how, run) -> None:
    checkpoint = run.checkpoint(4)
    seal = checkpoint / "sealed.json"
    special = {
        "infinite": '{"files": {"a": {"bytes": Infinity, "sha256": "x"}}}',
        "odd names": json.dumps({"files": {"a\x00b": {"bytes": 1, "sha256": "x"}}}),
    }
    seal.write_text(special[how]) if how in special else damaged(seal, how)
    assert damage(checkpoint) is not None
    assert plan("x", resume="auto", runs=run.path.parent).checkpoint is None


ANSWERED = {
    **dict.fromkeys(("id", "video", "stream", "prompt_sha256", "answer", "kind", "prediction"), "x"),
    **dict.fromkeys(("correct", "parsed", "counted", "bare"), True),
    **dict.fromkeys(("stream_seconds", "peak_entries", "entries", "audio_seconds"), 1.5),
    **{"bytes": 3, "frames": 4, "peak_memory": None, "categories": {"kind": ["x"]}},
    "tokens_in": {"audio": 1, "visual": 2},
    "kept": {"audio": 1.5, "visual": 2},
    "seconds": dict.fromkeys(("media", "reading", "first_token", "answer"), 0.5),
}
LINES = {
    **{f"without {key}": {name: value for name, value in ANSWERED.items() if name != key} for key in ANSWERED},
    **{f"{key} of another type": {**ANSWERED, key: [1]} for key in ANSWERED},
    **{f"a {type(value).__name__}": value for value in (None, 3, "x", [ANSWERED], {}, True)},
    "a failure without its message": {**ANSWERED, "failed": "missing"},
    "infinite seconds": {**ANSWERED, "stream_seconds": float("inf")},
}


@pytest.mark.parametrize("what", LINES)
def test_a_damaged_result_line_is_named_with_its_number(what, tmp_path, capsys) -> None:
    path = tmp_path / "recall.jsonl"
    path.write_text(json.dumps(ANSWERED) + "\n")
    assert Results(tmp_path, "recall", [], Shard()).answered() == {"x"}
    path.write_text(json.dumps(ANSWERED) + "\n" + json.dumps(LINES[what]) + "\n" + json.dumps(ANSWERED) + "\n")
    code, lines = ends(lambda: Results(tmp_path, "recall", [], Shard()).answered(), capsys)
    assert code == 2
    (line,) = lines
    assert line.startswith(f"{path}:2")
    assert "delete the line" in line


FACTS = {
    "layout": asdict(Layout(ranks=1, stage=None, batch=1, accumulated=2, optimizer="a", precision="fp32")),
    "step": 4,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_facts_of_a_checkpoint_are_named(how, tmp_path, capsys) -> None:
    path = tmp_path / "portable.json"
    path.write_text(json.dumps(FACTS))
    found = layout_of(tmp_path)
    assert found is not None
    assert found.accumulated == 2
    damaged(path, how)
    if how == "folder":  # as without the file
        assert layout_of(tmp_path) is None
        return
    code, (line,) = ends(lambda: layout_of(tmp_path), capsys)
    assert code == 2
    assert line.startswith(f"{path}")
    assert "--resume auto" in line
