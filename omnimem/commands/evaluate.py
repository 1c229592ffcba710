"""Evaluate the arms of a run: the base with full memory and under its budget, the tuned model, and probes.

omnimem evaluate --config X.yaml [key=value ...] [--arm NAME]... [--adapter DIR] [--shard I/N]
deepspeed train/evaluate.py --config X.yaml ...      # one shard per rank

`evaluate.processes: N` divides the work among N processes of this machine. On several machines without a launcher start
the command with --shard 0/N to N-1/N, then once without --shard: that summarises the results. Answers are kept: an
interrupted evaluation continues, with any number of processes.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from omnimem.backbones import load_backbone
from omnimem.cli.arms import (
    ARMS,
    TUNED,
    applicable,
    check_benchmarks,
    check_readable,
    evaluate_arms,
    left_out,
    without_adapter,
)
from omnimem.cli.build import budget_of, feeder_of, policies_of, refuse_unpadded
from omnimem.cli.parser import Parser, warn
from omnimem.cli.tuned_model import load_tuned
from omnimem.cli.workers import device, workers_of
from omnimem.config import RunConfig, differences, load
from omnimem.config.exported import not_tuned_at
from omnimem.evaluation import Evaluation, EvaluationError
from omnimem.run import RunFolder
from omnimem.streaming.attach import attach
from omnimem.training.arguments import train_section
from omnimem.training.shutdown import follow_launcher


def main(arguments: Sequence[str]) -> None:
    """Evaluate the given arms, or all that apply."""
    # 1. settings
    follow_launcher()
    given = _parser().parse(arguments)
    run = load(given.config, given.overrides, train=train_section())
    folder = RunFolder(path=Path("runs") / run.name)
    adapter = given.adapter or folder.adapter
    names = tuple(given.arm or applicable(run, tuned=given.adapter is not None or adapter.is_dir()))
    reads_tuned = bool(set(names) & set(TUNED)) and adapter.is_dir()
    warn([*differences(run), *(not_tuned_at(run.memory, run.stream, adapter) if reads_tuned else [])])
    if not given.arm and not adapter.is_dir() and given.shard is None:
        warn(without_adapter(adapter))
    check_benchmarks(run)
    # 2. model
    if not torch.cuda.is_available():  # models of CPU runs are small: more threads slow them down
        torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
    workers = workers_of(given, run.evaluate.processes, arguments)
    backbone = load_backbone(run.model, device())
    if not given.arm:
        names = applicable(run, tuned=bool(set(names) & set(TUNED)), backbone=backbone)
        warn(left_out(run, backbone))
    check_readable(names, backbone)
    if {"training_free", "tuned"} & set(names):
        refuse_unpadded(run, backbone, training=False)
    adapted = load_tuned(backbone.model, adapter) if set(names) & set(TUNED) else None
    feeder = feeder_of(run, backbone)
    # 3. budget and arms
    with attach(backbone.text_model) as attached:
        workers.prepare(
            lambda leading: _measure(run, folder, lambda: budget_of(run, attached, feeder, folder), leading)
        )
        policies = policies_of(run, budget_of(run, attached, feeder, folder))
        evaluation = Evaluation(attached=attached, feeder=feeder, options=run.evaluate)
        with workers.claim(folder.path):
            evaluate_arms(run, evaluation, policies, folder, names, adapted, workers=workers, adapter=adapter)


def _measure(run: RunConfig, folder: RunFolder, measure: Callable[[], object], leading: bool) -> None:
    """Write the budget of the run before several processes read it."""
    if leading:
        measure()
    elif run.memory.budget.needs_signals and not folder.budget.is_file():
        raise EvaluationError(
            f"{folder.budget} is missing, every shard would measure its own; first run "
            "`omnimem calibrate --config CONFIG`"
        )


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_config()
    parser.add_argument("--arm", action="append", choices=ARMS, help="an arm to evaluate; may be repeated (all)")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="the tuned adapter (runs/<name>/adapter)")
    parser.add_argument("--shard", metavar="I/N", help="answer shard I of N of the questions (0 to N-1)")
    return parser
