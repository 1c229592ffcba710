"""A finished run without training: a random thinker, a random adapter, and the files that fine-tuning leaves."""

from collections.abc import Callable
from pathlib import Path

import torch

from omnimem.backbones import ModelOptions, load_backbone
from omnimem.backbones.files import weights_digest
from omnimem.budget import SplitBudget
from omnimem.checksums import Origin, seal
from omnimem.config import MemoryOptions, RunConfig, dump
from omnimem.evaluation import EvaluateOptions
from omnimem.policies import PerturbationOptions
from omnimem.run import RunFolder, provenance, sha256, write_json, write_text
from omnimem.streaming.options import StreamOptions
from omnimem.tuning import LoraOptions, TuningOptions, add_adapter

ID = "0123456789ab"
LORA = LoraOptions(r=4, alpha=8.0, targets=("q_proj", "v_proj", "down_proj"))


def config_of(base: Path) -> RunConfig:
    """The run of a tiny thinker: 12 slots per layer, chunks of two segments."""
    return RunConfig(
        name="x",
        model=ModelOptions(path=str(base)),
        stream=StreamOptions(chunk_tokens=36, max_pixels=12544),
        memory=MemoryOptions(
            policy=PerturbationOptions(), slots_per_layer=12, budget=SplitBudget(visual_audio_ratio=2.0)
        ),
        tuning=TuningOptions(lora=LORA),
        evaluate=EvaluateOptions(max_new_tokens=5),
    )


def write_adapter(
    base: Path,
    folder: Path,
    *,
    seed: int = 0,
    change: Callable[[torch.Tensor], torch.Tensor] = lambda b: b,
    lora: LoraOptions = LORA,
) -> Path:
    """An adapter for `base` with B random, then changed; projectors of its own are random too."""
    torch.manual_seed(seed)
    model = add_adapter(load_backbone(ModelOptions(path=str(base))).model, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(change(torch.randn_like(parameter) * 0.2))
            if ".modules_to_save." in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(str(folder))
    return folder


def write_run(folder: Path, base: Path, run: RunConfig | None = None, *, steps: int = 8) -> RunFolder:
    """A run folder with an adapter, a checkpoint at half the steps, budget, config and record."""
    run = run or config_of(base)
    done = RunFolder(path=folder)
    write_adapter(base, done.adapter, seed=1, lora=run.tuning.lora)
    seal(done.adapter, Origin(run=ID, step=steps, base=weights_digest(str(base))), ranks=1)
    write_checkpoint(done, base, steps // 2)
    write_text(done.config, dump(run))
    layers = load_backbone(ModelOptions(path=str(base))).text_model.config.num_hidden_layers
    run.memory.budget.build(layers, run.memory.slots_per_layer).write(done.budget)
    record = provenance(command=["finetune.py"], seed=42, sha256={"base": sha256(base, suffixes=(".safetensors",))})
    write_json(done.record, {"id": ID, **record, "steps": steps, "config_sha256": sha256(done.config)})
    return done


def write_checkpoint(folder: RunFolder, base: Path, step: int) -> Path:
    path = write_adapter(base, folder.path / f"checkpoint-{step}", seed=step)
    write_json(path / "trainer_state.json", {"global_step": step})
    seal(path, Origin(run=ID, step=step, base=weights_digest(str(base))), ranks=1)
    return path
