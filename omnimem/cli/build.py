"""Builds the parts of a run from its configuration: feeder, budgets, policies."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import final

from tqdm import tqdm

from omnimem.backbones import Backbone
from omnimem.budget import AudioVisualBudget, Budget, BudgetError, SplitBudget
from omnimem.calibration import calibrate, missing_modality
from omnimem.config import ConfigError, RunConfig, exported
from omnimem.config.exported import Policies
from omnimem.data import DataSource, Failure, Failures, Sample
from omnimem.media import MediaError
from omnimem.policies import PerturbationOptions
from omnimem.rows import tracks_of
from omnimem.run import RunFolder
from omnimem.sources import read_source
from omnimem.sources import training_samples as samples_of
from omnimem.streaming.attach import StreamedAttention
from omnimem.streaming.encoder_cache import EncoderCache
from omnimem.streaming.feeder import Feeder
from omnimem.tokens import Chunk
from omnimem.training.sampler import held_out
from omnimem.tuning import StreamedModel
from omnimem.tuning.gradient.options import HALF_WAY

GIGABYTE = 10**9


@final
@dataclass(frozen=True, kw_only=True)
class Parts:
    """The objects that training and evaluation share."""

    backbone: Backbone
    model: StreamedModel
    attached: StreamedAttention
    feeder: Feeder
    policies: Policies


def feeder_of(run: RunConfig, backbone: Backbone) -> Feeder:
    """Turns samples into chunks; encoder outputs are cached on disk with `data.cache`."""
    cache = run.data.cached
    limit = None if cache is None or cache.size_gb is None else round(cache.size_gb * GIGABYTE)
    return Feeder(backbone, run.stream, None if cache is None else EncoderCache.of(backbone, Path(cache.folder), limit))


def refuse_unpadded(run: RunConfig, backbone: Backbone, *, training: bool = True) -> None:
    """Raises ConfigError where streams with text under `markers: with_group` cannot be padded to equal lengths.

    They keep unequal numbers of text tokens. Streams of a batch are padded, but in training `gradient: released` and
    `paper` read what a layer keeps as one sequence, padding included. Heads that choose for themselves are not padded.
    """
    policy, mode = run.memory.policy.build(None), run.tuning.gradient
    if policy.markers == "keep" or not backbone.stamped or run.stream.tracks == "audio":
        return
    why, found = "memory.policy.markers: with_group keeps unequal numbers of text tokens of this model's streams", []
    batch = int(run.train.get("per_device_train_batch_size", 8))
    if training and mode in HALF_WAY and batch > 1:
        found.append(
            f"train.per_device_train_batch_size = {batch}: {why} in a batch, which tuning.gradient: {mode} would read "
            "as one sequence; set it to 1, or markers: keep"
        )
    if policy.traits.per_head:
        found.append(f"memory.policy.per_head: {why} in each head; set it to false, or markers: keep")
    if found:
        raise ConfigError(found)


def budget_of(run: RunConfig, attached: StreamedAttention, feeder: Feeder, folder: RunFolder) -> Budget:
    """The run's budget: from its own file, else measured or built, and written there.

    Raises BudgetError if the file was made for other settings.
    """
    if folder.budget.is_file():
        return _recorded(run, folder)
    budget = new_budget(run, attached, feeder)
    budget.write(folder.budget)
    return budget


def check_calibration(run: RunConfig, samples: Sequence[Sample]) -> None:
    """Raises CalibrationError if a budget must be measured on streams that all lack audio, or video.

    Looks at the first `calibration.streams` readable ones, which the measurement takes.
    """
    if not run.memory.budget.needs_signals:
        return
    found: set[str] = set()
    measured = 0
    for sample in (sample for sample in samples if sample.has_stream):
        try:
            found.add(tracks_of(sample, run.stream.tracks))
        except MediaError:
            continue
        measured += 1
        if measured == run.calibration.streams:
            break
    for name, absent in (("audio", {"video"}), ("visual", {"audio"})):
        if found == absent:
            raise missing_modality(name)


def known_budget(run: RunConfig, layers: int, folder: RunFolder | None) -> Budget | None:
    """The budget in the file of the run's folder, else one that needs no measurement; None if it must be measured.

    Raises BudgetError if a file was made for other settings, another model or another stream.
    """
    if folder is not None and folder.budget.is_file():
        return _recorded(run, folder)
    return None if run.memory.budget.needs_signals else _built(run, layers)


def _recorded(run: RunConfig, folder: RunFolder) -> Budget:
    budget = Budget.read(folder.budget)
    made_for = budget.provenance.get("settings", budget_settings(run))
    if made_for != budget_settings(run):
        before, now = made_for.split(", "), budget_settings(run).split(", ")
        old, new = (", ".join(e for e in mine if e not in other) for mine, other in ((before, now), (now, before)))
        raise BudgetError(
            f"{folder.budget} was made for {old or made_for}, the run asks for {new or budget_settings(run)}; "
            "delete the file, or give the run another name"
        )
    _check_policy(run, budget, folder.budget)
    _check_stream(run, budget, folder.budget)
    return budget


def new_budget(run: RunConfig, attached: StreamedAttention, feeder: Feeder) -> Budget:
    """The run's budget, measured or built."""
    if run.memory.budget.needs_signals:
        return measured_budget(run, attached, feeder, training_samples(run))
    return _built(run, attached.shape.layers)


def _built(run: RunConfig, layers: int) -> Budget:
    built = run.memory.budget.build(layers, run.memory.slots_per_layer)
    return replace(built, provenance={**built.provenance, "settings": budget_settings(run)})


def _check_policy(run: RunConfig, budget: Budget, file: Path) -> None:
    """Raises BudgetError if the signals of a file were measured under another policy."""
    own, measured = run.memory.policy.build(None), budget.provenance.get("policy")
    if budget.signals is None or measured is None or not own.supports("calibration"):
        return
    if measured != own.name:
        raise BudgetError(
            f"{file} was measured under policy {measured}, the run has {own.name}; "
            "delete the file, or give the run another name"
        )


def _check_stream(run: RunConfig, budget: Budget, file: Path) -> None:
    """Raises BudgetError if the signals of a file were measured on streams that were read in another way."""
    before, now = budget.provenance.get("stream"), asdict(run.stream)
    if not isinstance(before, dict):  # a file of an earlier version
        return
    for name, value in now.items():
        if before.get(name, value) != value:
            raise BudgetError(
                f"{file} was measured with stream.{name} = {before[name]}, the run has {value}; delete the file, or "
                "give the run another name"
            )


def policies_of(run: RunConfig, budget: Budget) -> Policies:
    """The run's policy at any number of slots per layer; None: full memory."""
    return exported.policies_of(run.memory, budget)


def training_samples(run: RunConfig) -> list[Sample]:
    """The training streams; a budget is measured on the first of them."""
    if run.data.train is None:
        raise BudgetError("data.train names no manifest; calibration measures the first training streams")
    samples, share = samples_of(run.data), run.data.validation
    return held_out(samples, share)[0] if isinstance(share, float) else samples


def validation_samples(run: RunConfig) -> list[Sample]:
    """The streams of `data.validation`; none without it."""
    given = run.data.validation
    if given is None or run.data.train is None:
        return []
    if isinstance(given, str):
        return read_source(DataSource(path=given), allow_absolute=run.data.allow_absolute_paths)
    return held_out(samples_of(run.data), given)[1]


def measured_budget(run: RunConfig, attached: StreamedAttention, feeder: Feeder, samples: Sequence[Sample]) -> Budget:
    """The run's audio-visual budget, from signals measured under its own policy and size.

    Policies that are more than one score per layer (per-head storage, probe prompts, merged tokens) have no pool to
    measure: their signals are measured under `distinct`. During the measurement all layers keep the same number of
    tokens, split by the ratio only.
    """
    # 1. an even split during the measurement
    wanted = run.memory.budget
    if not isinstance(wanted, AudioVisualBudget):
        raise BudgetError(
            f"memory.budget: {{name: {wanted.name}}} has nothing to calibrate; "
            "set memory.budget: {name: audio_visual}, or go on without a calibration"
        )
    layers, slots = attached.shape.layers, run.memory.slots_per_layer
    even = SplitBudget(visual_audio_ratio=wanted.visual_audio_ratio).build(layers, slots)
    # 2. measure
    used: list[str] = []
    with tqdm(total=run.calibration.streams, desc="calibration", unit="stream", disable=None) as bar:
        streams = _streams(samples, feeder, run.data.max_failures, used, bar)
        own = run.memory.policy.build(even)
        policy = own if own.supports("calibration") else PerturbationOptions().build(even)
        signals = calibrate(attached, policy, streams, run.calibration)
    # 3. allocate
    budget = replace(wanted, table="calibrate").build(layers, slots, signals)
    provenance = {
        **budget.provenance,
        "settings": budget_settings(run),
        "model": run.model.path,
        "policy": policy.name,
        "chunk_tokens": run.stream.chunk_tokens,
        "stream": asdict(run.stream),
        "skip_chunks": run.calibration.skip_chunks,
        "streams": used,
    }
    return replace(budget, provenance=provenance)


def budget_settings(run: RunConfig) -> str:
    """The settings that a budget file depends on."""
    return f"{run.memory.slots_per_layer} slots a layer, {run.memory.budget}"


def _streams(
    samples: Sequence[Sample], feeder: Feeder, max_failures: float, used: list[str], bar: tqdm
) -> Iterator[Iterable[Chunk]]:
    """The chunks of each readable sample; unreadable ones are skipped and counted."""
    failures = Failures(samples=len(samples), max_failures=max_failures)
    for sample in (sample for sample in samples if sample.has_stream):
        try:
            opened = feeder.open(sample)
        except MediaError as error:
            failures = failures.add(Failure(id=sample.id, reason=error.reason, message=str(error)))
            continue
        used.append(sample.id)
        yield feeder.chunks([opened])
        bar.update()
