"""The arms of an evaluation: the tracks and the memory of each; answers of all processes, summarised by one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from tqdm import tqdm

from omnimem.backbones import Backbone
from omnimem.cli.build import Policies
from omnimem.cli.eval_fingerprint import EvalFingerprint
from omnimem.cli.workers import LocalWorkers, Workers
from omnimem.comparison.formatting import unread
from omnimem.config import ConfigError, RunConfig
from omnimem.data import Sample
from omnimem.errors import counted
from omnimem.evaluation import Arm, Evaluation, EvaluationError, Shard
from omnimem.media import TracksOption
from omnimem.policies.baselines.controls import TextOnly
from omnimem.run import RunFolder, sha256, write_json
from omnimem.tuning import StreamedModel

BASE = ("full_memory", "training_free")
TUNED = ("tuned", "tuned_full_memory", "tuned_text_only")
PROBES = ("blind", "vision_only", "audio_only")
TEXT_ONLY = ("text_only", "tuned_text_only")  # of models whose streams contain text (timestamps): it alone is kept
TRACKS: dict[str, TracksOption | None] = {"blind": None, "vision_only": "video", "audio_only": "audio"}
ARMS = (*BASE, *TUNED, *PROBES, "text_only")
# by the memory that an arm needs: no stream, text, a budget, one track, everything
BY_COST = ("blind", *TEXT_ONLY, "training_free", "tuned", "audio_only", "vision_only", "full_memory")
BY_COST += ("tuned_full_memory",)


def applicable(run: RunConfig, *, tuned: bool, backbone: Backbone | None = None) -> tuple[str, ...]:
    """The arms that a run without --arm evaluates; a loaded model tells which probes have a meaning.

    Left out are tracks that the model cannot read, the only one that it reads, which is full memory once more, and text
    alone where its streams contain none.
    """
    probes = (*PROBES, *(TEXT_ONLY if backbone and backbone.stamped else ())) if run.evaluate.probes else ()
    if backbone is not None:
        probes = tuple(name for name in probes if readable(name, backbone) and not repeated(name, backbone))
    names = [*BASE, *TUNED[:2], *probes]
    return tuple(name for name in names if tuned or name not in TUNED)


def readable(name: str, backbone: Backbone) -> bool:
    """Whether the model reads the track that this arm is about; true of arms with the tracks of the run."""
    return TRACKS.get(name) is None or TRACKS[name] in backbone.senses


def repeated(name: str, backbone: Backbone) -> bool:
    """Whether this arm reads the only track that the model reads, as full memory does."""
    return backbone.senses == (TRACKS.get(name),)


def without_adapter(adapter: Path) -> list[str]:
    """A line about the arms of a tuned model, where there is none."""
    return [f"{adapter} does not exist: arms of the tuned model are left out; was `name` given as in the training?"]


def left_out(run: RunConfig, backbone: Backbone) -> list[str]:
    """A line about the arm that a run leaves out because it would be full memory once more."""
    names = [name for name in PROBES if run.evaluate.probes and repeated(name, backbone)]
    return [f"arm {name} is left out: the model reads this track alone, so it is full_memory" for name in names]


def check_readable(names: Sequence[str], backbone: Backbone) -> None:
    """Raises ConfigError for arms of a track that the model cannot read."""
    lost = [name for name in names if not readable(name, backbone)]
    if lost:
        raise ConfigError([f"--arm {name}: the model has no {TRACKS[name]} encoder; leave it out" for name in lost])


def by_cost(names: Sequence[str]) -> list[str]:
    """The arms in the order of the memory that they need, so that one that does not fit costs none of the others."""
    return sorted(names, key=BY_COST.index)


def kind_of(name: str) -> str:
    """The arm of results: `tuned` of `tuned@checkpoint-80`."""
    return name.partition("@")[0]


def named(arm: str, folder: RunFolder, adapter: Path) -> str:
    """The results of an arm by name: an adapter other than that of the run has results of its own.

    `tuned@checkpoint-80` of a checkpoint of the run; with the first digits of its digest for any other folder.
    """
    if arm not in TUNED or adapter.resolve() == folder.adapter.resolve():
        return arm
    if any(adapter.resolve() == path.resolve() for path in folder.checkpoints()):
        return f"{arm}@{adapter.name}"
    digest = sha256(adapter, suffixes=(".safetensors",)) if adapter.is_dir() else ""
    return f"{arm}@{adapter.resolve().parent.name}-{adapter.resolve().name}-{digest[:8]}"


def check_benchmarks(run: RunConfig) -> None:
    """Raises ConfigError if there is no benchmark, or one has no data."""
    if not run.evaluate.benchmarks:
        raise ConfigError(["evaluate.benchmarks is empty; give one, such as [{name: recall, root: data/recall}]"])
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
    workers: Workers | None = None,
    adapter: Path | None = None,
) -> None:
    """Evaluate each arm on each benchmark; existing answers are kept, unless they were made with other settings.

    The cheapest arms come first (`by_cost`).
    Without `workers` this process starts helpers that read the config of the run folder.
    """
    # 1. prepare
    workers = workers or LocalWorkers(run.evaluate.processes, ["--config", str(folder.config), "train={}"])
    adapter = adapter or folder.adapter
    names = [named(name, folder, adapter) for name in by_cost(names)]
    arms = [_arm(run, policies, name) for name in names]
    fingerprint = EvalFingerprint(run=run, folder=folder, adapter=adapter)
    tuned = [(arm, kind_of(arm.name) in TUNED) for arm in arms]
    workers.prepare(lambda leading: fingerprint.prepare(tuned, leading=leading))
    # 2. answer this process's shard
    with workers.work() as shard:
        items = 0
        for arm in arms:
            with adapter_as(adapted, kind_of(arm.name) in TUNED):
                for place, benchmark in enumerate(run.evaluate.benchmarks):
                    items += evaluation.answer(
                        arm,
                        benchmark,
                        folder.evaluation(arm.name),
                        shard=shard,
                        first=items,
                        traced=place == 0,
                        progress=_progress(arm.name),
                    )
            if shard.whole:
                _summarise(run, evaluation, fingerprint, arm)
        if cache := evaluation.feeder.cache:
            print(f"cache: {', '.join(f'{number} {name}' for name, number in cache.counts.items())}", flush=True)
    # 3. summarise, or report what is left
    if not workers.leads:
        print(_status(run, evaluation, folder, names, shard), flush=True)
    elif not shard.whole:
        for arm in arms:
            _summarise(run, evaluation, fingerprint, arm)


def _summarise(run: RunConfig, evaluation: Evaluation, fingerprint: EvalFingerprint, arm: Arm) -> None:
    """Fold the files of all processes into one per benchmark, and write summary.json."""
    target = fingerprint.folder.evaluation(arm.name)
    missing = sum(evaluation.missing(benchmark, target) for benchmark in run.evaluate.benchmarks)
    if missing:
        raise EvaluationError(
            f"{target}: {counted(missing, 'question')} without an answer; start the same command again"
        )
    table = {benchmark.label: evaluation.conclude(benchmark, target) for benchmark in run.evaluate.benchmarks}
    provenance = fingerprint.provenance(tuned=kind_of(arm.name) in TUNED)
    write_json(target / "summary.json", {"arm": arm.name, "provenance": provenance, "benchmarks": table})
    shown = ", ".join(f"{benchmark} {entry['strict']:.1%} of {entry['n']}" for benchmark, entry in table.items())
    print(f"{arm.name}: {shown}", flush=True)
    for benchmark, entry in table.items():
        for what in filter(None, (unread(entry), unevicted(arm, entry))):
            print(f"{arm.name}: {benchmark}: {what}", flush=True)
        for reason, left in entry["left_out"].items():
            what = (
                f"{counted(left['questions'], 'question')} of {counted(left['streams'], 'stream')} left out: {reason}"
            )
            print(f"{arm.name}: {benchmark}: {what} ({left['message']})", flush=True)


def unevicted(arm: Arm, entry: Mapping[str, Any]) -> str:
    """A message if an arm with a budget kept all tokens of all streams, so that it measures full memory; else ""."""
    budget, arrived = arm.policy.budget, sum(entry["cost"]["tokens_in"].values())
    if budget is None or budget.unlimited or not arrived or sum(entry["cost"]["kept"].values()) < arrived:
        return ""
    return "nothing was evicted, as every stream fits into the memory; lower memory.slots_per_layer to measure eviction"


def _status(run: RunConfig, evaluation: Evaluation, folder: RunFolder, names: Sequence[str], shard: Shard) -> str:
    """Message at the end of a shard: what is left to do."""
    waiting = sum(
        evaluation.missing(benchmark, folder.evaluation(name))
        for name in names
        for benchmark in run.evaluate.benchmarks
    )
    rest = f"{counted(waiting, 'question')} left for other shards" if waiting else "every question has been asked"
    return f"shard {shard} is done; {rest}; the command without --shard summarises the results"


def _arm(run: RunConfig, policies: Policies, name: str) -> Arm:
    """Tracks and policy of an arm. Probes keep everything: they measure what a track contains."""
    kind = kind_of(name)
    tracks = TRACKS.get(kind, run.stream.tracks)
    whole = kind in PROBES or "full_memory" in kind
    if kind in TEXT_ONLY:
        budget = policies(run.memory.slots_per_layer).budget
        return Arm(name=name, policy=TextOnly(name="text_only", budget=budget), tracks=tracks)
    return Arm(name=name, policy=policies(None if whole else run.memory.slots_per_layer), tracks=tracks)


def adapter_as(adapted: StreamedModel | None, tuned: bool) -> AbstractContextManager[Any]:
    """The model in evaluation mode, with or without its adapter."""
    if adapted is None:
        return nullcontext()
    adapted.eval()
    return nullcontext() if tuned else adapted.disable_adapter()


def _progress(name: str) -> Callable[[Iterable[Sample], int], Iterable[Sample]]:
    return lambda samples, total: tqdm(samples, total=total, desc=name, unit="stream", disable=None)
