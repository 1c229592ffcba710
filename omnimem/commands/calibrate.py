"""Measure a model's layers on a few training streams and write the resulting budget with figures.

omnimem calibrate --config X.yaml [key=value ...] [--out FILE]
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from omnimem.backbones import load_backbone
from omnimem.budget import Budget
from omnimem.calibration_figures import save_figures
from omnimem.cli.build import measured_budget, training_samples
from omnimem.cli.parser import Parser
from omnimem.config import load
from omnimem.errors import counted
from omnimem.run import RunFolder
from omnimem.streaming.attach import attach
from omnimem.streaming.feeder import Feeder
from omnimem.training.arguments import train_section


def main(arguments: Sequence[str]) -> None:
    """Measure the layers, allocate the slots, write budget.json and its figures."""
    given = _parser().parse(arguments)
    run = load(given.config, given.overrides, train=train_section())
    samples = training_samples(run)
    backbone = load_backbone(run.model)
    with attach(backbone.text_model) as attached:
        budget = measured_budget(run, attached, Feeder(backbone, run.stream), samples)
    file = given.out or RunFolder(path=Path("runs") / run.name).budget
    budget.write(file)
    for line in summary(budget):
        print(line)
    for path in (file, *save_figures(budget, file.parent)):
        print(f"wrote {path}")


def summary(budget: Budget) -> Iterator[str]:
    """Signals and slots, one line per layer."""
    signals = budget.signals
    if signals is not None:
        yield (
            f"{counted(signals.chunks, 'chunk')} of {counted(signals.streams, 'stream')}; layer: H audio visual | "
            "s audio visual | slots"
        )
        for layer, (audio, visual) in enumerate(budget.slots):
            entropy = f"{signals.entropy.audio[layer]:.3f} {signals.entropy.visual[layer]:.3f}"
            similarity = f"{signals.similarity.audio[layer]:.3f} {signals.similarity.visual[layer]:.3f}"
            yield f"{layer:3}: {entropy} | {similarity} | {audio} audio + {visual} visual"
    yield f"{counted(budget.total, 'slot')} in {counted(budget.layers, 'layer')}"


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_config()
    parser.add_argument("--out", type=Path, metavar="FILE", help="file of the budget (runs/<name>/budget.json)")
    return parser
