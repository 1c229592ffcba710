"""From a run's configuration to its parts: backbone, feeder, budgets, policies."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from omnimem.backbones import Backbone
from omnimem.budget import AudioVisualBudget, Budget, BudgetError, SplitBudget
from omnimem.calibration import calibrate
from omnimem.config import RunConfig, exported
from omnimem.config.exported import Policies
from omnimem.data import Failure, Failures, Sample, read_manifest
from omnimem.media import MediaError
from omnimem.policies import DistinctOptions
from omnimem.run import RunFolder
from omnimem.streaming.attach import StreamedAttention
from omnimem.streaming.feeder import Feeder
from omnimem.tokens import Chunk

CACHE = Path(".cache/encoded")


def feeder_of(run: RunConfig, backbone: Backbone) -> Feeder:
    """What turns samples into chunks; encoder outputs are kept on disk where `data.cache` says so."""
    return Feeder(backbone, run.stream, CACHE if run.data.cache else None)


def budget_of(run: RunConfig, attached: StreamedAttention, feeder: Feeder, folder: RunFolder) -> Budget:
    """The run's budget: its own file if it has one already, else measured or built, and written there.

    Raises BudgetError when the file was made for other settings than the run's.
    """
    if folder.budget.is_file():
        budget = Budget.read(folder.budget)
        made_for = budget.provenance.get("settings", budget_settings(run))
        if made_for != budget_settings(run):
            raise BudgetError(
                f"{folder.budget} was made for {made_for}, the run asks for {budget_settings(run)}; "
                "delete the file, or give the run another name"
            )
        _measured_under(run, budget, folder.budget)
        return budget
    if run.memory.budget.needs_signals:
        budget = measured_budget(run, attached, feeder, training_samples(run))
    else:
        built = run.memory.budget.build(attached.shape.layers, run.memory.slots_per_layer)
        budget = replace(built, provenance={**built.provenance, "settings": budget_settings(run)})
    budget.write(folder.budget)
    return budget


def _measured_under(run: RunConfig, budget: Budget, file: Path) -> None:
    """Raises BudgetError when the signals of a file were measured under another score than the run's own."""
    own, measured = run.memory.policy.build(None), budget.provenance.get("policy")
    if budget.signals is None or measured is None or not own.supports("calibration"):
        return
    if measured != own.name:
        raise BudgetError(
            f"{file} was measured under policy {measured}, the run has {own.name}; "
            "delete the file, or give the run another name"
        )


def policies_of(run: RunConfig, budget: Budget) -> Policies:
    """The run's policy at any number of slots per layer; None: full memory."""
    return exported.policies_of(run.memory, budget)


def resized(run: RunConfig, budget: Budget, slots: int) -> Budget:
    """The same allocation at another number of slots per layer."""
    return exported.resized(run.memory, budget, slots)


def training_samples(run: RunConfig) -> list[Sample]:
    """The streams that the run trains on; a budget is measured on the first of them."""
    if run.data.train is None:
        raise BudgetError("data.train names no manifest; calibration measures the first training streams")
    return read_manifest(run.data.train, allow_absolute=run.data.allow_absolute_paths)


def measured_budget(run: RunConfig, attached: StreamedAttention, feeder: Feeder, samples: Sequence[Sample]) -> Budget:
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
    layers, slots = attached.shape.layers, run.memory.slots_per_layer
    even = SplitBudget(visual_audio_ratio=wanted.visual_audio_ratio).build(layers, slots)
    used: list[str] = []
    with tqdm(total=run.calibration.streams, desc="calibration", unit="stream", disable=None) as bar:
        streams = _streams(samples, feeder, run.data.max_failures, used, bar)
        own = run.memory.policy.build(even)
        policy = own if own.supports("calibration") else DistinctOptions().build(even)
        signals = calibrate(attached, policy, streams, run.calibration)
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
