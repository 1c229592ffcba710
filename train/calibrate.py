"""Measures a model's layers on a few training streams and writes the budget that follows from it, with figures.

python train/calibrate.py --config X.yaml [key=value ...] [--out FILE]
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from omnimem.attach import Seam, attach
from omnimem.backbones import load_backbone
from omnimem.budget import AudioVisualBudget, Budget, BudgetError, SplitBudget
from omnimem.calibration import calibrate, save_figures
from omnimem.config import RunConfig, load
from omnimem.data import Failure, Failures, Sample, read_manifest
from omnimem.feeding import Feeder
from omnimem.media import MediaError
from omnimem.policies import DistinctOptions
from omnimem.policy import ScoredPolicy
from omnimem.run import RunFolder
from omnimem.tokens import Chunk
from train.arguments import train_section
from train.command import Parser, run_command


def main(arguments: Sequence[str]) -> None:
    """Measure, allocate, write budget.json and its figures, print where they lie."""
    given = _parser().parse(arguments)
    run = load(given.config, given.overrides, train=train_section())
    samples = training_samples(run)
    backbone = load_backbone(run.model)
    with attach(backbone.text_model) as seam:
        budget = measured_budget(run, seam, Feeder(backbone, run.stream), samples)
    file = given.out or RunFolder(path=Path("runs") / run.name).budget
    budget.write(file)
    for line in summary(budget):
        print(line)
    for path in (file, *save_figures(budget, file.parent)):
        print(f"wrote {path}")


def training_samples(run: RunConfig) -> list[Sample]:
    """The streams that the run trains on; a budget is measured on the first of them."""
    if run.data.train is None:
        raise BudgetError("data.train names no manifest; calibration measures the first training streams")
    return read_manifest(run.data.train, allow_absolute=run.data.allow_absolute_paths)


def measured_budget(run: RunConfig, seam: Seam, feeder: Feeder, samples: Sequence[Sample]) -> Budget:
    """The run's audio-visual budget, from signals measured under its own policy at its own size.

    A policy that is more than a score of each layer (heads of their own, probes, merged tokens) keeps no pool that
    could be measured alike: the signals are then those under ours. While they are measured every layer keeps the same
    number of tokens, split by the ratio alone.
    """
    wanted = run.memory.budget
    if not isinstance(wanted, AudioVisualBudget):
        raise BudgetError(
            f"memory.budget: {{name: {wanted.name}}} has nothing to calibrate; "
            "set memory.budget: {name: audio_visual}, or go on without a calibration"
        )
    layers, slots = seam.shape.layers, run.memory.slots_per_layer
    even = SplitBudget(visual_audio_ratio=wanted.visual_audio_ratio).build(layers, slots)
    used: list[str] = []
    with tqdm(total=run.calibration.streams, desc="calibration", unit="stream", disable=None) as bar:
        streams = _streams(samples, feeder, run.data.max_failures, used, bar)
        own = run.memory.policy.build(even)
        policy = own if isinstance(own, ScoredPolicy) and not own.per_head else DistinctOptions().build(even)
        signals = calibrate(seam, policy, streams, run.calibration)
    budget = replace(wanted, table="calibrate").build(layers, slots, signals)
    provenance = {
        **budget.provenance,
        "settings": budget_settings(run),
        "model": run.model.path,
        "policy": policy.name,
        "chunk_tokens": run.stream.chunk_tokens,
        "skip_chunks": run.calibration.skip_chunks,
        "streams": used,
    }
    return replace(budget, provenance=provenance)


def budget_settings(run: RunConfig) -> str:
    """What a budget file was made for."""
    return f"{run.memory.slots_per_layer} slots a layer, {run.memory.budget}"


def _streams(
    samples: Sequence[Sample], feeder: Feeder, max_failures: float, used: list[str], bar: tqdm
) -> Iterator[Iterable[Chunk]]:
    """The chunks of each readable sample; one that cannot be read is absent, and counted."""
    failures = Failures(samples=len(samples), max_failures=max_failures)
    for sample in samples:
        try:
            opened = feeder.open(sample)
        except MediaError as error:
            failures = failures.add(Failure(id=sample.id, reason=error.reason, message=str(error)))
            continue
        used.append(sample.id)
        yield feeder.chunks([opened])
        bar.update()


def summary(budget: Budget) -> Iterator[str]:
    """What was measured and given, one line a layer."""
    signals = budget.signals
    if signals is not None:
        yield f"{signals.chunks} chunks of {signals.streams} streams; layer: H audio visual | s audio visual | slots"
        for layer, (audio, visual) in enumerate(budget.slots):
            entropy = f"{signals.entropy.audio[layer]:.3f} {signals.entropy.visual[layer]:.3f}"
            alike = f"{signals.similarity.audio[layer]:.3f} {signals.similarity.visual[layer]:.3f}"
            yield f"{layer:3}: {entropy} | {alike} | {audio} audio + {visual} visual"
    yield f"{budget.total} slots in {budget.layers} layers"


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_config()
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the budget goes (runs/<name>/budget.json)")
    return parser


if __name__ == "__main__":
    run_command(main)
