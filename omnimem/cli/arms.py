"""The arms of an evaluation: what each reads and remembers, answered by all processes, drawn up by one."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from tqdm import tqdm

from omnimem.cli.build import Policies
from omnimem.cli.eval_fingerprint import EvalFingerprint
from omnimem.cli.workers import LocalWorkers, Workers
from omnimem.config import ConfigError, RunConfig
from omnimem.data import Sample
from omnimem.evaluation import Arm, Evaluation, EvaluationError
from omnimem.run import RunFolder, write_json
from omnimem.tuning import StreamedModel

BASE = ("full_memory", "training_free")


TUNED = ("tuned", "tuned_full_memory")


PROBES = ("blind", "vision_only", "audio_only")


ARMS = (*BASE, *TUNED, *PROBES)


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
    team: Workers | None = None,
    adapter: Path | None = None,
) -> None:
    """Each arm over each benchmark; what is answered already is kept, unless it was made with other settings.

    Without a team this process shares the work with helpers that read the run folder's own config.
    """
    team = team or LocalWorkers(run.evaluate.processes, ["--config", str(folder.config), "train={}"])
    arms = [_setting(run, policies, name) for name in names]
    settings = EvalFingerprint(run=run, folder=folder, adapter=adapter or folder.adapter)
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


def _draw_up(run: RunConfig, evaluation: Evaluation, settings: EvalFingerprint, arm: Arm) -> None:
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
