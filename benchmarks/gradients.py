"""The gradient modes side by side: cosine to `full`, time and memory.

python benchmarks/gradients.py --config tiny.yaml [--streams 16] [--rounds 3] [--adapter DIR] [--budget FILE]
                               [--chunks 4 16 64] [--out DIR] [key=value ...]

Cosine and time: the config's model with fresh adapters (or those of a run) on its first training streams, one pass
over all of them, hard selection in every mode so that only the gradient mode differs; CPU seconds per stream, the
median of the rounds, modes in turn within a round. Memory: a random text model and streams of more and more chunks,
every live tensor counted (benchmarks/activations.py). Writes gradients.json into --out (runs/gradients) and prints two
tables.
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
from benchmarks.activations import HARD
from benchmarks.common import gradient_modes, load_config, train_adapter_only
from benchmarks.tables import markdown
from omnimem.backbones import load_backbone
from omnimem.budget import Budget, SplitBudget
from omnimem.cli.build import feeder_of, training_samples
from omnimem.cli.parser import Parser, run_command
from omnimem.policies.base import Policy
from omnimem.run import provenance, write_json
from omnimem.streaming.attach import StreamedAttention, attach
from omnimem.streaming.feeder import EncodedSample, Feeder, batch_by_layout
from omnimem.tuning import (
    StreamedModel,
    TuningOptions,
    add_adapter,
    gradient_of,
    load_adapter,
    policy_in_training,
    streamed_loss,
)

NAMES = ("full", "full, offload", "full, horizon 2", "full, horizon 1", "states", "released", "paper")
MODES = {name: gradient_modes(HARD, HARD)[name] for name in NAMES}
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
    """The model and the streams of every mode."""

    attached: StreamedAttention
    feeder: Feeder
    model: StreamedModel
    batches: Sequence[Sequence[EncodedSample]]
    policy: Policy

    @property
    def streams(self) -> int:
        """Number of streams."""
        return sum(len(batch) for batch in self.batches)


@final
@dataclass(frozen=True, kw_only=True)
class Row:
    """One mode: loss, cosine of its gradient to that of `full` and norm relative to it, CPU seconds per stream."""

    mode: str
    loss: float
    cosine: Mapping[str, float]
    norm: Mapping[str, float]
    seconds: float


Gradients = dict[str, Tensor]


def gradients(scene: Scene, tuning: TuningOptions) -> tuple[float, Gradients]:
    """Mean loss and its gradient by parameter, one backward per batch."""
    carry, policy = gradient_of(tuning, scene.attached.shape.layers), policy_in_training(tuning, scene.policy)
    named = [(name, part) for name, part in scene.model.named_parameters() if part.requires_grad]
    total, summed = 0.0, [torch.zeros_like(part) for _, part in named]
    for batch in scene.batches:
        outcome = streamed_loss(scene.attached, scene.feeder, batch, policy, softness=None, carry=carry)
        weight = len(batch) / scene.streams
        parts = torch.autograd.grad(outcome.loss * weight, [part for _, part in named], allow_unused=True)
        summed = [a if b is None else a + b for a, b in zip(summed, parts, strict=True)]
        total += float(outcome.loss.detach()) * weight
    return total, {name: part for (name, _), part in zip(named, summed, strict=True)}


def compare_modes(scene: Scene, rounds: int) -> list[Row]:
    """All modes, in turn within each round."""
    found: dict[str, tuple[float, Gradients]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in MODES}
    gradients(scene, MODES["full"])  # the first pass also allocates
    for _ in range(rounds):
        for name, tuning in MODES.items():
            started = time.process_time()
            found[name] = gradients(scene, tuning)
            seconds[name].append((time.process_time() - started) / scene.streams)
    _, full = found["full"]
    layers, rows = scene.attached.shape.layers, []
    for name, (loss, mine) in found.items():
        pairs = {group: (_row(mine, member, layers), _row(full, member, layers)) for group, member in GROUPS.items()}
        rows.append(
            Row(
                mode=name,
                loss=loss,
                cosine={group: float(F.cosine_similarity(a, b, dim=0)) for group, (a, b) in pairs.items()},
                norm={group: float(a.norm() / b.norm()) for group, (a, b) in pairs.items()},
                seconds=median(seconds[name]),
            )
        )
    return rows


def _row(parts: Gradients, member: Callable[[str, int, int], bool], layers: int) -> Tensor:
    """The gradient of a group of parameters, in one row."""
    numbers = {name: int(name.split(".layers.")[1].split(".")[0]) for name in parts}
    chosen = [part for name, part in parts.items() if member(name, numbers[name], layers)]
    return torch.cat([part.reshape(-1) for part in chosen] or [torch.zeros(1)])


def table(rows: Sequence[Row]) -> str:
    """Cosines by group and time relative to `full`."""
    lines = [
        [row.mode, f"{row.loss:.3f}", *(f"{row.cosine[group]:.3f}" for group in GROUPS),
         f"{row.seconds / rows[0].seconds:.2f}"]
        for row in rows
    ]  # fmt: skip
    return markdown(["mode", "loss", *(f"cosine, {group}" for group in GROUPS), "time, full = 1"], lines)


def main(arguments: Sequence[str]) -> None:
    """Compare, count, write and print."""
    parser = Parser(__doc__)
    parser.add_config()
    parser.add_argument("--streams", type=int, default=16, help="training streams (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of timing (%(default)s)")
    parser.add_argument("--adapter", type=Path, help="of a finished run, instead of fresh ones")
    parser.add_argument("--budget", type=Path, help="budget.json of a run (visual to audio as 2 to 1 in each layer)")
    parser.add_argument("--chunks", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--out", type=Path, default=Path("runs/gradients"))
    given = parser.parse(arguments)
    run = load_config(given.config, given.overrides)
    torch.set_num_threads(1)
    # 1. the model with its adapters
    backbone = load_backbone(run.model)
    torch.manual_seed(0)
    lora = run.tuning.lora
    model = load_adapter(backbone.model, given.adapter) if given.adapter else add_adapter(backbone.model, lora)
    train_adapter_only(model)
    # 2. gradients of every mode
    with attach(backbone.text_model) as attached:
        split = SplitBudget(visual_audio_ratio=2.0).build(attached.shape.layers, run.memory.slots_per_layer)
        budget, feeder = Budget.read(given.budget) if given.budget else split, feeder_of(run, backbone)
        opened = [feeder.open(sample) for sample in training_samples(run)[: given.streams]]
        batches, policy = list(batch_by_layout(opened, given.streams)), run.memory.policy.build(budget)
        scene = Scene(attached=attached, feeder=feeder, model=model, batches=batches, policy=policy)
        rows = compare_modes(scene, given.rounds)
    # 3. memory, and results
    memory = activations.measure_all(MODES, run.memory.policy, given.chunks)
    facts = provenance(command=["benchmarks/gradients.py", *arguments], seed=0, sha256={})
    values = {"provenance": facts, "streams": scene.streams, "modes": [asdict(row) for row in rows]}
    write_json(given.out / "gradients.json", {**values, "memory": [asdict(row) for row in memory]})
    print(f"{scene.streams} streams, {budget.total} slots; {rows[0].seconds:.2f} CPU seconds per stream with full")
    print(table(rows))
    print(activations.table(memory))


if __name__ == "__main__":
    run_command(main)
