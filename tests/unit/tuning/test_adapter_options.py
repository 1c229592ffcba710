"""Settings of adapters: each changes the model as it says, and is the same after saving and loading."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.finished_run import config_of, write_adapter
from support.gradients import opened, policy_at
from support.thinkers import write_folder
from transformers import Trainer, TrainingArguments

from omnimem.backbones import ModelOptions, load_backbone
from omnimem.commands.finetune import build_model
from omnimem.config import ConfigError, dump, load
from omnimem.run import RunFolder
from omnimem.selection import SelectionOptions
from omnimem.streaming.attach import attach
from omnimem.streaming.feeder import Feeder
from omnimem.streaming.options import StreamOptions
from omnimem.training.arguments import refuse_adapter, train_section, training_arguments
from omnimem.training.trainer import StreamTrainer
from omnimem.tuning import (
    AdapterError,
    LoraOptions,
    StreamedModel,
    TuningOptions,
    add_adapter,
    gradient_of,
    load_adapter,
    policy_in_training,
    start_adapter,
    streamed_loss,
    trainable,
)
from omnimem.tuning.gradient.options import HALF_WAY

PLAIN = LoraOptions(r=4, alpha=8.0, dropout=0.0, targets=("q_proj", "v_proj"))
ONE_LAYER = r"layers\.1\.self_attn\.[qv]_proj"
VARIANTS = {
    "plain": PLAIN,
    "rslora": replace(PLAIN, rslora=True),
    "dora": replace(PLAIN, dora=True),
    "all": replace(PLAIN, targets="all"),
    "regex": replace(PLAIN, targets=ONE_LAYER),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("base") / "m", rates="tiny")


def model_of(base: Path) -> Any:
    return load_backbone(ModelOptions(path=str(base)))


def logits(backbone: Any) -> torch.Tensor:
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        return backbone.head(backbone.text_model(input_ids=ids).last_hidden_state)


def adapted_modules(model: StreamedModel) -> set[str]:
    names = [name for name, _ in model.named_parameters() if ".lora_A." in name]
    return {name[name.index("layers.") : name.index(".lora_A.")] for name in names}


@pytest.mark.parametrize("name", VARIANTS)
def test_an_adapter_is_the_same_after_loading_and_merging(name, base, tmp_path) -> None:
    lora = VARIANTS[name]
    write_adapter(base, tmp_path / "a", seed=1, lora=lora)
    torch.manual_seed(1)
    first = model_of(base)
    made = add_adapter(first.model, lora)
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if "lora_B" in key:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    expected = logits(first)
    second = model_of(base)
    untouched = logits(second)
    loaded = load_adapter(second.model, tmp_path / "a")
    assert torch.equal(logits(second), expected)
    assert not torch.allclose(expected, untouched, atol=1e-3)
    loaded.merge_and_unload(safe_merge=True)
    assert torch.allclose(logits(second), expected, atol=1e-4)


def test_rslora_scales_by_the_root_of_the_rank(base) -> None:
    for lora, scale in ((PLAIN, 8 / 4), (VARIANTS["rslora"], 8 / math.sqrt(4))):
        model = add_adapter(model_of(base).model, lora)
        assert {module.scaling["default"] for module in model.modules() if hasattr(module, "lora_B")} == {scale}


def test_dora_trains_a_magnitude_per_output(base) -> None:
    model = add_adapter(model_of(base).model, VARIANTS["dora"])
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sum("lora_magnitude_vector" in name for name in names) == len(adapted_modules(model)) == 4


@pytest.mark.parametrize("name", ["all", "regex", "plain"])
def test_targets_choose_the_modules_that_the_estimate_counts(name, base) -> None:
    model = add_adapter(model_of(base).model, VARIANTS[name])
    found = adapted_modules(model)
    assert len(found) == {"all": 14, "regex": 2, "plain": 4}[name]
    counted = VARIANTS[name].matched(2)
    assert {(int(path.split(".")[1]), path.rpartition(".")[2]) for path in found} == set(counted)
    encoders = [key for key, _ in model.named_parameters() if "lora_" in key and ("audio" in key or "visual" in key)]
    assert encoders == []


@pytest.mark.parametrize(
    ("targets", "what"),
    [
        (r"layers\.7\..*", "match no module"),
        (r"audio_tower\.layers\.0\.self_attn\.q_proj", "match no module"),
        (r"layers\.0\..*norm", "cannot be adapted"),
    ],
)
def test_a_regular_expression_that_names_no_projection_is_refused(targets, what, base) -> None:
    with pytest.raises(AdapterError, match=what) as error:
        add_adapter(model_of(base).model, replace(PLAIN, targets=targets))
    assert len(str(error.value).splitlines()) == 1


def test_a_wrong_regular_expression_and_a_wrong_ratio_are_refused() -> None:
    with pytest.raises(ValueError, match="is no regular expression"):
        replace(PLAIN, targets="layers(")
    with pytest.raises(ValueError, match="plus_ratio = 0 must be a number above 0"):
        replace(PLAIN, plus_ratio=0.0)


@pytest.mark.parametrize("name", ["plain", "dora", "regex"])
def test_training_starts_from_the_weights_of_an_adapter(name, base, tmp_path) -> None:
    lora = replace(VARIANTS[name], dropout=0.25)
    write_adapter(base, tmp_path / "a", seed=1, lora=VARIANTS[name])
    backbone = model_of(base)
    started = start_adapter(backbone.model, lora, tmp_path / "a")
    again = model_of(base)
    load_adapter(again.model, tmp_path / "a")
    assert torch.equal(logits(backbone), logits(again))
    learned = trainable(started)
    assert len(learned) == len(trainable(add_adapter(model_of(base).model, lora)))
    assert {parameter.dtype for parameter in learned} == {torch.float32}
    dropouts = [module for key, module in started.named_modules() if key.endswith("lora_dropout.default")]
    assert {module.p for module in dropouts if isinstance(module, torch.nn.Dropout)} == {0.25}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"r": 8}, "tuning.lora.r = 8, but the adapter"),
        ({"alpha": 4.0}, "tuning.lora.alpha = 4"),
        ({"rslora": True}, "tuning.lora.rslora = True"),
        ({"dora": True}, "tuning.lora.dora = True"),
        ({"targets": ("q_proj",)}, "tuning.lora.targets and the adapter .* differ at .*v_proj"),
        ({"targets": "all"}, "tuning.lora.targets and the adapter .* differ at "),
    ],
)
def test_an_adapter_of_other_settings_is_no_start(change, what, base, tmp_path) -> None:
    write_adapter(base, tmp_path / "a", seed=1, lora=PLAIN)
    with pytest.raises(AdapterError, match=what):
        start_adapter(model_of(base).model, replace(PLAIN, **change), tmp_path / "a")


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_lora_plus_gives_b_a_learning_rate_of_its_own(ratio, base, tmp_path) -> None:
    lora = replace(PLAIN, dora=True, modules_to_save=("visual_projector", "audio_projector"))
    model = add_adapter(model_of(base).model, lora)
    args = TrainingArguments(output_dir=str(tmp_path), learning_rate=1e-3, weight_decay=0.1, use_cpu=True)
    trainer: Any = object.__new__(StreamTrainer)
    Trainer.__init__(trainer, model=model, args=args)
    trainer.adapted, trainer.plan = (
        model,
        SimpleNamespace(options=SimpleNamespace(lora=replace(PLAIN, plus_ratio=ratio))),
    )
    rates = {id(p): group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    found = {name: rates[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert {rate for name, rate in found.items() if "lora_A" in name} == {1e-3}
    assert {rate for name, rate in found.items() if "lora_B" in name} == {1e-3 * ratio}
    assert {rate for name, rate in found.items() if ".modules_to_save." in name} == {1e-3}  # also of biases and norms


@pytest.mark.parametrize("selection_from", ["tuned", "base"])
@pytest.mark.parametrize("mode", ["full", "states", "released", "paper"])
def test_dora_learns_in_every_gradient_mode_and_with_selection_by_the_base(mode, selection_from, base) -> None:
    if selection_from == "base" and mode in HALF_WAY:
        pytest.skip("refused by name")
    backbone, options = model_of(base), TuningOptions(gradient=mode, selection=SelectionOptions(softening="hard"))
    model = add_adapter(backbone.model, replace(PLAIN, dora=True, rslora=True))
    backbone.model.double()
    policy = replace(policy_in_training(options, policy_at(6)), selection_from=selection_from)
    with attach(backbone.text_model) as attached:
        outcome = streamed_loss(
            attached,
            Feeder(backbone, StreamOptions(chunk_tokens=12)),
            [opened(1, (7.0, None), ["red", "blue"])],
            policy,
            softness=None,
            carry=gradient_of(options, 2),
            model=model,
        )
        outcome.loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if "magnitude" in name and p.grad is not None]
    assert all(bool(torch.isfinite(grad).all()) for grad in grads)
    assert any(bool(grad.any()) for grad in grads)


def test_a_run_builds_the_model_from_the_adapter_of_its_config(base, tmp_path) -> None:
    write_adapter(base, tmp_path / "a", seed=1, lora=PLAIN)
    run = config_of(base)
    tuning = replace(run.tuning, lora=PLAIN)
    settings = training_arguments({}, RunFolder(path=tmp_path / "run"))
    begun = replace(run, tuning=tuning, model=replace(run.model, adapter=str(tmp_path / "a")))
    (tmp_path / "my.yaml").write_text(dump(begun))
    found = [build_model(each, settings)[1].state_dict() for each in (begun, replace(run, tuning=tuning))]
    assert [any(bool(t.any()) for name, t in state.items() if "lora_B" in name) for state in found] == [True, False]
    with pytest.raises(ConfigError, match=r"model\.adapter: no folder gone"):
        load(tmp_path / "my.yaml", ["model.adapter=gone"])


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        (("tuning.lora.dora=true", "train.deepspeed={zero_optimization: {stage: 3}}"), "which ZeRO-3 partitions"),
        (("tuning.lora.plus_ratio=4", "train.deepspeed={optimizer: {type: AdamW}}"), "has one learning rate"),
        (("tuning.lora.dora=true", "train.deepspeed={zero_optimization: {stage: 2}}"), None),
    ],
)
def test_an_adapter_that_the_engine_cannot_train_is_refused(settings, what, base, tmp_path) -> None:
    (tmp_path / "x.yaml").write_text(f"name: x\nmodel: {{path: {base}}}\n")
    run = load(tmp_path / "x.yaml", settings, train=train_section())
    if what is None:
        refuse_adapter(run)
        return
    with pytest.raises(ConfigError, match=what):
        refuse_adapter(run)
