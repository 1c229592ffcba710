"""Ways to share a budget between layers and modalities, under one policy at the same entries, training-free on recall.

python benchmarks/budgets.py --config tiny.yaml [--split calibration] [--slots 24] [key=value ...]

One pool a layer, fixed audio-visual splits, and audio-visual allocation (AVBA) at several ratios r and layer
temperatures T, from signals measured on the first training streams. For choosing settings: run it on calibration.
Writes runs/budgets-<split>-<slots>/ with a report, prints a table.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from controls import benchmark_of, evaluate, report

from omnimem.attach import attach
from omnimem.backbones import load_backbone
from omnimem.budget import AudioVisualBudget, BudgetOptions, SharedBudget, SplitBudget
from omnimem.comparison import compare
from omnimem.config import load
from omnimem.evaluation import Arm, Evaluation
from omnimem.policies import PerturbationOptions
from omnimem.run import RunFolder
from train.arguments import train_section
from train.assemble import feeder_of
from train.calibrate import measured_budget, training_samples
from train.command import Parser, run_command
from train.evaluate import check_benchmarks

BUDGETS: dict[str, BudgetOptions] = {
    "shared": SharedBudget(),
    **{f"split_r{r:g}": SplitBudget(visual_audio_ratio=r) for r in (0.5, 1, 2, 5)},
    **{
        f"avba_r{r:g}_T{t:g}": AudioVisualBudget(visual_audio_ratio=r, layer_temperature=t)
        for r in (1, 2, 5)
        for t in (0.2, 1.0, math.inf)
    },
}


def main(arguments: Sequence[str]) -> None:
    """Evaluate every budget, then compare."""
    parser = Parser(__doc__)
    parser.add_config()
    parser.add_argument("--split", default="calibration", help="split of the recall task (%(default)s)")
    parser.add_argument("--slots", type=int, help="slots per layer (those of the config)")
    given = parser.parse(arguments)
    run = load(given.config, given.overrides, train=train_section())
    slots = given.slots or run.memory.slots_per_layer
    benchmarks = tuple(replace(benchmark, split=given.split) for benchmark in run.evaluate.benchmarks)
    memory = replace(run.memory, slots_per_layer=slots, budget=AudioVisualBudget())
    run = replace(run, memory=memory, evaluate=replace(run.evaluate, benchmarks=benchmarks))
    check_benchmarks(run)
    backbone = load_backbone(run.model)
    feeder = feeder_of(run, backbone)
    folder = RunFolder(path=Path("runs") / f"budgets-{given.split}-{slots}")
    with attach(backbone.text_model) as seam:
        signals = measured_budget(run, seam, feeder, training_samples(run)).signals
        evaluation = Evaluation(seam=seam, feeder=feeder, options=run.evaluate)
        for name, wanted in BUDGETS.items():
            budget = wanted.build(seam.shape.layers, slots, signals)
            evaluate(evaluation, Arm(name=name, policy=PerturbationOptions().build(budget)), benchmark_of(run), folder)
    report(compare([folder.path], folder.comparison), slots, first="shared")


if __name__ == "__main__":
    run_command(main)
