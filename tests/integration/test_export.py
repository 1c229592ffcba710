"""Exports: the same model with the same memory elsewhere, or nothing at all."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from support.comparison_runs import write_arm
from support.finished_run import config_of, write_adapter, write_run
from support.models import assert_equal_logits
from support.thinkers import write_folder
from torch import Tensor

from omnimem.backbones import Backbone, ModelOptions, Turn, load_backbone
from omnimem.budget import Budget
from omnimem.cli.model_card import TASK
from omnimem.commands import export
from omnimem.commands.export import main
from omnimem.comparison import compare
from omnimem.config import ConfigError
from omnimem.config.exported import Exported
from omnimem.config.policy import policy_options
from omnimem.policies import PerturbationOptions, PolicyOptions, perturbation
from omnimem.policies.base import Policy
from omnimem.recall.renderer import write_mp4
from omnimem.recall.worlds import draw_world
from omnimem.run import RunError, RunFolder, read_json, sha256, update_json
from omnimem.selection import SelectionOptions
from omnimem.streaming.attach import attach
from omnimem.streaming.feeder import Feeder
from omnimem.tuning import AdapterError, load_adapter

CHANGED = ("q_proj", "v_proj", "down_proj")  # of the text model, by support.finished_run.LORA


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_folder(tmp_path_factory.mktemp("base") / "thinker", rates="tiny")
    (folder / "generation_config.json").write_text('{"do_sample": false, "max_new_tokens": 7}')
    (folder / "LICENSE").write_text("yours")
    (folder / "notes.txt").write_text("ours")
    return folder


@pytest.fixture(scope="module")
def done(base: Path) -> RunFolder:
    return write_run(base.parent / "runs" / "x", base)


@pytest.fixture(scope="module")
def video(base: Path) -> Path:
    path = base.parent / "video.mp4"
    write_mp4(draw_world(3, 16), path)
    return path


def exported_to(out: Path, done: RunFolder, kind: str, *more: str) -> Exported:
    main(["--run", str(done.path), "--format", kind, "--out", str(out), *more])
    return Exported.read(out)


@pytest.fixture(scope="module")
def merged(done: RunFolder, base: Path) -> Path:
    exported_to(base.parent / "merged", done, "merged")
    return base.parent / "merged"


@pytest.fixture(scope="module")
def adapter(done: RunFolder, base: Path) -> Path:
    exported_to(base.parent / "adapter", done, "adapter")
    return base.parent / "adapter"


@torch.no_grad()
def heard(backbone: Backbone, exported: Exported, policy: Policy, video: Path) -> Tensor:
    """Logits of a question after a real file, under a policy."""
    feeder = Feeder(backbone, exported.stream)
    with attach(backbone.text_model) as attached:
        stream = feeder.stream(attached, policy)
        for chunk in feeder.watch(video):
            stream.feed(chunk)
        return backbone.head(stream.ask(feeder.prompt([[Turn(text="what ?")]], "both")).hidden)


def tuned(base: Path, folder: Path) -> Backbone:
    backbone = load_backbone(ModelOptions(path=str(base)))
    load_adapter(backbone.model, folder)
    return backbone


def test_merged_answers_a_file_as_base_and_adapter_do_under_the_same_memory(base, done, merged, video) -> None:
    exported = Exported.read(merged)
    run = config_of(base)
    policy = run.memory.policy.build(Budget.read(done.budget))
    expected = heard(tuned(base, done.adapter), exported, policy, video)
    assert_equal_logits(heard(load_backbone(exported.model), exported, exported.policy, video), expected)
    untuned = heard(load_backbone(run.model), exported, policy, video)
    assert float((expected - untuned).abs().max()) > 0.01, "the adapter changes nothing, so nothing was shown"
    whole = heard(tuned(base, done.adapter), exported, exported.policies(None), video)
    assert float((expected - whole).abs().max()) > 0.01, "nothing was evicted, so no memory was shown"


@pytest.mark.slow
@pytest.mark.parametrize(("tied", "hub"), [(True, False), (True, True), (False, True)])
def test_bases_as_the_hub_lays_them_out_are_merged_too(tmp_path, video, tied, hub) -> None:
    other = write_folder(tmp_path / "base", rates="tiny", tied=tied, hub=hub, seed=4)
    run = write_run(tmp_path / "run", other)
    exported = exported_to(tmp_path / "out", run, "merged")
    expected = heard(tuned(other, run.adapter), exported, exported.policy, video)
    assert_equal_logits(heard(load_backbone(exported.model), exported, exported.policy, video), expected)


def test_merged_weights_have_the_bases_names_and_only_the_targets_changed(base, merged) -> None:
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    targets = {name for name in before if name.startswith("model.layers") and name.split(".")[-2] in CHANGED}
    assert changed == {name for name in targets if "bias" not in name}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 asks for it
def test_peft_loads_an_exported_adapter(base, adapter, video) -> None:
    exported = Exported.read(adapter)
    assert exported.model.path == str(base.resolve())
    backbone = load_backbone(exported.model)
    PeftModel.from_pretrained(backbone.model, str(adapter)).eval()
    expected = heard(tuned(base, adapter), exported, exported.policy, video)
    assert_equal_logits(heard(backbone, exported, exported.policy, video), expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 asks for it
def test_projectors_are_exported_as_adapter_and_merged_under_the_names_of_the_base(base, video, tmp_path) -> None:
    run = config_of(base)
    lora = replace(run.tuning.lora, modules_to_save=("visual_projector", "audio_projector"))
    done = write_run(tmp_path / "run", base, replace(run, tuning=replace(run.tuning, lora=lora)))
    exported = exported_to(tmp_path / "merged", done, "merged")
    expected = heard(tuned(base, done.adapter), exported, exported.policy, video)
    assert_equal_logits(heard(load_backbone(exported.model), exported, exported.policy, video), expected)
    before, after = (load_file(place / "model.safetensors") for place in (base, tmp_path / "merged"))
    assert before.keys() == after.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    encoders = {name for name in changed if name.startswith(("visual.", "audio_tower."))}
    assert encoders == {name for name in before if "visual.merger." in name or "audio_tower.proj." in name}
    adapter = exported_to(tmp_path / "adapter", done, "adapter")
    backbone = load_backbone(adapter.model)
    PeftModel.from_pretrained(backbone.model, str(tmp_path / "adapter")).eval()
    assert_equal_logits(heard(backbone, adapter, adapter.policy, video), expected)


def test_an_adapter_is_exported_with_the_names_of_the_release(base, done, tmp_path) -> None:
    exported = exported_to(tmp_path / "a", done, "adapter", "--names", "released")
    names = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.thinker.model.layers.") for name in names)
    assert exported.verified["adapter_effect"] > 0.01 > exported.verified["difference"]
    with pytest.raises(RunError, match="--names released is for --format adapter"):
        exported_to(tmp_path / "b", done, "merged", "--names", "released")


def test_omnimem_json_says_which_memory_and_where_from(base, done, merged) -> None:
    exported, run = Exported.read(merged), config_of(base)
    written_out = replace(run.memory, policy=run.memory.policy.written_out())
    assert (exported.stream, exported.memory, exported.max_new_tokens) == (run.stream, written_out, 5)
    assert exported.budget == Budget.read(done.budget)
    assert exported.policy == run.memory.policy.build(Budget.read(done.budget))
    assert exported.policies(None).budget is None
    origin = exported.origin
    assert (origin.kind, origin.base, origin.base_revision, origin.step) == ("merged", str(base.resolve()), None, 8)
    assert origin.base_sha256 == sha256(base, suffixes=(".safetensors",))
    assert origin.adapter_sha256 == sha256(done.adapter, suffixes=(".safetensors",))
    assert origin.run == read_json(done.record)
    assert exported.verified["difference"] <= 1e-5
    assert exported.verified["adapter_effect"] > 0.01


@pytest.fixture(scope="module")
def by_base(base: Path) -> RunFolder:
    """A run whose tokens are chosen by the base."""
    run = config_of(base)
    run = replace(run, memory=replace(run.memory, selection_from="base"))
    hard = replace(run.tuning, selection=SelectionOptions(softening="hard"))
    return write_run(base.parent / "runs" / "by_base", base, replace(run, tuning=hard))


def test_an_adapter_keeps_selection_by_the_base_and_the_card_says_so(base, by_base, adapter, video) -> None:
    exported = exported_to(base.parent / "chosen", by_base, "adapter")
    assert exported.memory.selection_from == "base"
    assert "| selection | by the base without the adapter" in (base.parent / "chosen" / "README.md").read_text()
    own = Exported.read(adapter)
    assert own.memory.selection_from == "tuned"
    backbone = tuned(base, base.parent / "chosen")
    chosen, usual = (heard(backbone, each, each.policy, video) for each in (exported, own))
    assert float((chosen - usual).abs().max()) > 1e-3


def test_merged_weights_hold_no_base_to_choose_by(base, by_base, merged, tmp_path) -> None:
    with pytest.raises(AdapterError, match=r"^memory.selection_from = base needs .*; export with --format adapter$"):
        exported_to(tmp_path / "out", by_base, "merged")
    assert not (tmp_path / "out").exists()
    table = json.loads((merged / "omnimem.json").read_text())
    table["memory"]["selection_from"] = "base"
    (tmp_path / "omnimem.json").write_text(json.dumps(table))
    with pytest.raises(ConfigError, match=r"omnimem.json memory.selection_from: base needs .*; set it to tuned"):
        Exported.read(tmp_path)


def test_an_export_means_the_same_when_a_preset_changes(adapter, monkeypatch) -> None:
    before = Exported.read(adapter).policy
    monkeypatch.setitem(perturbation.PRESETS, "omnimem", {**perturbation.OURS, "coverage": 0.9, "sharpness": 0.7})
    assert Exported.read(adapter).policy == before
    assert PerturbationOptions().build(before.budget) != before


def test_an_export_of_format_1_discounts_every_token_as_it_did(adapter, tmp_path) -> None:
    table = json.loads((adapter / "omnimem.json").read_text())
    for option in ("coverage_above", "compared", "sketch_bits", "query_stride"):
        del table["memory"]["policy"][option]
    table["memory"]["policy"]["feature"] = None
    table["format"] = "omnimem export 1"
    (tmp_path / "omnimem.json").write_text(json.dumps(table))
    assert Exported.read(tmp_path).policy.scorer.above == -1
    assert Exported.read(adapter).policy.scorer.above == 0.5


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("feature", [None, 16])
def test_an_export_before_format_3_compares_layer_inputs_as_it_did(number, feature, adapter, tmp_path) -> None:
    table = json.loads((adapter / "omnimem.json").read_text())
    for option in ("compared", "sketch_bits", "query_stride"):
        del table["memory"]["policy"][option]
    table["memory"]["policy"]["feature"] = feature
    table["format"] = f"omnimem export {number}"
    (tmp_path / "omnimem.json").write_text(json.dumps(table))
    old, now = Exported.read(tmp_path).policy, Exported.read(adapter).policy
    assert (old.scorer.compared, old.measures.sketch, old.measures.feature) == ("inputs", False, feature)
    assert (now.scorer.compared, now.measures.sketch, now.measures.feature) == ("sketch", 4, 192)


def test_an_export_of_format_4_measures_all_queries_as_it_did(adapter, tmp_path, monkeypatch) -> None:
    table = json.loads((adapter / "omnimem.json").read_text())
    del table["memory"]["policy"]["query_stride"]
    table["format"] = "omnimem export 4"
    (tmp_path / "omnimem.json").write_text(json.dumps(table))
    monkeypatch.setitem(perturbation.PRESETS, "omnimem", {**perturbation.OURS, "query_stride": 8})
    assert Exported.read(tmp_path).policy.measures.query_stride == 1


def test_an_export_of_format_3_compares_sketches_of_16_bits_as_it_did(adapter, tmp_path) -> None:
    table = json.loads((adapter / "omnimem.json").read_text())
    del table["memory"]["policy"]["sketch_bits"], table["memory"]["policy"]["query_stride"]
    table["memory"]["policy"]["feature"] = 128
    table["format"] = "omnimem export 3"
    (tmp_path / "omnimem.json").write_text(json.dumps(table))
    old = Exported.read(tmp_path).policy
    assert (old.scorer.compared, old.measures.sketch, old.measures.feature) == ("sketch", 16, 128)


@pytest.mark.parametrize("name", ["distinct", "snapkv"])
def test_an_export_of_format_1_under_another_policy_is_read_as_it_is(name, adapter, tmp_path) -> None:
    table = json.loads((adapter / "omnimem.json").read_text())
    table["memory"]["policy"] = TypeAdapter(PolicyOptions).dump_python(policy_options(name), mode="json")
    table["format"] = "omnimem export 1"
    (tmp_path / "omnimem.json").write_text(json.dumps(table))
    assert Exported.read(tmp_path).memory.policy == policy_options(name)


def test_a_checkpoint_is_exported_by_its_step(done, tmp_path) -> None:
    exported = exported_to(tmp_path / "out", done, "adapter", "--checkpoint", "4")
    assert exported.origin.step == 4
    saved, adapter = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out", done.adapter))
    assert any(not torch.equal(saved[name], adapter[name]) for name in saved)


@pytest.mark.slow
def test_a_merge_in_fewer_bits_is_held_against_what_the_adapter_does(done, tmp_path, monkeypatch) -> None:
    exported = exported_to(tmp_path / "out", done, "merged", "--dtype", "bfloat16")
    assert exported.model.dtype == "bfloat16"
    assert 1e-5 < exported.verified["difference"] < 0.5 * exported.verified["adapter_effect"]
    monkeypatch.setattr(export, "LOST", 0.0)
    with pytest.raises(AdapterError, match=r"bfloat16, the adapter is lost: .*; give --dtype float32, or --format a"):
        exported_to(tmp_path / "lost", done, "merged", "--dtype", "bfloat16")


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_the_card_is_one_that_the_hub_reads_and_its_code_runs(base, video, kind, request, capsys) -> None:
    folder: Path = request.getfixturevalue(kind)
    card = (folder / "README.md").read_text()
    read = ModelCard(card).data
    assert (read.library_name, read.pipeline_tag) == ("transformers" if kind == "merged" else "peft", TASK)
    assert "lora" not in read.tags if kind == "merged" else "lora" in read.tags
    assert str(base.parent) not in card, "a path of this machine means nothing elsewhere"
    assert "base_model" not in yaml.safe_load(card.split("---\n")[1])
    assert "These weights were not evaluated" in card
    assert sha256(base, suffixes=(".safetensors",)) in card
    assert "| slots per layer | 12, 24 over 2 layers |" in card
    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace("DIR", repr(str(folder))).replace("FILE", repr(str(video)))
    exec(compile(code, "card", "exec"), {})
    assert len(capsys.readouterr().out.strip()) > 2


def test_the_card_carries_the_results_of_these_weights_and_of_no_others(base, tmp_path) -> None:
    run = write_run(tmp_path / "run", base)
    for arm in ("full_memory", "training_free", "tuned"):
        write_arm(run.path, arm)
    path = run.evaluation("tuned") / "summary.json"
    compare([run.path], run.comparison, draws=200)
    exported_to(tmp_path / "another", run, "adapter")
    assert "These weights were not evaluated" in (tmp_path / "another" / "README.md").read_text()
    evaluated = json.loads(path.read_text())
    evaluated["provenance"]["sha256"] = {"adapter": sha256(run.adapter, suffixes=(".safetensors",))}
    path.write_text(json.dumps(evaluated))
    exported_to(tmp_path / "same", run, "adapter")
    text = (tmp_path / "same" / "README.md").read_text()
    recall = read_json(run.comparison / "summary.json")["benchmarks"]["recall"]
    (found,) = ModelCard(text).data.eval_results
    assert found.dataset_name == "recall"
    assert found.metric_value == pytest.approx(100 * recall["arms"]["tuned"]["strict"], abs=0.01)
    pair = next(p for p in recall["pairs"] if (p["a"], p["b"]) == ("tuned", "training_free"))
    assert f"- tuned against untouched on recall: {100 * pair['diff']:+.1f} points" in text.replace("\u2212", "-")
    assert f": {pair['verdict']}\n" in text
    exported_to(tmp_path / "checkpoint", run, "adapter", "--checkpoint", "4")
    text = (tmp_path / "checkpoint" / "README.md").read_text()
    assert "These weights were not evaluated" in text
    assert "| validation |" not in text
    record = json.loads(run.record.read_text())
    run.record.write_text(json.dumps({**record, "best_checkpoint": {"step": 4, "value": 1.25, "metric": "loss"}}))
    exported_to(tmp_path / "best", run, "adapter", "--checkpoint", "best")
    assert "| validation | loss 1.25, the best of the run |" in (tmp_path / "best" / "README.md").read_text()


def test_the_cards_of_a_checkpoint_and_of_the_final_adapter_keep_their_own_results(base, tmp_path) -> None:
    run = write_run(tmp_path / "run", base)
    for arm in ("training_free", "tuned", "tuned@checkpoint-4"):
        write_arm(run.path, arm)
        weights = run.checkpoint(4) if "@" in arm else run.adapter
        path = run.evaluation(arm) / "summary.json"
        evaluated = json.loads(path.read_text())
        evaluated["provenance"]["sha256"] = {"adapter": sha256(weights, suffixes=(".safetensors",))}
        path.write_text(json.dumps(evaluated))
    compare([run.path], run.comparison, draws=200)
    recall = read_json(run.comparison / "summary.json")["benchmarks"]["recall"]
    for arm, given in (("tuned", ()), ("tuned@checkpoint-4", ("--checkpoint", "best"))):
        update_json(run.record, best_checkpoint={"step": 4, "metric": "loss", "value": 1.0})
        exported_to(tmp_path / arm, run, "adapter", *given)
        text = (tmp_path / arm / "README.md").read_text()
        (found,) = ModelCard(text).data.eval_results
        assert found.metric_value == pytest.approx(100 * recall["arms"][arm]["strict"], abs=0.01)
        pair = next(p for p in recall["pairs"] if (p["a"], p["b"]) == (arm, "training_free"))
        assert f"- tuned against untouched on recall: {100 * pair['diff']:+.1f} points" in text.replace("\u2212", "-")


@pytest.mark.parametrize("there", ["file", "folder"])
def test_what_is_there_is_not_overwritten(done, tmp_path, there) -> None:
    kept = tmp_path / "out" if there == "file" else tmp_path / "out" / "mine.txt"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    with pytest.raises(RunError, match=r"out exists already and is not empty; give another --out, or remove it first"):
        exported_to(tmp_path / "out", done, "adapter")
    assert kept.read_text() == "mine"


def spoilt(name: str) -> Callable[..., Any]:
    """Spoils one weight of what is saved, as a disk might."""
    copy = export._copy_companions

    def spoil(base: Path, folder: Path) -> None:
        copy(base, folder)
        path = next(folder.glob("*.safetensors"))
        weights = load_file(path)
        key = next(key for key in weights if name in key)
        weights[key] = weights[key] * 1.01
        save_file(weights, path, metadata={"format": "pt"})

    return spoil


@pytest.mark.parametrize(
    ("kind", "weight"),
    [("adapter", "q_proj.lora_B"), ("merged", "model.layers.1.mlp.up_proj"), ("merged", "audio_tower.conv1.weight")],
)
def test_an_export_that_answers_otherwise_does_not_appear(done, tmp_path, monkeypatch, kind, weight) -> None:
    monkeypatch.setattr(export, "_copy_companions", spoilt(weight))
    with pytest.raises(AdapterError, match="the export differs from the run's weights"):
        exported_to(tmp_path / "out", done, kind)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_another_base_is_refused(base, done, tmp_path) -> None:
    alike = write_folder(tmp_path / "other", rates="tiny", seed=9)
    with pytest.raises(AdapterError, match=r"made for another base than .*other \(sha256 .*; give the base .* --model"):
        exported_to(tmp_path / "out", done, "merged", "--model", str(alike))
    copied = tmp_path / "moved"
    base.rename(copied)
    try:
        exported_to(tmp_path / "out", done, "merged", "--model", str(copied))
    finally:
        copied.rename(base)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda b: b * 0, "was never trained (every B is zero); rerun"),
        (lambda b: b * math.nan, "not finite; lower the learning rate"),
        (None, "adapter_config.json is missing; give"),
        ("cut", "cannot be read"),
        ("empty", "the adapter is empty; save it again"),
    ],
)
def test_a_broken_adapter_is_named(base, tmp_path, change, what) -> None:
    run = write_run(tmp_path / "run", base)
    (run.adapter / "sealed.json").unlink()
    weights = run.adapter / "adapter_model.safetensors"
    if callable(change):
        write_adapter(base, run.adapter, change=change)
    elif change == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif change == "empty":
        save_file({}, weights)
    else:
        (run.adapter / "adapter_config.json").unlink()
    with pytest.raises(AdapterError) as refused:
        exported_to(tmp_path / "out", run, "adapter")
    assert what in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_none_or_not_that_far_is_named(base, tmp_path) -> None:
    with pytest.raises(RunError, match=r"nowhere/run\.json is missing; give --run the folder of a run"):
        exported_to(tmp_path / "out", RunFolder(path=tmp_path / "nowhere"), "adapter")
    run = write_run(tmp_path / "run", base)
    with pytest.raises(RunError, match=r"no checkpoint 5; checkpoints: 4"):
        exported_to(tmp_path / "out", run, "adapter", "--checkpoint", "5")
    run.adapter.rename(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=r"has no adapter yet; let it finish .* --checkpoint N \(checkpoints: 4\)"):
        exported_to(tmp_path / "out", run, "adapter")


def test_problems_of_omnimem_json_are_named_with_their_key(merged, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"omnimem\.json: cannot be read .*; make it again with `omnimem export`"):
        Exported.read(tmp_path)
    table = json.loads((merged / "omnimem.json").read_text())
    table["memory"]["slot_per_layer"] = table["memory"].pop("slots_per_layer")
    table["budget"]["slots"][1] = [1]
    (tmp_path / "omnimem.json").write_text(json.dumps(table))
    with pytest.raises(ConfigError) as refused:
        Exported.read(tmp_path)
    said = str(refused.value)
    assert "omnimem.json memory.slot_per_layer: unknown key; did you mean 'slots_per_layer'?" in said
    assert "omnimem.json budget: budget: not a budget (layer 1 is [1], not two whole numbers [audio, visual])" in said
