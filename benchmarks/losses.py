"""Cost of a training step by its loss: CPU seconds of forward and backward on the run's own streams.

python benchmarks/losses.py --config tiny.yaml [--streams 16] [--rounds 3] [--out DIR] [key=value ...]

Losses take turns, so that a busy machine slows all of them alike; the adapter is fresh. Writes losses.json into --out
(runs/losses) and prints a table: medians, and the ratio to the loss of the answers alone.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.common import load_config
from benchmarks.tables import markdown
from omnimem.backbones import load_backbone
from omnimem.budget import SplitBudget
from omnimem.cli.build import feeder_of, training_samples
from omnimem.cli.parser import Parser, run_command
from omnimem.run import write_json
from omnimem.streaming.attach import attach
from omnimem.streaming.feeder import batch_by_layout
from omnimem.tuning import FullMemoryKL, LossOptions, add_adapter, gradient_of, streamed_loss

LOSSES = {"answer": LossOptions(), "answer + full_memory_kl": LossOptions(full_memory_kl=FullMemoryKL(temperature=2.0))}


def main(arguments: Sequence[str]) -> None:
    """Measure every loss at the run's budget and at full memory."""
    parser = Parser(__doc__)
    parser.add_config()
    parser.add_argument("--streams", type=int, default=16, help="streams of a step (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/losses"))
    given = parser.parse(arguments)
    run = load_config(given.config, given.overrides)
    torch.set_num_threads(1)
    backbone = load_backbone(run.model)
    model, feeder = add_adapter(backbone.model, run.tuning.lora).train(), feeder_of(run, backbone)
    batch = next(batch_by_layout((feeder.open(sample) for sample in training_samples(run)), given.streams))
    seconds: dict[tuple[str, int | None], list[float]] = {}
    with attach(backbone.text_model, recompute_layers=run.tuning.recompute == "layer") as attached:
        carry, even = gradient_of(run.tuning, attached.shape.layers), SplitBudget(visual_audio_ratio=2.0)
        for number in range(given.rounds + 1):
            for slots in (run.memory.slots_per_layer, None):
                policy = run.memory.policy.build(None if slots is None else even.build(attached.shape.layers, slots))
                softness = None if slots is None else run.tuning.selection.at(0.5)
                for name, options in LOSSES.items():
                    settings = {"softness": softness, "carry": carry, "losses": options.losses, "model": model}
                    started = time.process_time()
                    streamed_loss(attached, feeder, batch, policy, **settings).loss.backward()
                    if number:  # the first round also allocates
                        seconds.setdefault((name, slots), []).append(time.process_time() - started)
    rows = [{"loss": name, "slots": slots, "seconds": spent} for (name, slots), spent in seconds.items()]
    settings = {"streams": len(batch), "rounds": given.rounds, "recompute": run.tuning.recompute}
    write_json(given.out / "losses.json", {"settings": settings, "rows": rows})
    print(table(rows))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Median CPU seconds, and ratios to the first loss at the same budget."""
    lines = []
    for row in rows:
        alone = next(other for other in rows if other["slots"] == row["slots"])
        spent = median(row["seconds"])
        lines.append([row["loss"], row["slots"] or "full", f"{spent:.2f}", f"{spent / median(alone['seconds']):.2f}"])
    return markdown(["loss", "slots", "CPU seconds per step", "relative to the answers alone"], lines)


if __name__ == "__main__":
    run_command(main)
