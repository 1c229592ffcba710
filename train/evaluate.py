"""Evaluates a run's arms: the untouched checkpoint with full memory and under its budget, the tuned one, and probes.

python train/evaluate.py --config X.yaml [key=value ...] [--arm NAME]... [--adapter DIR]
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from tqdm import tqdm

from omnimem.attach import attach
from omnimem.backbones import load_backbone
from omnimem.config import ConfigError, RunConfig, load
from omnimem.data import Sample
from omnimem.evaluation import Arm, Evaluation
from omnimem.run import RunFolder, provenance, sha256, write_json
from omnimem.tuning import StreamedModel, load_adapter
from train.arguments import train_section
from train.assemble import Policies, budget_of, feeder_of, policies_of
from train.command import Parser, run_command

BASE = ("full_memory", "training_free")
TUNED = ("tuned", "tuned_full_memory")
PROBES = ("blind", "vision_only", "audio_only")
ARMS = (*BASE, *TUNED, *PROBES)


def main(arguments: Sequence[str]) -> None:
    """Evaluate the arms asked for, or all that apply, and print where the answers lie."""
    given = _parser().parse(arguments)
    run = load(given.config, given.overrides, train=train_section())
    folder = RunFolder(path=Path("runs") / run.name)
    names = tuple(given.arm or applicable(run, tuned=given.adapter is not None or folder.adapter.is_dir()))
    check_benchmarks(run)
    backbone = load_backbone(run.model)
    adapted = None
    if set(names) & set(TUNED):
        adapted = load_adapter(backbone.model, given.adapter or folder.adapter)
    feeder = feeder_of(run, backbone)
    with attach(backbone.text_model) as seam:
        budget = budget_of(run, seam, feeder, folder)
        evaluation = Evaluation(seam=seam, feeder=feeder, options=run.evaluate)
        evaluate_arms(run, evaluation, policies_of(run, budget), folder, names, adapted)


def applicable(run: RunConfig, *, tuned: bool) -> tuple[str, ...]:
    """The arms that a run without --arm evaluates."""
    return (*BASE, *(TUNED if tuned else ()), *(PROBES if run.evaluate.probes else ()))


def check_benchmarks(run: RunConfig) -> None:
    """Raises ConfigError when no benchmark is named, or one has no data."""
    if not run.evaluate.benchmarks:
        raise ConfigError(["evaluate.benchmarks is empty; name one, such as [{name: recall, root: data/recall}]"])
    gaps = [gap for benchmark in run.evaluate.benchmarks for gap in benchmark.gaps()]
    blocking = [gap for gap in gaps if gap.share > run.evaluate.max_failures]
    if blocking:
        raise ConfigError([f"evaluate.benchmarks: {gap.what} is missing; {gap.how}" for gap in blocking])


def evaluate_arms(
    run: RunConfig,
    evaluation: Evaluation,
    policies: Policies,
    folder: RunFolder,
    names: Sequence[str],
    adapted: StreamedModel | None,
) -> None:
    """Each arm over each benchmark; what is answered already is kept."""
    for name in names:
        setting = _setting(run, policies, name)
        tuned = name in TUNED
        with _adapter_as(adapted, tuned):
            target = folder.evaluation(name)
            table = {
                benchmark.label: evaluation.run(setting, benchmark, target, _progress(name))
                for benchmark in run.evaluate.benchmarks
            }
        write_json(
            target / "summary.json",
            {"arm": name, "provenance": _provenance(run, folder if tuned else None), "benchmarks": table},
        )
        shown = ", ".join(f"{benchmark} {entry['strict']:.1%} of {entry['n']}" for benchmark, entry in table.items())
        print(f"{name}: {shown}", flush=True)


def _setting(run: RunConfig, policies: Policies, name: str) -> Arm:
    """What an arm reads and remembers. Probes keep everything: they ask what the tracks can tell at all."""
    tracks = {"blind": None, "vision_only": "video", "audio_only": "audio"}.get(name, run.stream.tracks)
    whole = name in PROBES or "full_memory" in name
    return Arm(name=name, policy=policies(None if whole else run.memory.slots_per_layer), tracks=tracks)


def _adapter_as(adapted: StreamedModel | None, tuned: bool) -> AbstractContextManager[Any]:
    if adapted is None:
        return nullcontext()
    adapted.eval()
    return nullcontext() if tuned else adapted.disable_adapter()


def _progress(name: str) -> Callable[[Iterable[Sample], int], Iterable[Sample]]:
    return lambda samples, total: tqdm(samples, total=total, desc=name, unit="stream", disable=None)


def _provenance(run: RunConfig, folder: RunFolder | None) -> dict[str, Any]:
    base = Path(run.model.path)
    digests = {
        "base": sha256(base, suffixes=(".safetensors",)) if base.is_dir() else None,
        "adapter": sha256(folder.adapter, suffixes=(".safetensors",)) if folder and folder.adapter.is_dir() else None,
        **{
            f"{benchmark.label}/{file.name}": sha256(file)
            for benchmark in run.evaluate.benchmarks
            for file in benchmark.annotations
        },
    }
    options = run.evaluate
    return {
        **provenance(command=["train/evaluate.py"], seed=0, sha256=digests),
        "model": run.model.path,
        "policy": run.memory.policy.name,
        "slots_per_layer": run.memory.slots_per_layer,
        "generation": {"greedy": True, "max_new_tokens": options.max_new_tokens},
    }


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_config()
    parser.add_argument("--arm", action="append", choices=ARMS, help="an arm to evaluate; may be repeated (all)")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="the tuned adapter (runs/<name>/adapter)")
    return parser


if __name__ == "__main__":
    run_command(main)
