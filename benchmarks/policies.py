"""Every memory policy in one streaming loop at the same entries, on the recall task, training-free; and ablations.

python benchmarks/policies.py --config tiny.yaml [--study policies]... [--split calibration] [--slots N]...
    [--root data/recall]... [--model DIR]... [--policy ARM]... [--reference ARM] [--quick] [key=value ...]

Studies: policies (every rival as published and with our audio-visual split), ablations (the paper's table 4), ratio
(table 3), sharpness and temperature (figure 5), chunks, neighbours, budgets. Each runs at every number of slots (the
config's unless given), in every world (--root, made with another --seed of data_prep/synthesize.py) and on every base
model. Existing answers are kept; streams are encoded once if data.cache is set. Writes runs/policies/<study>/ with one
line per question for every arm, table.json and accuracy_by_bytes.svg, and prints the table: accuracy by kind, entries,
bytes with text and side state, and the paired difference to the reference, clustered by stream. An arm whose peak or
answer-time entries differ from those of the reference is refused.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import WrappedTask, load_config
from benchmarks.policy_table import Sheet, shown, table, write
from benchmarks.studies import QUICK, SPLIT_OF_ALL, STUDIES, Trial
from omnimem.backbones import load_backbone
from omnimem.budget import AudioVisualBudget, Signals
from omnimem.cli.arms import check_benchmarks
from omnimem.cli.build import budget_of, feeder_of
from omnimem.cli.parser import Parser, run_command
from omnimem.config import ConfigError, RunConfig
from omnimem.data import Sample
from omnimem.evaluation import Arm, Evaluation, EvaluationError
from omnimem.policies import PerturbationOptions
from omnimem.policies.baselines.oracle import OracleOptions
from omnimem.recall.worlds import CELLS, GRID, TOKEN_SECONDS, Event, WorldOptions, draw_world
from omnimem.run import RunFolder, provenance, read_json, sha256, write_json
from omnimem.streaming.attach import StreamedAttention, attach
from omnimem.streaming.feeder import Feeder
from omnimem.tasks import RecallOptions

OUT = Path("runs/policies")
QUICK_STREAMS = 8


@final
class NeedleTask(WrappedTask):
    """Recall streams with the places of their answers, which the oracle needs."""

    def samples(self) -> list[Sample]:
        recipe = json.loads((Path(self.inner.root) / "recipe.json").read_text())
        options = WorldOptions(**recipe["options"])
        return [
            replace(sample, meta={**sample.meta, "needles": tuple(needles(sample.meta, options))})
            for sample in super().samples()
        ]


def needles(meta: Mapping[str, Any], options: WorldOptions) -> Iterator[tuple[float, ...]]:
    """One copy of every fact asked about: words first, since two kinds of question need them, then symbols."""
    world = draw_world(int(meta["seed"]), int(meta["seconds"]), options)
    asked = {question.key for question in world.questions}
    events = [event for event in world.events if event.shape in asked]
    during = {event.utterance.at for event in events if event.utterance is not None}
    heard = [utterance.at for utterance in world.utterances if utterance.voice in asked or utterance.at in during]
    yield from ((float(at),) for at in sorted(heard, key=lambda at: at not in during))
    yield from (longest(event) for event in events)


def longest(event: Event) -> tuple[float, float, float]:
    """The second and the centre of the cell of the visual token that shows a symbol longest."""
    places = [(second // TOKEN_SECONDS, cell) for second, cell in zip(event.span, event.cells, strict=True)]
    token, cell = max(places, key=places.count)
    row, column = divmod(cell % CELLS, GRID)
    return float(token * TOKEN_SECONDS), (row + 0.5) / GRID, (column + 0.5) / GRID


def main(arguments: Sequence[str]) -> None:
    """Evaluate the arms of each study in every setting, then write and print its table."""
    given = _parser().parse(arguments)
    run = load_config(given.config, given.overrides)
    if given.quick:
        run = replace(run, evaluate=replace(run.evaluate, limit=QUICK_STREAMS))
    runs = [_setting(run, model, root, given.split) for model in given.model or [None] for root in given.root or [None]]
    for one in runs:
        check_benchmarks(one)
    chosen = {study: _arms(study, given.policy, given.quick) for study in given.study or ["policies"]}
    for trials in chosen.values():
        if given.reference not in (None, *trials):
            raise ConfigError([f"--reference {given.reference} is not an arm of this run; known: {', '.join(trials)}"])
    sheets: dict[str, list[Sheet]] = {study: [] for study in chosen}
    for one in runs:
        backbone = load_backbone(one.model)
        with attach(backbone.text_model) as attached:
            feeder = feeder_of(one, backbone)
            for study, trials in chosen.items():
                for slots in given.slots or [one.memory.slots_per_layer]:
                    sheets[study] += evaluated(one, attached, feeder, study, trials, slots)
    for study, trials in chosen.items():
        reference = given.reference or next(iter(trials))
        rows = table(sheets[study], reference)
        write(rows, OUT / study, _facts(given, runs, reference))
        print("\n".join([f"{study}, {given.split} split", *shown(rows, reference)]))
        print(f"wrote {OUT / study / 'table.json'} and {OUT / study / 'accuracy_by_bytes.svg'}\n", flush=True)


def evaluated(
    run: RunConfig, attached: StreamedAttention, feeder: Feeder, study: str, trials: Mapping[str, Trial], slots: int
) -> Iterator[Sheet]:
    """The answers of every arm in one setting; existing answers are kept."""
    benchmark = run.evaluate.benchmarks[0]
    model, root = Path(run.model.path).name, benchmark.root
    place = f"{model}-{Path(root).name}-{benchmark.split}-{slots}"
    digests = {"base": sha256(Path(run.model.path), suffixes=(".safetensors",)), "data": sha256(benchmark.manifest)}
    signals = _signals(run, attached, feeder, digests["base"])
    for name, trial in trials.items():
        budget = trial.allocate(_split(run), attached.shape.layers, slots, signals)
        options = replace(run.stream, chunk_tokens=trial.chunk_tokens or run.stream.chunk_tokens)
        mine = Feeder(feeder.backbone, options, feeder.cache)
        evaluation = Evaluation(attached=attached, feeder=mine, options=run.evaluate)
        task = NeedleTask(benchmark) if isinstance(trial.policy, OracleOptions) else benchmark
        target = RunFolder(path=OUT / study / place).evaluation(name)
        policy = trial.policy.build(budget)
        made_with = {"policy": repr(replace(policy, budget=None)), "stream": asdict(options), "sha256": digests}
        made_with |= {"slots": [list(pair) for pair in budget.slots], "max_new_tokens": run.evaluate.max_new_tokens}
        _same(target, made_with)
        entry = evaluation.run(Arm(name=name, policy=policy), task, target)
        facts = provenance(command=sys.argv, seed=0, sha256=digests)
        write_json(target / "summary.json", {"arm": name, "provenance": facts, "benchmarks": {task.label: entry}})
        streams = {sample.id for sample in task.samples()[: run.evaluate.limit]}
        lines = target / f"{task.label}.jsonl"
        yield Sheet.read(lines, streams, arm=name, model=model, root=root, slots=slots, fewer=trial.fewer)
        print(f"{place} {name}: {entry['strict']:.1%} of {entry['n']}", flush=True)


def _split(run: RunConfig) -> AudioVisualBudget:
    """The audio-visual split of every method: that of the config if it has one."""
    return run.memory.budget if isinstance(run.memory.budget, AudioVisualBudget) else SPLIT_OF_ALL


def _same(target: Path, settings: dict[str, Any]) -> None:
    """Raises EvaluationError if the answers in a folder were made with other settings."""
    place = target / "settings.json"
    if place.is_file() and read_json(place) != settings:
        raise EvaluationError(f"{target}: its answers were made with other settings ({place}); move the folder away")
    target.mkdir(parents=True, exist_ok=True)
    write_json(place, settings)


def _signals(run: RunConfig, attached: StreamedAttention, feeder: Feeder, base: str) -> Signals:
    """Calibration signals of the model at the config's own size under psi, for which the split was made; cached."""
    budget, psi = replace(_split(run), table="calibrate"), PerturbationOptions()
    calibrating = replace(run, memory=replace(run.memory, budget=budget, policy=psi))
    measured = (base, sha256(Path(run.data.train)) if run.data.train else None, asdict(run.stream))
    under = (repr(psi.build(None)), run.memory.slots_per_layer, asdict(run.calibration))
    key = hashlib.sha256(repr((measured, under)).encode()).hexdigest()[:16]
    found = budget_of(calibrating, attached, feeder, RunFolder(path=OUT / "signals" / key)).signals
    assert found is not None, "a calibrated budget has signals"
    return found


def _setting(run: RunConfig, model: str | None, root: str | None, split: str) -> RunConfig:
    """The run on another base and in another world."""
    (benchmark,) = run.evaluate.benchmarks
    if not isinstance(benchmark, RecallOptions):
        raise ConfigError([f"evaluate.benchmarks: {benchmark.name} has no worlds; this script knows recall alone"])
    moved = replace(run.evaluate, benchmarks=(replace(benchmark, split=split, root=root or benchmark.root),))
    return replace(run, model=replace(run.model, path=model or run.model.path), evaluate=moved)


def _arms(study: str, wanted: Sequence[str] | None, quick: bool) -> dict[str, Trial]:
    """The arms of a study, or the requested ones."""
    trials = STUDIES[study]
    names = wanted or ([name for name in trials if name in QUICK] if quick and study == "policies" else list(trials))
    unknown = [name for name in names if name not in trials]
    if unknown:
        raise ConfigError(
            [f"--policy {name} is not an arm of study {study}; known: {', '.join(trials)}" for name in unknown]
        )
    return {name: trials[name] for name in trials if name in names}


def _facts(given: Any, runs: Sequence[RunConfig], reference: str) -> dict[str, Any]:
    """Facts about the table: base models, worlds with their seeds, sizes."""
    recipes = {}
    for run in runs:
        root = run.evaluate.benchmarks[0].root
        recipe = Path(root) / "recipe.json"
        recipes[root] = json.loads(recipe.read_text()) if recipe.is_file() else None
    return {
        "split": given.split,
        "limit": runs[0].evaluate.limit,
        "chunk_tokens": runs[0].stream.chunk_tokens,
        "reference": reference,
        "models": sorted({run.model.path for run in runs}),
        "worlds": recipes,
        "provenance": provenance(command=sys.argv, seed=0, sha256={}),
    }


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_config()
    parser.add_argument("--study", action="append", choices=STUDIES, help="may be repeated (policies)")
    parser.add_argument("--split", default="calibration", help="split of the recall task (%(default)s)")
    parser.add_argument("--slots", type=int, action="append", help="slots per layer; may be repeated (the config's)")
    parser.add_argument("--root", action="append", metavar="DIR", help="a recall world; may be repeated (the config's)")
    parser.add_argument("--model", action="append", metavar="DIR", help="a base; may be repeated (the config's)")
    parser.add_argument("--policy", action="append", metavar="ARM", help="an arm to evaluate; may be repeated (all)")
    parser.add_argument("--reference", metavar="ARM", help="compared with all others (the study's first arm)")
    parser.add_argument("--quick", action="store_true", help=f"a first answer: {QUICK_STREAMS} streams, few arms")
    return parser


if __name__ == "__main__":
    run_command(main)
