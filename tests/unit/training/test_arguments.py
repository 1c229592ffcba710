"""The section `train`: numbers out of range are refused where they were written, each by one line with its cure."""

import inspect
import json
import os
import re
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path

import pytest
from support.paths import ROOT
from transformers import TrainingArguments, integrations

import omnimem.training.arguments
from omnimem.config import ConfigError, RunConfig, dump, load
from omnimem.run import RunFolder
from omnimem.training.arguments import (
    MAY_CHANGE,
    PROJECTS,
    REFUSED,
    VALIDATED,
    OwnSettings,
    on_resume,
    own_names,
    refuse_engine_changes,
    refuse_mixed_precision,
    refuse_unfit_launch,
    refuse_zero_rate,
    train_changes,
    train_docs,
    train_section,
    training_arguments,
)

SECTION = train_section()
CALLBACKS = {"wandb": "WandbCallback", "swanlab": "SwanLabCallback", "mlflow": "MLflowCallback"}
COUNT, SHARE = "give 1 or more", "give 0 or more, and below 1"
STAGE_2 = {"zero_optimization": {"stage": 2}}
EVERY = "give a whole number of steps, or a fraction of all steps below 1"


def loaded(tmp_path: Path, *overrides: str) -> RunConfig:
    """A config with these settings."""
    (tmp_path / "x.yaml").write_text("name: x\nmodel: {path: model}\n")
    return load(tmp_path / "x.yaml", overrides, train=SECTION)


@pytest.mark.parametrize(
    ("name", "value", "cure"),
    [
        ("per_device_train_batch_size", "0", COUNT),
        ("max_steps", "0", "give 1 or more, or -1 to count by num_train_epochs"),
        ("num_train_epochs", "0", "give a number above 0"),
        ("learning_rate", ".nan", "give a number above 0"),
        ("warmup_steps", "-1", "give 0 or more"),
        ("adam_beta2", "1", SHARE),
        ("max_grad_norm", "-1", "give 0 (no clipping) or more"),
        ("save_steps", "2.5", EVERY),
        ("seed", "-1", "give a whole number from 0 to 4294967295"),
    ],
)
def test_a_number_out_of_range_is_one_line_with_its_cure(name, value, cure, tmp_path) -> None:
    with pytest.raises(ConfigError) as error:
        loaded(tmp_path, f"train.{name}={value}")
    shown = {".nan": "nan"}.get(value, value)
    assert str(error.value) == f"command line train.{name}: {shown} is out of range; {cure}"


def test_settings_of_ours_have_defaults_and_are_checked_like_the_others(tmp_path) -> None:
    assert OwnSettings.of(loaded(tmp_path, "train.max_bad_steps=7").train).max_bad_steps == 7
    assert OwnSettings.of(loaded(tmp_path).train) == OwnSettings()
    with pytest.raises(ConfigError, match=r"train\.max_bad_step: unknown key; did you mean 'max_bad_steps'\?"):
        loaded(tmp_path, "train.max_bad_step=7")


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"bf16": True, "fp16": True}, "At most one of fp16 and bf16 can be True"),
        ({"fp16": True}, "fp16 needs a GPU; bf16 does not"),
        ({"report_to": "wandb"}, "report_to: wandb is not installed; pip install wandb, or remove it"),
        ({"report_to": ["tensorboard", "mlflow"]}, "report_to: mlflow is not installed"),
        ({"report_to": ["none"]}, "report_to: none is unknown; known: tensorboard, wandb, swanlab, mlflow"),
        ({"deepspeed": {"zero_optimization": {"stage": 7}}}, r"zero_optimization\.stage: Input should be 0, 1, 2"),
        (
            {"deepspeed": {**STAGE_2, "compile": {"deepcompile": True}}},
            r"compile\.deepcompile: every chunk of a stream",
        ),
        ({"deepspeed": {**STAGE_2, "train_batch_size": 64}}, "ds train_batch_size=64 vs hf train_batch_size .*=8"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(settings, what, tmp_path) -> None:
    with pytest.raises(ConfigError, match=what) as error:
        training_arguments(settings, RunFolder(path=tmp_path))
    assert len(error.value.problems) == 1
    assert str(error.value).startswith("train: ")


@pytest.mark.parametrize(
    "setting",
    ["torch_compile=true", "use_liger_kernel=true", "fsdp=true", "save_strategy=best", "label_smoothing_factor=0.1"],
)
def test_what_cannot_work_with_streams_is_refused_when_it_is_read(setting, tmp_path) -> None:
    with pytest.raises(ConfigError) as error:
        loaded(tmp_path, f"train.{setting}")
    assert str(error.value).startswith(f"command line train.{setting.partition('=')[0]}: ")
    assert len(error.value.problems) == 1


@pytest.mark.parametrize("name", ["save_only_model", "save_on_each_node"])
def test_settings_that_would_make_checkpoints_useless_are_refused_with_a_reason(name, tmp_path) -> None:
    with pytest.raises(ConfigError, match=rf"train\.{name}: .*checkpoint"):
        loaded(tmp_path, f"train.{name}=true")


@pytest.mark.parametrize("name", VALIDATED)
def test_a_setting_of_a_validation_that_does_not_take_place_is_refused(name, tmp_path) -> None:
    with pytest.raises(ConfigError, match=f"train.{name}: needs data.validation") as error:
        training_arguments({name: 1}, RunFolder(path=tmp_path))
    assert len(error.value.problems) == 1


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"eval_strategy": "no"}, "eval_strategy: no never reads data.validation"),
        ({"save_strategy": "no", "load_best_model_at_end": True}, "needs checkpoints, and train.save_strategy is no"),
        ({"early_stopping_threshold": 0.1}, "needs train.early_stopping_patience"),
    ],
)
def test_settings_that_make_a_validation_useless_are_refused(settings, what, tmp_path) -> None:
    with pytest.raises(ConfigError, match=what):
        training_arguments(settings, RunFolder(path=tmp_path), validated=True)


def test_a_validation_follows_the_checkpoints_unless_it_is_set(tmp_path) -> None:
    for given, every in (({}, 100), ({"save_steps": 7}, 7), ({"save_steps": 7, "eval_steps": 3}, 3)):
        found = training_arguments(given, RunFolder(path=tmp_path), validated=True)
        assert (found.eval_strategy, found.eval_steps, found.metric_for_best_model) == ("steps", every, "loss")
        assert found.greater_is_better is False
    best = training_arguments({"metric_for_best_model": "full_accuracy"}, RunFolder(path=tmp_path), validated=True)
    assert best.greater_is_better is True
    assert training_arguments({}, RunFolder(path=tmp_path)).eval_strategy == "no"


@pytest.mark.parametrize(
    ("project", "variable", "expected"),
    [(None, None, "omnimem"), (None, "own", "own"), ("mine", None, "mine"), ("mine", "own", "mine")],
)
@pytest.mark.parametrize("tracker", ["wandb", "swanlab", "mlflow"])
def test_the_project_reaches_the_callback_of_each_tracker(
    tracker, project, variable, expected, tmp_path, monkeypatch
) -> None:
    """The callbacks read variables: only trackio's reads `project` of the arguments."""
    monkeypatch.setattr(omnimem.training.arguments, "installed", lambda name: True)
    monkeypatch.setattr(omnimem.training.arguments, "version", lambda name: "0.7.20")
    monkeypatch.setattr(os, "environ", {**os.environ, PROJECTS[tracker]: variable or ""})
    training_arguments({"report_to": tracker, "project": project}, RunFolder(path=tmp_path))
    assert os.environ[PROJECTS[tracker]] == expected
    source = inspect.getsource(getattr(integrations, CALLBACKS[tracker]))
    assert PROJECTS[tracker] in source


def test_trackers_are_those_of_transformers_beside_our_own(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ})
    monkeypatch.setattr(omnimem.training.arguments, "installed", lambda name: name != "swanlab")
    found = training_arguments({"report_to": ["tensorboard", "wandb", "mlflow"]}, RunFolder(path=tmp_path / "mine"))
    assert (found.report_to, found.run_name, found.project) == (["wandb", "mlflow"], "mine", "omnimem")
    for given in ({}, {"report_to": "tensorboard"}):
        assert training_arguments(given, RunFolder(path=tmp_path)).report_to == []
    with pytest.raises(ConfigError, match="report_to: swanlab is not installed; pip install swanlab"):
        training_arguments({"report_to": "swanlab"}, RunFolder(path=tmp_path))
    with pytest.raises(ConfigError, match=r"train\.report_to"):
        loaded(tmp_path, "train.report_to=[wandbx]")
    monkeypatch.setattr(omnimem.training.arguments, "installed", lambda name: True)
    for found, fits in (("0.7.20", True), ("0.10.3", False), ("1.2", False)):
        monkeypatch.setattr(omnimem.training.arguments, "version", lambda name, found=found: found)
        with nullcontext() if fits else pytest.raises(ConfigError, match=f"swanlab {found} fails in the callback"):
            training_arguments({"report_to": "swanlab"}, RunFolder(path=tmp_path))


ENGINE = "train.deepspeed={zero_optimization: {stage: 0}}"


@pytest.mark.parametrize(
    ("dtype", "settings", "named"),
    [
        ("float32", ("train.bf16=true", ENGINE), "set model.dtype=bfloat16, or train.bf16 to false"),
        ("bfloat16", ("train.fp16=true", ENGINE), "set model.dtype=float16, or train.fp16 to false"),
        ("float32", ("train.fp16=true", "train.deepspeed=deepspeed/zero2.json"), "or train.fp16 to false"),
        ("float32", ("train.deepspeed={bf16: {enabled: true}}",), "or deepspeed bf16.enabled to false"),
        ("float32", ("train.deepspeed={bfloat16: {enabled: true}}",), "or deepspeed bfloat16.enabled to false"),
        ("bfloat16", ("train.deepspeed={fp16: {enabled: true}}",), "or deepspeed fp16.enabled to false"),
        ("float16", ("train.bf16=true",), "set model.dtype=bfloat16, or train.bf16 to false"),
        ("bfloat16", ("train.bf16=true", ENGINE), None),
        ("bfloat16", (ENGINE,), None),
        ("float32", ("train.bf16=true",), None),
        ("float32", ("train.deepspeed=deepspeed/zero3.json",), None),
    ],
)
def test_a_precision_that_steps_cannot_mix_with_that_of_the_model_is_refused(dtype, settings, named, tmp_path) -> None:
    run = loaded(tmp_path, f"model.dtype={dtype}", *settings)
    if named is None:
        refuse_mixed_precision(run)
        return
    with pytest.raises(ConfigError) as error:
        refuse_mixed_precision(run)
    assert f"model.dtype is {dtype}" in str(error.value)
    assert str(error.value).endswith(named)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup", "polynomial", "inverse_sqrt"])
def test_a_learning_rate_that_stays_0_is_refused_before_the_run(kind, tmp_path) -> None:
    """Also of a fraction of the steps; a warm-up that is only longer than the run raises the rate."""
    for warmup, steps, refused in ((10, 1, True), (0.5, 1, True), (10, 2, False), (0, 1, False)):
        settings = training_arguments({"warmup_steps": warmup, "lr_scheduler_type": kind}, RunFolder(path=tmp_path))
        if not refused:
            refuse_zero_rate(settings, steps)
            continue
        with pytest.raises(ConfigError) as error:
            refuse_zero_rate(settings, steps)
        assert str(error.value).startswith(
            ("train: the learning rate would be 0 in every step:", "train: no step is left")
        )


@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        ("adam_beta1=0.8", "0.9 there, 0.8 now"),
        ("lr_scheduler_type=greedy", "'linear' there, 'greedy' now, which train.lr_scheduler_type=greedy does not"),
        ("optim=sgd", "there, 'sgd' now"),
        ("data_seed=7", "None there, 7 now"),
        ("train_sampling_strategy=sequential", "'random' there, 'sequential' now"),
        ("bf16=true", "False there, True now"),
    ],
)
def test_what_a_checkpoint_does_not_follow_is_refused_by_name_when_a_run_resumes(setting, shown, tmp_path) -> None:
    (tmp_path / "config.yaml").write_text(dump(loaded(tmp_path, "train.learning_rate=2.0e-3")))
    rate = ("train.learning_rate=0.002", "train.seed=42", "train.weight_decay=0.0")  # defaults, written out
    train_changes(loaded(tmp_path, *rate, "train.max_steps=9", "train.save_steps=5"), tmp_path / "config.yaml")
    with pytest.raises(ConfigError) as error:
        train_changes(loaded(tmp_path, *rate, f"train.{setting}"), tmp_path / "config.yaml")
    (line,) = error.value.problems
    assert f"train.{setting.partition('=')[0]}: " in line
    assert shown in line


ADAM = {"type": "AdamW", "params": {"lr": "auto"}}


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        ({"optimizer": ADAM}, {"optimizer": ADAM, "zero_optimization": {"stage": 2}}, []),
        ({"optimizer": ADAM}, {"optimizer": {**ADAM, "type": "Lion"}}, ["optimizer"]),
        (
            {"optimizer": ADAM},
            {"optimizer": {**ADAM, "params": {"lr": "auto", "bias_correction": False}}},
            ["optimizer"],
        ),
        ({"optimizer": ADAM}, {}, ["optimizer"]),
        ({}, {"optimizer": ADAM, "scheduler": {"type": "WarmupLR"}}, ["optimizer", "scheduler"]),
        ({}, {"zero_optimization": {"stage": 1}}, []),
        (None, {"optimizer": ADAM}, []),  # of a run that did not note them
    ],
)
def test_the_optimizer_of_the_engine_is_that_of_the_checkpoint(before, now, named, inline, tmp_path) -> None:
    record, run = tmp_path / "run.json", loaded(tmp_path)
    record.write_text(json.dumps({} if before is None else {"engine": before}))
    (tmp_path / "engine.json").write_text(json.dumps(now))
    run = replace(run, train={**run.train, "deepspeed": now if inline else str(tmp_path / "engine.json")})
    with pytest.raises(ConfigError) if named else nullcontext() as error:
        refuse_engine_changes(run, record)
    if error is not None:
        assert [line.split(" engine.")[1].partition(":")[0] for line in error.value.problems] == named


@pytest.mark.parametrize(
    ("recipe", "keeps"),
    [
        ("train.lr_scheduler_type=cosine", None),
        ("train.lr_scheduler_type=reduce_lr_on_plateau", "train.lr_scheduler_type=reduce_lr_on_plateau"),
        ("train.optim=schedule_free_adamw", "train.optim=schedule_free_adamw"),
        ("train.optim=galore_adamw_layerwise", "train.optim=galore_adamw_layerwise"),
        ("train.deepspeed={scheduler: {type: WarmupLR}}", "the scheduler section of train.deepspeed"),
    ],
)
@pytest.mark.parametrize("setting", ["learning_rate=0.1", "warmup_steps=3", "weight_decay=0.1"])
def test_a_resumed_run_may_change_its_learning_rate_where_the_checkpoint_does_not_keep_it(
    recipe, keeps, setting, tmp_path
) -> None:
    (tmp_path / "config.yaml").write_text(dump(loaded(tmp_path, recipe)))
    now, name = loaded(tmp_path, recipe, f"train.{setting}"), setting.partition("=")[0]
    if keeps is None:
        assert list(train_changes(now, tmp_path / "config.yaml")) == [name]
        return
    with pytest.raises(ConfigError, match=f"{re.escape(keeps)} does not follow") as error:
        train_changes(now, tmp_path / "config.yaml")
    assert f" train.{name}: " in error.value.problems[0]


def test_the_table_of_a_resumed_run_covers_every_setting_of_train() -> None:
    assert set(MAY_CHANGE) <= set(on_resume())
    known = {each.name for each in fields(TrainingArguments) if each.init} | set(own_names())
    assert known <= set(on_resume()) | set(REFUSED)
    assert not set(on_resume()) & set(REFUSED)
    assert set(on_resume()) | set(REFUSED) == set(SECTION.__dataclass_fields__)


@pytest.mark.parametrize("name", sorted(on_resume()))
def test_each_setting_takes_effect_on_resume_or_is_refused_by_its_name(name, tmp_path) -> None:
    before = loaded(tmp_path, "train.learning_rate=2.0e-3")
    (tmp_path / "config.yaml").write_text(dump(before))
    changed = replace(before, train={**before.train, name: "another value"})
    if on_resume()[name] == "takes effect":
        train_changes(changed, tmp_path / "config.yaml")
        return
    with pytest.raises(ConfigError) as error:
        train_changes(changed, tmp_path / "config.yaml")
    (line,) = error.value.problems
    assert f" train.{name}: " in line


def test_every_setting_has_a_default_and_a_meaning() -> None:
    docs = train_docs()
    assert docs.keys() == on_resume().keys()
    assert docs["learning_rate"] == ("5e-05", "The initial learning rate for the optimizer; on resume: takes effect")
    assert docs["save_steps"][0] == "100"
    assert docs["max_bad_steps"][0] == "3"
    bare = [name for name, (_, doc) in docs.items() if doc.startswith("on resume")]
    assert len(bare) < 5, bare  # transformers describes almost all of its own


def test_the_page_of_the_settings_is_the_table() -> None:
    text = (ROOT / "docs/configuration.md").read_text(encoding="utf-8").partition("## `train`")[2].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|$", text, re.MULTILINE))
    assert rows == {**on_resume(), **{name: f"in no run: {reason}" for name, reason in REFUSED.items()}}


UNFIT_SETTINGS = {
    "train.packing=true": "rows are not packed",
    "data.packing=true": "rows are not packed",
    "packing=true": "rows are not packed",
    "train.padding_free=true": "rows are not packed",
    "train.torch_compile=true": "every chunk of a stream has a different shape",
    "train.torch_compile_backend=inductor": "every chunk of a stream has a different shape",
    "train.torch_compile_mode=default": "every chunk of a stream has a different shape",
    "model.torch_compile=true": "every chunk of a stream has a different shape",
    "train.use_liger_kernel=true": "it replaces the modules that streams attach to",
    "train.liger_kernel_config={rope: true}": "it replaces the modules that streams attach to",
    "train.enable_liger_kernel=true": "it replaces the modules that streams attach to",
    "train.fsdp=full_shard": "use deepspeed",
    "train.fsdp_config={version: 2}": "use deepspeed",
    "train.max_seq_length=4096": "streams have any length",
    "data.images=frames": "still images are not streamed",
    "train.freeze_aligner=false": "set tuning.lora.modules_to_save",
    "tuning.modules_to_save=[audio_projector]": "set tuning.lora.modules_to_save",
    "model.load_in_4bit=true": "set model.quantization: 4bit",
}


@pytest.mark.parametrize("setting", UNFIT_SETTINGS)
def test_what_does_not_go_with_streams_is_refused_with_the_reason_in_one_line(setting, tmp_path) -> None:
    with pytest.raises(ConfigError) as error:
        loaded(tmp_path, setting)
    (line,) = error.value.problems
    assert line.startswith(f"command line {setting.split('=')[0]}: ")
    assert UNFIT_SETTINGS[setting] in line


@pytest.mark.parametrize(
    ("name", "value", "refused"),
    [
        ("ACCELERATE_USE_FSDP", "true", True),
        ("ACCELERATE_USE_FSDP", "false", False),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", True),
        ("ACCELERATE_DYNAMO_BACKEND", "no", False),
        ("ACCELERATE_USE_MEGATRON_LM", "1", True),
    ],
)
def test_a_launcher_that_asks_for_it_is_refused_too(name, value, refused, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv(name, value)
    if not refused:
        refuse_unfit_launch()
        return
    with pytest.raises(ConfigError, match=f"environment {name} = {value}: "):
        training_arguments({}, RunFolder(path=tmp_path))
