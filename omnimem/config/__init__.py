"""The strict schema of a run, composed of the options of each part; read from YAML and `key=value` overrides."""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, final

import yaml
from pydantic import Field, TypeAdapter

from omnimem.absent import why_absent
from omnimem.backbones import ModelOptions
from omnimem.budget import AudioVisualBudget, BudgetOptions, ReleasedBudget, SharedBudget
from omnimem.calibration import CalibrationOptions
from omnimem.config.check import names, nearest, strict, validated
from omnimem.config.source import ConfigError, Key, Problem, dotted, override, read
from omnimem.data import DataOptions
from omnimem.errors import counted
from omnimem.evaluation import EvaluateOptions
from omnimem.policies import PerturbationOptions, PolicyOptions
from omnimem.policies.base import Policy, SelectionFrom
from omnimem.shipped import CONFIGS
from omnimem.streaming.options import StreamOptions
from omnimem.tasks.video_mme import VideoMMEOptions
from omnimem.textfile import StoredFileError, read_stored
from omnimem.tuning import BudgetRange, TuningOptions
from omnimem.tuning.curriculum import ChunkRange
from omnimem.tuning.gradient.options import HALF_WAY

__all__ = [
    "CONFIGS",
    "ConfigError",
    "MemoryOptions",
    "RunConfig",
    "changed",
    "differences",
    "dump",
    "find",
    "load",
    "refuse_changes",
    "refuse_unseen_budget",
    "strict",
    "untuned",
]

POLICY: Key = ("memory", "policy", "name")


@final
@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """The policy and the size of the memory; `slots_per_layer` is the main setting."""

    # what layers keep, chosen by name
    policy: Annotated[PolicyOptions, Field(discriminator="name")] = field(default_factory=PerturbationOptions)
    slots_per_layer: int = 8192  # audio and visual tokens together, on average over the layers
    # how slots are divided over layers and modalities
    budget: Annotated[BudgetOptions, Field(discriminator="name")] = field(default_factory=AudioVisualBudget)
    selection_from: SelectionFrom = "tuned"  # base: the model without its adapter judges what is kept (docs/tuning.md)

    def written_out(self) -> "MemoryOptions":
        """The same options with the values of the policy's preset, which may change later, written out."""
        policy = self.policy
        return replace(self, policy=policy.written_out()) if isinstance(policy, PerturbationOptions) else self


# options of `omnimem` that every config.yaml of a run has, the earliest ones too
EARLIER = {"sharpness", "novelty_power", "heads", "carry", "neighbours", "of", "ends", "feature", "coverage", "centred"}


@strict
@final
@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a run."""

    name: str  # of the run folder: runs/<name>
    model: ModelOptions
    stream: StreamOptions = field(default_factory=StreamOptions)
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    tuning: TuningOptions = field(default_factory=TuningOptions)
    data: DataOptions = field(default_factory=DataOptions)
    train: dict[str, Any] = field(default_factory=dict)  # transformers.TrainingArguments
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)


def load(config: str | Path, overrides: Sequence[str] = (), *, train: type | None = None) -> RunConfig:
    """The run that a YAML file (a path, or a name in configs/) and `a.b=value` overrides describe.

    `train` is a strict dataclass, the schema of the section `train`. Raises ConfigError with all problems.
    """
    path = _config_file(str(config))
    source = override(read(path), overrides)
    _as_written(source.data)
    run, problems = validated(RunConfig, source.data, others={("train",): names(train)} if train else None)
    if train and isinstance(source.data.get("train"), dict):
        problems += validated(train, source.data["train"], at=("train",))[1]
    if run:
        problems += _conflicts(run)
        run, missing = _located(run, path.parent)
        problems += missing
    if run is None or problems:
        raise source.error(problems)
    return _followed(run)


def _as_written(data: Any) -> None:
    """Complete the policy in the config.yaml of an earlier run, which has every option of its time, by its rule.

    Before 2026-11-30 coverage discounted every token, until that day it compared layer inputs, then for hours sketches
    of 16 bits, and then of 4, which a run did not write out (`dump` does). Attention was measured from all queries.
    """
    match data:
        case {"memory": {"policy": {"name": "omnimem" | "paper" | "released"} as policy}} if policy.keys() >= EARLIER:
            rules = {"coverage_above": -1.0, "compared": "inputs", "sketch_bits": 16, "query_stride": 1}
            for name, rule in rules.items():
                policy.setdefault(name, rule)
            if policy["sketch_bits"] is None:
                policy["sketch_bits"] = 4


def _followed(run: RunConfig) -> RunConfig:
    """The run with the values of settings that follow another one unless they are given."""
    fps = run.stream.fps
    benchmarks = tuple(
        replace(each, subtitle_fps=each.subtitle_fps or fps) if isinstance(each, VideoMMEOptions) else each
        for each in run.evaluate.benchmarks
    )
    evaluate = replace(run.evaluate, benchmarks=benchmarks)
    return replace(run, tuning=run.tuning.at(run.memory.slots_per_layer), evaluate=evaluate)


def differences(run: RunConfig) -> list[str]:
    """A line for each setting that usually follows another one and does not, for the reader to judge."""
    found, stream, tuning = [], run.stream, run.tuning
    if set(tuning.slots(run.memory.slots_per_layer)) == {None}:
        found.append(
            "tuning.budgets: every step keeps everything, and none trains at memory.slots_per_layer = "
            f"{run.memory.slots_per_layer}, at which the run is evaluated"
        )
    low, high = tuning.chunks(stream.chunk_tokens)
    inside = low <= stream.chunk_tokens <= high
    drawn = inside if isinstance(tuning.chunk_tokens, ChunkRange) else stream.chunk_tokens in tuning.chunk_tokens
    if tuning.chunk_tokens and not drawn:
        found.append(
            f"tuning.chunk_tokens: no step draws stream.chunk_tokens = {stream.chunk_tokens}, at which the run is "
            f"evaluated (drawn: {low} to {high})"
        )
    for number, each in enumerate(run.evaluate.benchmarks):
        if (
            isinstance(each, VideoMMEOptions)
            and each.subtitles
            and (rate := each.subtitle_fps or stream.fps) != stream.fps
        ):
            found.append(
                f"evaluate.benchmarks[{number}].subtitle_fps: subtitles of {counted(rate, 'frame')} per "
                f"second beside frames at stream.fps = {stream.fps:g}; leave it out to follow stream.fps"
            )
    return found


def untuned(memory: MemoryOptions | None, stream: StreamOptions, earlier: Path) -> list[str]:
    """A line for each of these settings that no step of the training in the file `earlier` had; None: full memory."""
    try:
        saved = load(earlier)
    except ConfigError as error:
        return [f"{earlier}: cannot be read ({error.problems[0]}); the settings it was tuned at are unknown"]
    tuned = replace(saved.tuning, budgets=saved.tuning.budgets or ("self",)).at(saved.memory.slots_per_layer)
    trained = memory is not None and tuned.trains(memory.slots_per_layer)
    drawn: set[Key] = {("memory", "slots_per_layer")} if trained else set()
    low, high = saved.tuning.chunks(saved.stream.chunk_tokens)
    drawn |= {("stream", "chunk_tokens")} if low <= stream.chunk_tokens <= high else set()
    return changed((saved.memory, saved.stream), (memory, stream), drawn)


def changed(
    tuned: tuple[MemoryOptions, StreamOptions],
    now: tuple[MemoryOptions | None, StreamOptions],
    drawn: Collection[Key] = (),
) -> list[str]:
    """A line for each setting of memory and stream that differs from that of the tuning, without those `drawn`."""
    found: list[str] = []
    for name, *values in zip(("memory", "stream"), tuned, now, strict=True):
        if None in values:
            continue
        same = [each.written_out() if isinstance(each, MemoryOptions) else each for each in values]
        before, after = (_flat(TypeAdapter(type(each)).dump_python(each, mode="json"), (name,)) for each in same)
        if before.get(POLICY) != after.get(POLICY):  # other settings of two policies have nothing in common
            other = {key for key in (*before, *after) if key[:2] == POLICY[:2]} - {POLICY}
            before, after = ({key: each[key] for key in each if key not in other} for each in (before, after))
        found += [
            f"{dotted(key)}: the adapter was tuned at {before.get(key)}, and reads streams at {after.get(key)} now"
            for key in dict.fromkeys([*before, *after])
            if before.get(key) != after.get(key) and key not in drawn
        ]
    return found


def dump(run: RunConfig) -> str:
    """The resolved settings as YAML; `load` of it gives the same run, after the preset of its policy changes too."""
    values = TypeAdapter(RunConfig).dump_python(run, mode="json")
    if isinstance(policy := run.memory.policy, PerturbationOptions):
        values["memory"]["policy"]["sketch_bits"] = policy.written_out().sketch_bits
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=120)


def refuse_changes(run: RunConfig, earlier: Path) -> None:
    """Raises ConfigError if the settings of a resumed run differ from those in the file `earlier`.

    `evaluate`, the cache and the limit of failed samples may change; what of `train` may is in
    `omnimem.training.arguments`.
    """
    try:
        saved = load(earlier)
    except ConfigError as error:
        cure = "remove it, and resume with the settings that the run was started with"
        raise ConfigError([f"{earlier}: cannot be read ({error.problems[0]}); {cure}"]) from error
    alike = (replace(each, memory=each.memory.written_out()) for each in (saved, run))
    before, now = (_flat(TypeAdapter(RunConfig).dump_python(each, mode="json")) for each in alike)
    free = (("train",), ("evaluate",), ("data", "max_failures"), ("data", "cache"))
    keys = [key for key in dict.fromkeys([*before, *now]) if not any(key[: len(each)] == each for each in free)]
    problems = [
        f"{earlier} {dotted(key)}: {before.get(key)!r} there, {now.get(key)!r} now; resume with the old value, "
        "or start a new run with name=... or --overwrite"
        for key in keys
        if before.get(key) != now.get(key)
    ]
    if problems:
        raise ConfigError(problems)


def refuse_unseen_budget(run: RunConfig) -> None:
    """Raises ConfigError if no step of a training run draws the budget that the run is evaluated at."""
    slots, budgets = run.memory.slots_per_layer, run.tuning.budgets
    if not run.tuning.trains(slots):
        drawn = f"{budgets}" if isinstance(budgets, BudgetRange) else ", ".join(map(str, budgets))
        what = f"the run is evaluated at memory.slots_per_layer = {slots}, and no step trains at it (drawn: {drawn})"
        cure = "set tuning.budgets=[self, full], where self is memory.slots_per_layer, or memory.slots_per_layer to one"
        raise ConfigError([f"tuning.budgets: {what}; {cure} of those drawn"])


def _flat(values: Any, at: Key = ()) -> dict[Key, Any]:
    """Nested settings by their keys."""
    if not isinstance(values, dict):
        return {at: values}
    return {key: value for name in values for key, value in _flat(values[name], (*at, name)).items()}


def find(name: str, beside: Path) -> Path | None:
    """A file or folder by name: in the current folder, beside the config, or in configs/."""
    candidates = (Path(name), beside / name, CONFIGS / name)
    return next((path for path in candidates if path.exists()), None)


def _config_file(name: str) -> Path:
    """The YAML file of a config; the suffix is optional."""
    for candidate in (name, f"{name}.yaml"):
        for path in (Path(candidate), CONFIGS / candidate):
            if path.is_file():
                return path
    known = sorted(path.name for path in CONFIGS.glob("*.yaml"))
    raise ConfigError([f"{name}: no such config here or in {CONFIGS}; {why_absent(name, nearest(name, known))}"])


def _conflicts(run: RunConfig) -> Iterator[Problem]:
    """Settings that are valid by themselves but not together."""
    # 1. name and budgets
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", run.name):
        yield ("name",), f"{run.name!r} cannot name a folder; use letters, digits, `.`, `_` and `-`"
    least = 1 if isinstance(run.memory.budget, SharedBudget) else 2
    need = "one slot" if least == 1 else "one audio and one visual slot"
    if run.memory.slots_per_layer < least:
        yield ("memory", "slots_per_layer"), f"{run.memory.slots_per_layer} is too small; each layer needs {need}"
    for key, slots in _drawn_budgets(run):
        if slots < least:
            yield ("tuning", "budgets", key), f"{slots} is too small; each layer needs {need}"
    # 2. policy and gradient mode
    policy, mode = run.memory.policy.build(None), run.tuning.gradient
    if mode == "states" and (policy.traits.per_head or policy.traits.merges):
        what = "keeps other tokens in every head" if policy.traits.per_head else "merges tokens"
        yield (
            ("tuning", "gradient"),
            f"states recomputes keys from the input of each token, and policy {policy.name} {what}; set it to full",
        )
    if mode == "paper" and not policy.supports("paper"):
        what = f"requires one score for all heads, which policy {policy.name} does not have"
        yield ("tuning", "gradient"), f"paper {what}; set it to full"
    if mode == "released" and not policy.supports("released"):
        yield ("tuning", "gradient"), f"released selects by similarity, not by policy {policy.name}; set it to full"
    # 3. gradient of the selection
    selection = run.tuning.selection
    learns = selection.gradient == "both" and selection.softening != "hard"
    if learns and not policy.supports("learned_importance"):
        what = f"both requires a score that uses attention, unlike that of policy {policy.name}"
        yield ("tuning", "selection", "gradient"), f"{what}; set it to redundancy"
    # 4. selection by the untuned model
    if run.memory.selection_from == "base":
        yield from _base_conflicts(run, policy)


def _base_conflicts(run: RunConfig, policy: Policy) -> Iterator[Problem]:
    """Settings that do not go with `memory.selection_from: base`."""
    at: Key = ("memory", "selection_from")
    if not policy.supports("base_selection"):
        what = f"base keeps the single tokens that the untuned model keeps, and policy {policy.name} merges tokens"
        yield at, f"{what}; set it to tuned, or choose settings of the policy that merge nothing"
    if run.tuning.gradient in HALF_WAY:
        what = f"base needs every chunk read by all layers, unlike tuning.gradient: {run.tuning.gradient}"
        yield at, f"{what}; set that to full or states, or selection_from to tuned"
    if run.tuning.selection.softening != "hard":
        what = f"{run.tuning.selection.softening} has no effect with memory.selection_from: base"
        yield ("tuning", "selection", "softening"), f"{what}, whose scores do not learn; set it to hard"


def _drawn_budgets(run: RunConfig) -> list[tuple[str | int, int]]:
    """The slots of a list but for memory.slots_per_layer, or the lower end of a range, with their keys."""
    budgets = run.tuning.budgets
    if isinstance(budgets, BudgetRange):
        return [("low", budgets.low)]
    drawn = enumerate(run.tuning.slots(run.memory.slots_per_layer) if budgets else ())
    return [(number, slots) for number, slots in drawn if slots is not None and budgets[number] != "self"]


def _located(run: RunConfig, beside: Path) -> tuple[RunConfig, list[Problem]]:
    """The run with the paths of its files (`find`), and the missing files."""
    # 1. model and budget table
    missing: list[Problem] = []
    model = find(run.model.path, beside)  # None: a hub id
    processor = run.model.processor and find(run.model.processor, beside)
    run = replace(
        run,
        model=replace(
            run.model, path=str(model or run.model.path), processor=str(processor) if processor else run.model.processor
        ),
    )
    if run.model.adapter is not None:
        adapter = find(run.model.adapter, beside)
        if adapter is None:
            what = f"no folder {run.model.adapter}; give that of an adapter (omnimem export --format adapter)"
            missing.append((("model", "adapter"), what))
        else:
            run = replace(run, model=replace(run.model, adapter=str(adapter)))
    budget = run.memory.budget
    if isinstance(budget, AudioVisualBudget | ReleasedBudget) and not budget.needs_signals:
        table = find(budget.table, beside)
        if table is None:
            key: Key = ("memory", "budget", "table")
            made = "make it with `omnimem calibrate`, or set it to calibrate"
            cure = made if isinstance(budget, AudioVisualBudget) else "give a table of the release"
            missing.append((key, f"no file {budget.table}; {cure}"))
        else:
            run = replace(run, memory=replace(run.memory, budget=replace(budget, table=str(table))))
    # 2. DeepSpeed settings
    deepspeed = run.train.get("deepspeed")
    if isinstance(deepspeed, str):
        found = find(deepspeed, beside)
        if found is None:
            known = sorted(f"deepspeed/{path.name}" for path in CONFIGS.glob("deepspeed/*.json"))
            missing.append((("train", "deepspeed"), f"no file {deepspeed}; {nearest(deepspeed, known)}"))
        elif not _is_json_object(found):
            missing.append((("train", "deepspeed"), f"{found} is not a JSON object; see {CONFIGS / 'deepspeed'}"))
        else:
            run = replace(run, train={**run.train, "deepspeed": str(found)})
    return run, missing


def _is_json_object(path: Path) -> bool:
    try:
        read_stored(path, dict[str, Any], "")
    except StoredFileError:
        return False
    return True
