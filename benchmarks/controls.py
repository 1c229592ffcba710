"""psi selection against recency, uniform and random at the same entries, on the recall task, training-free.

python benchmarks/controls.py --config tiny.yaml [--split calibration] [--slots 36 --slots 18] [key=value ...]

Each method runs once as published (one pool a layer, audio and visual compete) and once with psi's own audio-visual
split, so that the share of the split in the gain can be told from that of the score. All arms hold the same entries;
the comparison refuses anything else. Writes runs/controls-<split>-<slots>/ with a report, prints a table.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omnimem.attach import Seam, attach
from omnimem.backbones import load_backbone
from omnimem.benchmarks import RecallOptions
from omnimem.budget import Budget, SharedBudget
from omnimem.comparison import compare
from omnimem.config import RunConfig, load
from omnimem.evaluation import Arm, Evaluation
from omnimem.feeding import Feeder
from omnimem.policies import ControlOptions, PerturbationOptions, PolicyOptions
from omnimem.run import RunFolder, provenance, write_json
from train.arguments import train_section
from train.assemble import budget_of, feeder_of, resized
from train.command import Parser, run_command
from train.evaluate import check_benchmarks

METHODS: dict[str, PolicyOptions] = {
    "psi": PerturbationOptions(),
    "paper": PerturbationOptions(name="paper"),
    "released": PerturbationOptions(name="released"),
    "similarity": PerturbationOptions(sharpness=0.0),
    "recency": ControlOptions(name="recency"),
    "uniform": ControlOptions(name="uniform"),
    "random": ControlOptions(name="random"),
}


def main(arguments: Sequence[str]) -> None:
    """Evaluate every method at every budget, then compare."""
    parser = Parser(__doc__)
    parser.add_config()
    parser.add_argument("--split", default="calibration", help="split of the recall task (%(default)s)")
    parser.add_argument("--slots", type=int, action="append", help="slots per layer; may be repeated")
    given = parser.parse(arguments)
    run = load(given.config, given.overrides, train=train_section())
    benchmarks = tuple(replace(benchmark, split=given.split) for benchmark in run.evaluate.benchmarks)
    run = replace(run, evaluate=replace(run.evaluate, benchmarks=benchmarks))
    check_benchmarks(run)
    backbone = load_backbone(run.model)
    with attach(backbone.text_model) as seam:
        for slots in given.slots or [run.memory.slots_per_layer]:
            at_budget(run, seam, feeder_of(run, backbone), slots, given.split)


def at_budget(run: RunConfig, seam: Seam, feeder: Feeder, slots: int, split: str) -> None:
    """All methods at one budget."""
    folder = RunFolder(path=Path("runs") / f"controls-{split}-{slots}")
    own = budget_of(run, seam, feeder, RunFolder(path=folder.path / "budget"))
    own = own if own.total == slots * own.layers else resized(run, own, slots)
    layers = seam.shape.layers
    budgets: dict[str, Budget] = {"_split": own, "_single": SharedBudget().build(layers, slots)}
    evaluation = Evaluation(seam=seam, feeder=feeder, options=run.evaluate)
    for method, options in METHODS.items():
        for suffix, budget in budgets.items():
            arm = Arm(name=method + suffix, policy=options.build(budget))
            evaluate(evaluation, arm, benchmark_of(run), folder)
    evaluate(evaluation, Arm(name="full_memory", policy=PerturbationOptions().build(None)), benchmark_of(run), folder)
    summary = compare([folder.path], folder.comparison, allow_different=True)
    report(summary, slots)
    print(f"report: {folder.comparison / 'report.html'}\n")


def benchmark_of(run: RunConfig) -> RecallOptions:
    """The one benchmark of this script."""
    return run.evaluate.benchmarks[0]


def evaluate(evaluation: Evaluation, arm: Arm, benchmark: RecallOptions, folder: RunFolder) -> None:
    """One arm, resumable."""
    target = folder.evaluation(arm.name)
    table = {benchmark.name: evaluation.run(arm, benchmark, target)}
    facts = provenance(command=["benchmarks/controls.py"], seed=0, sha256={})
    write_json(target / "summary.json", {"arm": arm.name, "provenance": facts, "benchmarks": table})


def report(summary: dict[str, Any], slots: int, *, first: str = "psi_split") -> None:
    """A row a method: accuracy by kind, and the paired difference of the first one to it."""
    table = summary["benchmarks"]["recall"]
    pairs = {(pair["a"], pair["b"]): pair for pair in table["pairs"]}
    print(f"recall, {slots} slots a layer, {table['n']} questions of {table['clusters']} streams; accuracy in %")
    for name, arm in sorted(table["arms"].items(), key=lambda item: -item[1]["strict"]):
        kinds = "  ".join(f"{kind} {100 * entry['strict']:5.1f}" for kind, entry in sorted(arm["kinds"].items()))
        print(f"{name:20} {100 * arm['strict']:5.1f}  {kinds}  {versus(pairs, first, name)}")


def versus(pairs: dict[tuple[str, str], dict[str, Any]], a: str, b: str) -> str:
    """The paired difference a - b in points with its 95 % interval."""
    if (a, b) in pairs:
        sign, pair = 1, pairs[a, b]
    elif (b, a) in pairs:
        sign, pair = -1, pairs[b, a]
    else:
        return ""
    low, high = sorted((sign * pair["low"], sign * pair["high"]))
    return f"{a} {100 * sign * pair['diff']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


if __name__ == "__main__":
    run_command(main)
