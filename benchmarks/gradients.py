"""The gradient modes side by side: cosine to `full`, time and memory.

python benchmarks/gradients.py --config tiny.yaml [--streams 16] [--rounds 3] [--adapter DIR] [--budget FILE]
                               [--chunks 4 16 64] [key=value ...]

Cosine and time: the config's model with fresh adapters (or those of a run) on its first training streams, one pass
over all of them together, hard selection in every mode so that the carrying alone differs; CPU-seconds a stream, the
median of the rounds, modes in turn within a round. Memory: a random text model and longer and longer streams, every
live tensor counted (benchmarks/activations.py). Writes gradients.json into runs/gradients and prints two tables.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import activations
from benchmarks.activations import HARD, Way
from omnimem.backbones import load_backbone
from omnimem.budget import Budget, SplitBudget
from omnimem.cli.build import feeder_of, training_samples
from omnimem.cli.parser import Parser, run_command
from omnimem.config import RunConfig, load
from omnimem.policies import PolicyOptions
from omnimem.policies.base import Policy
from omnimem.run import provenance, write_json
from omnimem.streaming.attach import StreamedAttention, attach
from omnimem.streaming.feeder import EncodedSample, Feeder, batch_by_layout
from omnimem.training.arguments import train_section
from omnimem.tuning import (
    StreamedModel,
    TuningOptions,
    add_adapter,
    gradient_of,
    load_adapter,
    policy_in_training,
    streamed_loss,
)

MODES = (
    Way(name="full", tuning=TuningOptions(selection=HARD)),
    Way(name="full, offload", tuning=TuningOptions(offload=True, selection=HARD)),
    Way(name="full, horizon 2", tuning=TuningOptions(horizon=2, selection=HARD)),
    Way(name="full, horizon 1", tuning=TuningOptions(horizon=1, selection=HARD)),
    Way(name="states", tuning=TuningOptions(gradient="states", selection=HARD)),
    Way(name="released", tuning=TuningOptions(gradient="released", selection=HARD)),
    Way(name="paper", tuning=TuningOptions(gradient="paper", selection=HARD)),
)
GROUPS: dict[str, Callable[[str, int, int], bool]] = {  # of parameters: by name, layer and number of layers
    "all": lambda name, layer, layers: True,
    "k, v": lambda name, layer, layers: "k_proj" in name or "v_proj" in name,
    "q, o": lambda name, layer, layers: "q_proj" in name or "o_proj" in name,
    "mlp": lambda name, layer, layers: "mlp" in name,
    "lower half": lambda name, layer, layers: layer < layers // 2,
    "upper half": lambda name, layer, layers: layer >= layers // 2,
}


@final
@dataclass(frozen=True, kw_only=True)
class Scene:
    """What every mode is given."""

    attached: StreamedAttention
    feeder: Feeder
    model: StreamedModel
    batches: Sequence[Sequence[EncodedSample]]
    policy: Policy

    @property
    def streams(self) -> int:
        """How many there are."""
        return sum(len(batch) for batch in self.batches)


@final
@dataclass(frozen=True, kw_only=True)
class Row:
    """One mode: loss, cosine of its gradient to that of `full` and norm relative to it, CPU-seconds a stream."""

    mode: str
    loss: float
    cosine: Mapping[str, float]
    norm: Mapping[str, float]
    seconds: float


Gradients = dict[str, Tensor]


def gradients(scene: Scene, mode: Way) -> tuple[float, Gradients]:
    """Mean loss and its gradient by parameter, one backward a batch."""
    carry, policy = gradient_of(mode.tuning, scene.attached.shape.layers), policy_in_training(mode.tuning, scene.policy)
    named = [(name, part) for name, part in scene.model.named_parameters() if part.requires_grad]
    total, summed = 0.0, [torch.zeros_like(part) for _, part in named]
    for batch in scene.batches:
        outcome = streamed_loss(scene.attached, scene.feeder, batch, policy, softness=None, carry=carry)
        weight = len(batch) / scene.streams
        parts = torch.autograd.grad(outcome.loss * weight, [part for _, part in named], allow_unused=True)
        summed = [a if b is None else a + b for a, b in zip(summed, parts, strict=True)]
        total += float(outcome.loss.detach()) * weight
    return total, {name: part for (name, _), part in zip(named, summed, strict=True)}


def compared(scene: Scene, modes: Sequence[Way], rounds: int) -> list[Row]:
    """All modes, in turn within each round."""
    found: dict[str, tuple[float, Gradients]] = {}
    seconds: dict[str, list[float]] = {mode.name: [] for mode in modes}
    gradients(scene, modes[0])  # what the first pass alone pays is left out
    for _ in range(rounds):
        for mode in modes:
            started = time.process_time()
            found[mode.name] = gradients(scene, mode)
            seconds[mode.name].append((time.process_time() - started) / scene.streams)
    _, full = found[modes[0].name]
    layers, rows = scene.attached.shape.layers, []
    for mode in modes:
        loss, mine = found[mode.name]
        pairs = {group: (_row(mine, member, layers), _row(full, member, layers)) for group, member in GROUPS.items()}
        rows.append(
            Row(
                mode=mode.name,
                loss=loss,
                cosine={group: float(F.cosine_similarity(a, b, dim=0)) for group, (a, b) in pairs.items()},
                norm={group: float(a.norm() / b.norm()) for group, (a, b) in pairs.items()},
                seconds=median(seconds[mode.name]),
            )
        )
    return rows


def _row(parts: Gradients, member: Callable[[str, int, int], bool], layers: int) -> Tensor:
    """The gradient of a group of parameters, in one row."""
    chosen = [part for name, part in parts.items() if member(name, _layer(name), layers)]
    return torch.cat([part.reshape(-1) for part in chosen] or [torch.zeros(1)])


def _layer(name: str) -> int:
    return int(name.split(".layers.")[1].split(".")[0])


def memory_rows(options: PolicyOptions, chunks: Sequence[int]) -> list[activations.Row]:
    """Peak bytes of each mode by the number of chunks, of a random model under the run's policy."""
    model = activations.text_model(width=128, layers=4)
    policy = options.build(SplitBudget(visual_audio_ratio=5.0).build(4, 32))
    activations.measure(model, policy, MODES[0], 1, 64)  # what the first pass alone makes is left out
    return [activations.measure(model, policy, mode, count, 64) for mode in MODES for count in chunks]


def table(rows: Sequence[Row]) -> str:
    """Cosines by group and time relative to `full`."""
    lines = ["| mode | loss | " + " | ".join(f"cosine, {group}" for group in GROUPS) + " | time, full = 1 |"]
    lines.append("|---" * (len(GROUPS) + 3) + "|")
    for row in rows:
        cosines = " | ".join(f"{row.cosine[group]:.3f}" for group in GROUPS)
        lines.append(f"| {row.mode} | {row.loss:.3f} | {cosines} | {row.seconds / rows[0].seconds:.2f} |")
    return "\n".join(lines)


def scene_of(
    run: RunConfig, attached: StreamedAttention, feeder: Feeder, model: StreamedModel, streams: int, budget: Budget
) -> Scene:
    """The first training streams, together where they share a layout."""
    opened = [feeder.open(sample) for sample in training_samples(run)[:streams]]
    policy = run.memory.policy.build(budget)
    batches = [list(batch) for batch in batch_by_layout(opened, streams)]
    return Scene(attached=attached, feeder=feeder, model=model, batches=batches, policy=policy)


def main(arguments: Sequence[str]) -> None:
    """Compare, count, write and print."""
    parser = Parser(__doc__)
    parser.add_config()
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="of the timing")
    parser.add_argument("--adapter", type=Path, help="of a finished run, in place of fresh ones")
    parser.add_argument(
        "--budget", type=Path, help="budget.json of a run; none: visual to audio as 2 to 1 in each layer"
    )
    parser.add_argument("--chunks", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--out", type=Path, default=Path("runs/gradients"))
    given = parser.parse(arguments)
    run = load(given.config, given.overrides, train=train_section())
    torch.set_num_threads(1)
    backbone = load_backbone(run.model)
    torch.manual_seed(0)
    model = (
        load_adapter(backbone.model, given.adapter) if given.adapter else add_adapter(backbone.model, run.tuning.lora)
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    with attach(backbone.text_model) as attached:
        layers = attached.shape.layers
        split = SplitBudget(visual_audio_ratio=2.0).build(layers, run.memory.slots_per_layer)
        budget = Budget.read(given.budget) if given.budget else split
        scene = scene_of(run, attached, feeder_of(run, backbone), model, given.streams, budget)
        rows = compared(scene, MODES, given.rounds)
    memory = memory_rows(run.memory.policy, given.chunks)
    facts = provenance(command=["benchmarks/gradients.py", *arguments], seed=0, sha256={})
    values = {"provenance": facts, "streams": scene.streams, "modes": [asdict(row) for row in rows]}
    write_json(given.out / "gradients.json", {**values, "memory": [asdict(row) for row in memory]})
    print(f"{scene.streams} streams, {budget.total} slots; {rows[0].seconds:.2f} CPU-seconds a stream with full")
    print(table(rows))
    print(activations.table(memory))


if __name__ == "__main__":
    run_command(main)
