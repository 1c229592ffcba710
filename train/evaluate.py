"""Evaluates a run's arms: the untouched checkpoint with full memory and under its budget, the tuned one, and probes.

python train/evaluate.py --config X.yaml [key=value ...] [--arm NAME]... [--adapter DIR] [--shard I/N]
deepspeed train/evaluate.py --config X.yaml ...      # shared by the ranks

`evaluate.processes: N` shares the work among N processes of this machine. On machines that know nothing of each other
start the command with --shard 0/N to N-1/N, then once without: that draws up the results. What is answered stays
answered: an interrupted evaluation goes on where it stopped, in whatever number of processes.
"""

import os
from argparse import SUPPRESS
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from omnimem.attach import attach
from omnimem.backbones import load_backbone
from omnimem.config import ConfigError, RunConfig, load
from omnimem.data import Sample
from omnimem.evaluation import Arm, Evaluation, EvaluationError
from omnimem.run import RunFolder, write_json
from omnimem.tuning import StreamedModel, load_adapter
from train.arguments import train_section
from train.assemble import Policies, budget_of, feeder_of, policies_of
from train.command import Parser, run_command
from train.settings import Settings
from train.stopping import follow_launcher
from train.team import Own, Team, device, team_of

BASE = ("full_memory", "training_free")
TUNED = ("tuned", "tuned_full_memory")
PROBES = ("blind", "vision_only", "audio_only")
ARMS = (*BASE, *TUNED, *PROBES)


def main(arguments: Sequence[str]) -> None:
    """Evaluate the arms asked for, or all that apply, and print where the answers lie."""
    follow_launcher()
    given = _parser().parse(arguments)
    run = load(given.config, given.overrides, train=train_section())
    folder = RunFolder(path=Path("runs") / run.name)
    names = tuple(given.arm or applicable(run, tuned=given.adapter is not None or folder.adapter.is_dir()))
    check_benchmarks(run)
    if not torch.cuda.is_available():  # models that fit a CPU run are small: more threads slow them down
        torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
    team = team_of(given, run.evaluate.processes, arguments)
    backbone = load_backbone(run.model, device())
    adapter = given.adapter or folder.adapter
    adapted = load_adapter(backbone.model, adapter) if set(names) & set(TUNED) else None
    feeder = feeder_of(run, backbone)
    with attach(backbone.text_model) as seam:
        team.prepare(lambda leading: _measure(run, folder, lambda: budget_of(run, seam, feeder, folder), leading))
        policies = policies_of(run, budget_of(run, seam, feeder, folder))
        evaluation = Evaluation(seam=seam, feeder=feeder, options=run.evaluate)
        evaluate_arms(run, evaluation, policies, folder, names, adapted, team=team, adapter=adapter)


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
    *,
    team: Team | None = None,
    adapter: Path | None = None,
) -> None:
    """Each arm over each benchmark; what is answered already is kept, unless it was made with other settings.

    Without a team this process shares the work with helpers that read the run folder's own config.
    """
    team = team or Own(run.evaluate.processes, ["--config", str(folder.config), "train={}"])
    arms = [_setting(run, policies, name) for name in names]
    settings = Settings(run=run, folder=folder, adapter=adapter or folder.adapter)
    team.prepare(lambda leading: settings.prepare([(arm, arm.name in TUNED) for arm in arms], leading=leading))
    with team.work() as share:
        items = 0
        for arm in arms:
            with _adapter_as(adapted, arm.name in TUNED):
                for place, benchmark in enumerate(run.evaluate.benchmarks):
                    items += evaluation.answer(
                        arm,
                        benchmark,
                        folder.evaluation(arm.name),
                        share=share,
                        first=items,
                        traced=place == 0,
                        progress=_progress(arm.name),
                    )
            if share.alone:
                _draw_up(run, evaluation, settings, arm)
    if not team.leads:
        print(_left(run, evaluation, folder, names, share.name), flush=True)
    elif not share.alone:
        for arm in arms:
            _draw_up(run, evaluation, settings, arm)


def _draw_up(run: RunConfig, evaluation: Evaluation, settings: Settings, arm: Arm) -> None:
    """Fold what the processes wrote into one file a benchmark, and summarise it."""
    target = settings.folder.evaluation(arm.name)
    missing = sum(evaluation.missing(benchmark, target) for benchmark in run.evaluate.benchmarks)
    if missing:
        raise EvaluationError(f"{target}: {missing} questions were left out; start the same command again")
    table = {benchmark.label: evaluation.conclude(benchmark, target) for benchmark in run.evaluate.benchmarks}
    provenance = settings.provenance(tuned=arm.name in TUNED)
    write_json(target / "summary.json", {"arm": arm.name, "provenance": provenance, "benchmarks": table})
    shown = ", ".join(f"{benchmark} {entry['strict']:.1%} of {entry['n']}" for benchmark, entry in table.items())
    print(f"{arm.name}: {shown}", flush=True)


def _left(run: RunConfig, evaluation: Evaluation, folder: RunFolder, names: Sequence[str], shard: str) -> str:
    """What is still to be done when one of several independent processes has ended."""
    waiting = sum(
        evaluation.missing(benchmark, folder.evaluation(name))
        for name in names
        for benchmark in run.evaluate.benchmarks
    )
    rest = f"{waiting} questions wait for other shards" if waiting else "every question has been asked"
    return f"shard {shard.replace('of', '/')} is done; {rest}; the command without --shard draws up the results"


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


def _measure(run: RunConfig, folder: RunFolder, measure: Callable[[], object], leading: bool) -> None:
    """Have the run's budget on disk before several processes read it."""
    if leading:
        measure()
    elif run.memory.budget.needs_signals and not folder.budget.is_file():
        raise EvaluationError(
            f"{folder.budget} is missing, and every shard would measure its own; make it first with "
            "`python train/calibrate.py --config CONFIG`"
        )


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_config()
    parser.add_argument("--arm", action="append", choices=ARMS, help="an arm to evaluate; may be repeated (all)")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="the tuned adapter (runs/<name>/adapter)")
    parser.add_argument("--shard", metavar="I/N", help="answer the I-th of N shares of the questions, from 0 on")
    parser.add_argument("--claims", type=Path, help=SUPPRESS)  # given by evaluate.processes to its helpers
    return parser


if __name__ == "__main__":
    run_command(main)
