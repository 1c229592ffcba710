"""What a step costs by what it minimises: CPU seconds of forward and backward, side by side, on the run's own streams.

python benchmarks/losses.py --config tiny.yaml [--streams 16] [--rounds 3] [--out DIR] [key=value ...]

Losses take turns, so that a busy machine slows all of them alike; the adapter is fresh. Writes losses.json into --out
(runs/losses) and prints a table: medians, and the ratio to the answers' loss alone.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import final

import torch

from omnimem.backbones import load_backbone
from omnimem.budget import SplitBudget
from omnimem.cli.build import feeder_of, training_samples
from omnimem.cli.parser import Parser, run_command
from omnimem.config import load
from omnimem.run import write_json
from omnimem.streaming.attach import attach
from omnimem.streaming.feeder import batch_by_layout
from omnimem.training.arguments import train_section
from omnimem.tuning import FullMemoryKL, LossOptions, add_adapter, gradient_of, streamed_loss

LOSSES = {
    "answer": LossOptions(),
    "answer + full_memory_kl": LossOptions(full_memory_kl=FullMemoryKL(temperature=2.0)),
}


@final
@dataclass(frozen=True, kw_only=True)
class Row:
    """One loss at one budget."""

    loss: str
    slots: int | None  # None: full memory
    seconds: tuple[float, ...]  # CPU seconds of each round


def main(arguments: Sequence[str]) -> None:
    """Measure every loss at the run's budget and at full memory."""
    parser = Parser(__doc__)
    parser.add_config()
    parser.add_argument("--streams", type=int, default=16, help="streams of a step (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/losses"))
    given = parser.parse(arguments)
    run = load(given.config, given.overrides, train=train_section())
    torch.set_num_threads(1)
    backbone = load_backbone(run.model)
    model, feeder = add_adapter(backbone.model, run.tuning.lora).train(), feeder_of(run, backbone)
    batch = next(batch_by_layout((feeder.open(sample) for sample in training_samples(run)), given.streams))
    recompute_layers = run.tuning.recompute == "layer"
    taken: dict[tuple[str, int | None], list[float]] = {}
    with attach(backbone.text_model, recompute_layers=recompute_layers) as attached:
        carry, even = gradient_of(run.tuning, attached.shape.layers), SplitBudget(visual_audio_ratio=2.0)
        for number in range(given.rounds + 1):
            for slots in (run.memory.slots_per_layer, None):
                policy = run.memory.policy.build(None if slots is None else even.build(attached.shape.layers, slots))
                softness = None if slots is None else run.tuning.selection.at(0.5)
                for name, options in LOSSES.items():
                    started = time.process_time()
                    streamed_loss(
                        attached,
                        feeder,
                        batch,
                        policy,
                        softness=softness,
                        carry=carry,
                        losses=options.losses,
                        model=model,
                    ).loss.backward()
                    if number:  # what the first round alone makes is left out
                        taken.setdefault((name, slots), []).append(time.process_time() - started)
    rows = [Row(loss=name, slots=slots, seconds=tuple(seconds)) for (name, slots), seconds in taken.items()]
    settings = {"streams": len(batch), "rounds": given.rounds, "recompute": run.tuning.recompute}
    write_json(given.out / "losses.json", {"settings": settings, "rows": [asdict(row) for row in rows]})
    print(table(rows))


def table(rows: Sequence[Row]) -> str:
    """Median CPU seconds, and ratios to the first loss at the same budget."""
    lines = ["| loss | slots | CPU-s a step | to the answers alone |", "|---|---|---|---|"]
    for row in rows:
        alone = next(other for other in rows if other.slots == row.slots)
        ratio = median(row.seconds) / median(alone.seconds)
        lines.append(f"| {row.loss} | {row.slots or 'full'} | {median(row.seconds):.2f} | {ratio:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
