"""Adapters, checkpoints and merged folders are those that were saved, for every command that reads them."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.comparison_runs import write_arm
from support.damage import ends
from support.finished_run import config_of, write_adapter, write_checkpoint, write_run
from support.planted import FORMS, zipped
from support.thinkers import write_folder

from omnimem.backbones.files import weights_digest
from omnimem.checksums import origin_of, seal
from omnimem.commands import ask, compare, evaluate, export, finetune, show_memory
from omnimem.config import dump
from omnimem.recall.renderer import write_mp4
from omnimem.recall.worlds import draw_world
from omnimem.run import RunFolder, plan, sha256

SETTINGS = "adapter_config.json"
COMMANDS = ("ask", "evaluate", "show_memory", "export")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a run, an exported adapter, a merged folder, a video and its manifest."""
    place = tmp_path_factory.mktemp("made")
    base = write_folder(place / "base", rates="tiny")
    run = write_run(place / "runs" / "x", base)
    for kind in ("adapter", "merged"):
        export.main(["--run", str(run.path), "--format", kind, "--out", str(place / kind)])
    write_mp4(draw_world(3, 8), place / "a.mp4")
    row = {"id": "a", "video": "a.mp4", "messages": [{"role": "user", "content": "?"}]}
    row["messages"].append({"role": "assistant", "content": "red"})
    (place / "test.jsonl").write_text(json.dumps(row) + "\n")
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("runs", "adapter", "merged"):
        shutil.copytree(made / name, tmp_path / name)
    (tmp_path / "c.yaml").write_text(dump(config_of(made / "base")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(name: str, made: Path, adapter: Path, base: Path | None = None) -> Callable[[], None]:
    """A command that reads an adapter."""
    base = base or made / "base"
    video, config = str(made / "a.mp4"), ["--config", "c.yaml", f"model.path={base}"]
    recall = f"evaluate.benchmarks=[{{name: recall, root: {made}}}]"
    return {
        "ask": lambda: ask.main(["--model", str(base), "--adapter", str(adapter), "--video", video, "?"]),
        "evaluate": lambda: evaluate.main([*config, recall, "--arm", "tuned", "--adapter", str(adapter)]),
        "show_memory": lambda: show_memory.main(
            [*config, "--video", video, "--adapter", str(adapter), "--tuned", "right", "--out", "m.html"]
        ),
        "export": lambda: export.main(
            ["--run", str(adapter.parent), "--format", "adapter", "--out", "out", "--model", str(base)]
        ),
    }[name]


def refused(action: Callable[[], object], capsys: pytest.CaptureFixture[str], *expected: str) -> str:
    code, lines = ends(action, capsys)
    assert code == 2, lines
    assert len(lines) == 1, lines
    assert ";" in lines[0]
    for each in expected:
        assert each in lines[0]
    return lines[0]


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


CHANGES: dict[str, Callable[[Path], object]] = {
    "lora_alpha": lambda folder: edit(folder / SETTINGS, lora_alpha=16.0),
    "use_rslora": lambda folder: edit(folder / SETTINGS, use_rslora=True),
    "r": lambda folder: edit(folder / SETTINGS, r=2),
    "target_modules": lambda folder: edit(folder / SETTINGS, target_modules=["q_proj", "v_proj"]),
    "init_lora_weights": lambda folder: edit(folder / SETTINGS, init_lora_weights="gaussian"),
    "weights": lambda folder: save_file(
        {name: 2 * each for name, each in load_file(folder / "adapter_model.safetensors").items()},
        folder / "adapter_model.safetensors",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("where", ["adapter", "runs/x/adapter", "runs/x/checkpoint-4"])
def test_an_edited_adapter_is_named_with_what_was_expected(where, change, made, place, capsys) -> None:
    CHANGES[change](place / where)
    name = SETTINGS if change != "weights" else "adapter_model.safetensors"
    line = refused(command("ask", made, place / where), capsys, str(place / where), name)
    assert "sealed as" in line or "bytes" in line


@pytest.mark.parametrize("name", ["evaluate", "show_memory", "export"])
def test_every_command_checks_the_adapter(name, made, place, capsys) -> None:
    CHANGES["lora_alpha"](place / "runs/x/adapter")
    refused(command(name, made, place / "runs/x/adapter"), capsys, SETTINGS)
    assert not (place / "out").exists()


def test_an_adapter_of_another_run_or_step_is_recognised(made, place, capsys) -> None:
    """Whole folders that are intact, at the place of another."""
    own, checkpoint = place / "runs/x/adapter", place / "runs/x/checkpoint-4"
    # 1. the checkpoint of the run in the place of its adapter
    shutil.rmtree(own)
    shutil.copytree(checkpoint, own)
    edit(place / "runs/x/run.json", adapter={"sha256": "0" * 64})
    refused(command("ask", made, own), capsys, "run.json describes 000000000000")
    refused(command("export", made, own), capsys, "run.json describes 000000000000")
    # 2. the adapter of another run
    edit(place / "runs/x/run.json", id="another")
    for name in ("evaluate", "show_memory", "ask", "export"):
        refused(command(name, made, own), capsys, "of another run (id 0123456789ab, not another)")
    # 3. a checkpoint under the name of another step
    edit(place / "runs/x/run.json", id="0123456789ab")
    moved = checkpoint.rename(checkpoint.with_name("checkpoint-6"))
    refused(command("ask", made, moved), capsys, "written after step 4")
    start = plan("x", resume="auto", runs=place / "runs")
    assert start.checkpoint is None
    assert "checkpoint-6 (it was written after step 4; now checkpoint-6.1)" in start.news


@pytest.mark.parametrize("name", COMMANDS)
def test_a_base_of_the_same_shape_and_other_weights_is_refused(name, made, place, tmp_path, capsys) -> None:
    other = write_folder(tmp_path / "other", rates="tiny", seed=5)
    refused(command(name, made, place / "runs/x/adapter", other), capsys, "made for another base than")


def test_a_run_is_not_continued_on_other_base_weights(made, place, capsys) -> None:
    base = tmp = place / "base"
    shutil.copytree(made / "base", tmp)
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    (place / "runs/x/config.yaml").unlink()
    given = ["--config", "c.yaml", f"model.path={base}", f"data.train={made}/test.jsonl", "--resume", "auto"]
    given += ["evaluate.after_training=false", "train.max_steps=8"]
    refused(lambda: finetune.main(given), capsys, "made for another base than", "checkpoint-4")
    assert not (place / "runs/x/config.yaml").exists()


def test_an_adapter_without_a_seal_is_accepted_with_one_line(made, place, capsys) -> None:
    folder = write_adapter(made / "base", place / "stock", seed=3)
    capsys.readouterr()
    command("ask", made, folder)()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert sum(line.startswith(f"warning: {folder}: has no sealed.json") for line in lines) == 1


@pytest.mark.parametrize("change", ["lora_alpha", "use_rslora", "r"])
def test_without_its_seal_an_adapter_of_a_run_is_held_against_the_config(change, made, place, capsys) -> None:
    (place / "runs/x/adapter/sealed.json").unlink()
    CHANGES[change](place / "runs/x/adapter")
    for name in ("ask", "export"):
        refused(command(name, made, place / "runs/x/adapter"), capsys, SETTINGS, change)


def test_a_comparison_says_when_answers_are_of_other_weights(place, capsys) -> None:
    run = RunFolder(path=place / "runs/x")
    own = sha256(run.adapter, suffixes=(".safetensors",))
    edit(run.record, adapter={"sha256": own})
    answered = {"training_free": {"base": "b" * 64}, "tuned": {"base": "b" * 64, "adapter": own}}
    for arm, digests in answered.items():
        edit(write_arm(run.path, arm, videos=2) / "summary.json", provenance={"sha256": digests})
    given = [str(run.path), "--out", "compared", "--draws", "100"]
    compare.main(given)
    # 1. the adapter has changed since
    weights = run.adapter / "adapter_model.safetensors"
    save_file({name: 2 * each for name, each in load_file(weights).items()}, weights)
    code, lines = ends(lambda: compare.main(given), capsys)
    assert code == 2
    assert f"tuned: answered by adapter {own[:12]}" in lines[0]
    # 2. another base
    edit(run.evaluation("tuned") / "summary.json", provenance={"sha256": {"base": "c" * 64}})
    code, lines = ends(lambda: compare.main(given), capsys)
    assert code == 2
    assert "answered by another base (sha256 " in lines[0]


@pytest.mark.parametrize("table", [{}, {"files": {}}, {"files": {"../x": {"bytes": 1, "sha256": "x"}}}, [], "x"])
def test_a_seal_that_does_not_list_the_adapter_is_refused(table, made, place, capsys) -> None:
    (place / "adapter/sealed.json").write_text(json.dumps(table))
    refused(command("ask", made, place / "adapter"), capsys, "sealed.json")


def test_an_export_says_its_run_step_and_base(made) -> None:
    for kind in ("adapter", "merged"):
        origin = origin_of(made / kind)
        assert (origin.run, origin.step) == ("0123456789ab", 8)
        assert origin.base == weights_digest(str(made / "base"))
    sealed = json.loads((made / "merged/sealed.json").read_text())
    assert {"model.safetensors", "config.json", "omnimem.json", "tokenizer.json"} <= set(sealed["files"])


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "omnimem.json"])
def test_an_edited_merged_folder_is_refused(name, made, place, capsys) -> None:
    path = place / "merged" / name
    data = bytearray(path.read_bytes())
    data[-2:] = data[-2:][::-1] if name.endswith("safetensors") and data[-1] != data[-2] else b" " + data[-1:]
    path.write_bytes(data)
    (place / "merged/README.md").write_text("mine")  # may be edited
    refused(lambda: ask.main(["--model", str(place / "merged"), "--video", str(made / "a.mp4"), "?"]), capsys, name)


def test_the_digest_of_a_base_does_not_depend_on_its_shards_but_on_every_weight(tmp_path) -> None:
    whole = write_folder(tmp_path / "whole", rates="tiny")
    expected = weights_digest(str(whole))
    tensors = load_file(whole / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for part, own in parts.items():
        save_file({name: tensors[name] for name in own}, whole / part)
    index = {"metadata": {}, "weight_map": {name: part for part, own in parts.items() for name in own}}
    (whole / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights_digest(str(whole)) == expected
    large, found = tmp_path / "large", set()
    large.mkdir()
    for changed in (None, 0, -1):  # of a tensor of which samples are read: first and last are among them
        tensor = torch.zeros(200_000)
        if changed is not None:
            tensor[changed] = 1.0
        save_file({"w": tensor}, large / "model.safetensors")
        found.add(weights_digest(str(large)))
    assert len(found) == 3


def test_a_resumed_run_keeps_its_id(place) -> None:
    def started() -> str | None:
        plan("x", resume="auto", runs=place / "runs").open("name: x\n", {"seed": 1}, patience=0.0)
        return RunFolder(path=place / "runs/x").id

    assert started() == started() == "0123456789ab"
    (place / "runs/x/run.json").unlink()  # lost: the checkpoint knows it
    assert started() == "0123456789ab"


def test_checkpoints_of_earlier_versions_are_accepted(made, place) -> None:
    run = RunFolder(path=place / "runs/x")
    sealed = run.checkpoint(4) / "sealed.json"
    sealed.write_text(json.dumps({"files": json.loads(sealed.read_text())["files"]}))
    assert run.defect(run.checkpoint(4)) is None
    assert run.defect(write_checkpoint(run, made / "base", 6)) is None


def plants(*names: str) -> pytest.MarkDecorator:
    """Every command with every file, by the forms of pickles in turn (unit/training/test_pickles.py has them all)."""
    pairs = itertools.product(COMMANDS, names)
    return pytest.mark.parametrize(
        ("name", "planted", "form"), [(*pair, form) for pair, form in zip(pairs, itertools.cycle(FORMS), strict=False)]
    )


@plants("adapter_model.bin", "adapter_model.safetensors", SETTINGS)
def test_a_pickle_in_an_adapter_runs_nothing(name, planted, form, made, place, capsys) -> None:
    folder = place / "runs/x/adapter"
    for each in ("sealed.json", "adapter_model.safetensors" if planted.endswith(".bin") else planted):
        (folder / each).unlink()
    edit(place / "runs/x/run.json", adapter=None)
    form(folder / planted, place / "ran")
    refused(command(name, made, folder), capsys, "adapter")
    assert not (place / "ran").exists()


@plants("pytorch_model.bin", "model.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json")
def test_a_pickle_in_a_base_runs_nothing(name, planted, form, made, place, capsys) -> None:
    base = Path(shutil.copytree(made / "base", place / "base"))
    (base / ("model.safetensors" if planted.endswith(".bin") else planted)).unlink()
    form(base / planted, place / "ran")
    refused(command(name, made, place / "runs/x/adapter", base), capsys, str(base))
    assert not (place / "ran").exists()


@pytest.mark.parametrize("planted", ["optimizer.pt", "rng_state.pth", "global_step4/mp_rank_00_model_states.pt"])
@pytest.mark.parametrize("deepspeed", [False, True])
def test_a_pickle_in_a_checkpoint_runs_nothing_when_the_run_goes_on(deepspeed, planted, made, place, capsys) -> None:
    checkpoint = place / "runs/x/checkpoint-4"
    (checkpoint / planted).parent.mkdir(exist_ok=True)
    zipped(checkpoint / planted, place / "ran")
    (checkpoint / "latest").write_text("global_step4")
    (checkpoint / "global_step4").mkdir(exist_ok=True)
    seal(checkpoint, origin_of(checkpoint))
    config = (place / "runs/x/config.yaml").rename(place / "config.yaml")  # of another data.train
    given = ["--config", "c.yaml", f"data.train={made}/test.jsonl", "--resume", "auto", "train.max_steps=8"]
    given += ["evaluate.after_training=false", *(["train.deepspeed=deepspeed/zero2.json"] if deepspeed else [])]
    refused(lambda: finetune.main(given), capsys, f"{planted} holds posix.system")
    config.rename(place / "runs/x/config.yaml")
    if planted == "rng_state.pth" and not deepspeed:  # once: an export reads no such file
        export.main(["--run", "runs/x", "--format", "adapter", "--out", "out", "--checkpoint", "4"])
    assert not (place / "ran").exists()
