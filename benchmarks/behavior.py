"""Records the results of the library bit by bit, to check that a refactoring changes nothing.

python benchmarks/behavior.py --config tiny.yaml --out before.json [key=value ...]
python benchmarks/behavior.py --config tiny.yaml --out after.json --against before.json

Three recall streams under every arm of the study `policies`: digests of the kept tokens of every layer (order,
modality, keys, values, owners) and of the hidden states of the questions. Four training streams under every gradient
mode and form of selection: the loss and a digest of every gradient. Digests hold on one machine with the same packages
and threads. With --against it prints every difference and exits with 1 if there is any.
"""

import hashlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.common import gradient_modes, load_config, train_adapter_only
from benchmarks.policies import NeedleTask
from benchmarks.studies import SPLIT_OF_ALL, STUDIES
from omnimem.backbones import Turn, load_backbone
from omnimem.budget import SplitBudget
from omnimem.cli.build import feeder_of, measured_budget, training_samples
from omnimem.cli.parser import Parser, run_command
from omnimem.config import RunConfig
from omnimem.policies.baselines.oracle import OracleOptions
from omnimem.run import read_json, write_json
from omnimem.selection import SelectionOptions, TemperatureOptions
from omnimem.streaming.attach import StreamedAttention, attach
from omnimem.streaming.feeder import Feeder, batch_by_layout
from omnimem.tuning import TuningOptions, add_adapter, gradient_of, policy_in_training, streamed_loss

STREAMS, TRAINING_STREAMS, SLOTS = 3, 4, 18
SOFT = {
    form: SelectionOptions(softening=form, temperature=TemperatureOptions(schedule="constant", start=0.5))
    for form in ("hard", "straight_through", "soft")
}
MODES = {f"full, {form}": TuningOptions(selection=options) for form, options in SOFT.items()}
MODES |= {
    name: tuning
    for name, tuning in gradient_modes(SOFT["straight_through"], SOFT["hard"]).items()
    if name != "full" and "by layer" not in name
}


def digest(tensors: Iterable[Tensor]) -> str:
    """sha256 of the bits of some tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


@torch.no_grad()
def kept_sets(run: RunConfig, attached: StreamedAttention, feeder: Feeder) -> dict[str, Any]:
    """Digests of the tokens kept by every arm, and of the hidden states of the questions."""
    found: dict[str, Any] = {}
    (benchmark,) = run.evaluate.benchmarks
    signals = measured_budget(
        replace(run, memory=replace(run.memory, budget=replace(SPLIT_OF_ALL, table="calibrate"))),
        attached,
        feeder,
        training_samples(run)[:8],
    ).signals
    assert signals is not None
    for name, trial in STUDIES["policies"].items():
        source = NeedleTask(benchmark) if isinstance(trial.policy, OracleOptions) else benchmark
        budget = trial.allocate(SPLIT_OF_ALL, attached.shape.layers, SLOTS, signals)
        policy = trial.policy.build(budget)
        options = replace(run.stream, chunk_tokens=trial.chunk_tokens or run.stream.chunk_tokens)
        mine = Feeder(feeder.backbone, options, None)
        kept, hidden = [], []
        for sample in source.samples()[:STREAMS]:
            opened = mine.open(sample)
            stream = mine.stream(attached, mine.with_oracle(policy, [opened]))
            for chunk in mine.chunks([opened]):
                stream.feed(chunk)
            for layer in stream.memory.layers:
                kept += [layer.order, layer.modality, layer.positions, layer.keys, layer.values, layer.owner]
            prompt = mine.prompt([[Turn(text=question.text) for question in sample.questions]], opened.tracks)
            hidden.append(stream.ask(prompt).hidden)
        found[name] = {"kept": digest(kept), "hidden": digest(hidden), "tokens": int(sum(k.shape[-1] for k in kept))}
    return found


def gradients(run: RunConfig, attached: StreamedAttention, feeder: Feeder, model: Any) -> dict[str, Any]:
    """The loss of every mode, and digests of its gradients."""
    found: dict[str, Any] = {}
    budget = SplitBudget(visual_audio_ratio=2.0).build(attached.shape.layers, SLOTS)
    opened = [feeder.open(sample) for sample in training_samples(run)[:TRAINING_STREAMS]]
    learning = [part for part in model.parameters() if part.requires_grad]
    for mode, tuning in MODES.items():
        carry = gradient_of(tuning, attached.shape.layers)
        policy = policy_in_training(tuning, run.memory.policy.build(budget))
        total, parts = 0.0, []
        for batch in batch_by_layout(opened, 2):
            outcome = streamed_loss(
                attached, feeder, batch, policy, softness=tuning.selection.at(0.5), carry=carry, model=model
            )
            parts += torch.autograd.grad(outcome.loss, learning, allow_unused=True, materialize_grads=True)
            total += float(outcome.loss.detach())
        found[mode] = {"loss": total.hex(), "gradient": digest(parts)}
    return found


def main(arguments: Sequence[str]) -> None:
    """Record, and compare if asked."""
    parser = Parser(__doc__)
    parser.add_config()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--against", type=Path)
    given = parser.parse(arguments)
    run = load_config(given.config, given.overrides)
    torch.set_num_threads(1)
    backbone = load_backbone(run.model)
    with attach(backbone.text_model) as attached:
        feeder = feeder_of(run, backbone)
        found = {"torch": torch.__version__, "policies": kept_sets(run, attached, feeder)}
    torch.manual_seed(0)
    model = add_adapter(backbone.model, run.tuning.lora)
    generator = torch.Generator().manual_seed(1)
    for name, part in train_adapter_only(model):
        if "lora_B" in name:
            part.data.normal_(0, 0.02, generator=generator)
    with attach(backbone.text_model) as attached:
        found["gradients"] = gradients(run, attached, feeder, model)
    write_json(given.out, found)
    print(f"{len(found['policies'])} policies, {len(found['gradients'])} gradient modes: {given.out}")
    if given.against is not None:
        before = read_json(given.against)
        different = [
            f"{part}: {name}"
            for part in ("policies", "gradients")
            for name in sorted({*before[part], *found[part]})
            if before[part].get(name) != found[part].get(name)
        ]
        print("\n".join(different) or "the same, bit by bit")
        sys.exit(1 if different else 0)


if __name__ == "__main__":
    run_command(main)
