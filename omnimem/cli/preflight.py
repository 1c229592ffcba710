"""Checks before the first step, on the first rank, for problems that would stop a run hours later.

Files of the data set, targets of the adapter, disk space for checkpoints, and one sample through forward and backward
at the largest budget. Weights, gradients and random generators are unchanged afterwards.
"""

import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from peft.utils import ModulesToSaveWrapper

from omnimem.absent import why_absent
from omnimem.cli.build import Parts
from omnimem.cli.data_report import Finding, inspect_sample
from omnimem.cli.parser import warn
from omnimem.config import ConfigError, RunConfig
from omnimem.data import Failure, Failures, Sample
from omnimem.errors import counted, first_line, lacks_memory
from omnimem.sources import looked_in, named
from omnimem.training.logging import peak_bytes
from omnimem.tuning import AdapterError, StreamedModel, gradient_of, policy_in_training, streamed_loss, trainable

PROBED = 512  # samples whose files are opened; of the others only existence is checked
PER_WEIGHT = 40  # bytes of a checkpoint for each trained weight: 30 measured without DeepSpeed, 44 with ZeRO-2 (small)
BESIDES = 200_000  # other bytes of a checkpoint
STATES = 12  # bytes of gradient and optimizer for each trained weight


def check_data(run: RunConfig, samples: Sequence[Sample], *, what: str = "data") -> tuple[str, Sample]:
    """A line about the data set, `data` or `validation`, and its longest readable sample.

    Raises TooManyFailures if so many samples are unreadable that training would stop.
    """
    # 1. inspect
    step = max(1, -(-len(samples) // PROBED))
    opened = set(range(0, len(samples), step))
    failures = Failures(samples=len(samples), max_failures=run.data.max_failures)
    found: list[Finding] = []
    of_train = what == "data" or not isinstance(run.data.validation, str)
    for place, sample in enumerate(samples):
        finding = _finding(sample, run, probe=place in opened)
        for failure in finding.failures[:1]:
            if failure.reason == "missing" and of_train:
                failure = replace(failure, message=f"{failure.message}; {looked_in(run.data, sample)}")
            failures = failures.add(failure)
        if place in opened and not finding.failures and sample.has_stream:
            found.append(finding)
    # 2. summarise
    if not found:
        given = run.data.validation
        place = given if what == "validation" and isinstance(given, str) else named(run.data.sources)
        first = "".join(f" (first: {failure.message})" for failure in failures.found[:1])
        raise ConfigError(
            [f"{place}: none of {counted(len(opened), 'opened sample')} can be read{first}; repair the data"]
        )
    every = counted(len(samples), "sample")
    looked = f"{len(opened):,} of {every} opened" if step > 1 else f"{every} opened"
    bad = ", ".join(f"{count} {reason}" for reason, count in failures.reasons.items()) or "all can be read"
    bad += "".join(f" (first: {failure.message})" for failure in failures.found[:1])
    seconds, texts = sum(each.seconds for each in found), sum(not sample.has_stream for sample in samples)
    line = f"{what}: {looked}, {seconds:,.0f} s of streams with {_tracks(found)}; {bad}"
    line += f"; {counted(texts, 'row')} of text alone" if texts else ""
    return line, max(found, key=lambda each: each.seconds).sample


def _finding(sample: Sample, run: RunConfig, *, probe: bool) -> Finding:
    """The finding of `omnimem check`; a sample that is not opened can only be missing."""
    if probe:
        return inspect_sample(sample, tracks=run.stream.tracks)
    gone = [path for path in sample.files if not path.is_file()]
    said = [f"{sample.origin}: {path} is missing{_seen(path)}" for path in gone]
    missing = (Failure(id=sample.id, reason="missing", message=each) for each in said)
    return Finding(sample=sample, failures=tuple(missing))


def _seen(path: Path) -> str:
    """What can be seen about a missing path."""
    return f"; {cure}" if (cure := why_absent(path, "")) else ""


def _tracks(found: Sequence[Finding]) -> str:
    names = {(True, True): "video and audio", (True, False): "video only", (False, True): "audio only"}
    counts = Counter((each.video, each.audio) for each in found)
    return ", ".join(f"{name} ({counts[tracks]})" for tracks, name in names.items() if counts[tracks])


def check_run(run: RunConfig, model: StreamedModel, folder: Path, saves: int) -> Iterator[str]:
    """Lines about the adapter and about disk space for `saves` checkpoints.

    Raises AdapterError if a target matches nothing, ConfigError if the disk is too small.
    """
    # 1. targets of the adapter
    weights = sum(parameter.numel() for parameter in trainable(model))
    yield adapter_targets(run, model)
    # 2. disk space
    size = weights * PER_WEIGHT + BESIDES
    kept = min(run.train.get("save_total_limit") or saves, saves) + 1  # the next one, or the adapter, is written first
    kept += run.data.validation is not None  # the best one
    free = shutil.disk_usage(folder).free
    needs = f"{kept} x {size / 1e6:,.1f} MB for checkpoints and the adapter = {kept * size / 1e6:,.1f} MB"
    if kept * size > free:
        cure = "make room, or set train.save_total_limit"
        raise ConfigError([f"{folder}: {needs}, but {free / 1e6:,.1f} MB are free; {cure}"])
    yield f"disk: {needs}; {free / 1e6:,.1f} MB are free"


def adapter_targets(run: RunConfig, model: StreamedModel) -> str:
    """A line about the adapted modules. Raises AdapterError if a target matches nothing."""
    names = [name for name, _ in model.named_parameters() if ".lora_A." in name]
    lora = run.tuning.lora
    found = sorted({name.partition(".lora_A.")[0].rpartition(".")[2] for name in names})
    listed = found if isinstance(lora.targets, str) else lora.targets
    matched = {target: sum(f".{target}.lora_A." in name for name in names) for target in listed}
    absent = [target for target, count in matched.items() if count == 0]
    if absent:
        there = ", ".join(target for target, count in matched.items() if count)
        raise AdapterError(f"lora.targets: {', '.join(absent)} match no module of this model; matched: {there}")
    weights = sum(parameter.numel() for parameter in trainable(model))
    each = ", ".join(f"{target} {count}" for target, count in matched.items())
    saved = [name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    whole = [name.removeprefix("base_model.model.") for name in saved]
    also = f" and in full {', '.join(whole)}" if whole else ""
    return f"adapter: {counted(len(names), 'module')} ({each}){also}, {counted(weights, 'weight')}"


def unevicted(which: str, tokens: int, slots: int) -> Iterator[str]:
    """A line if the memory holds all audio and visual tokens of a stream, as full memory does."""
    if 0 < tokens <= slots:
        cure = "lower memory.slots_per_layer, or train on longer streams"
        yield f"the memory holds all {tokens:,} tokens of {which}, so nothing of it is evicted; {cure}"


def rehearse(run: RunConfig, parts: Parts, sample: Sample, batch: int) -> str:
    """A batch of one sample through forward and backward at the largest budget and chunk size; a line about its cost.

    Raises ConfigError if memory does not suffice, MediaError if the sample cannot be read, LayoutError if a chunk size
    that may be drawn is too small.
    """
    # 1. the largest settings that may be drawn
    model, attached, feeder = parts.model, parts.attached, parts.feeder
    drawn = run.tuning.slots(run.memory.slots_per_layer)
    slots = None if None in drawn else max(slots for slots in drawn if slots is not None)
    chunk_tokens = run.tuning.chunks(run.stream.chunk_tokens)[1]
    softness = None if slots is None else run.tuning.selection.at(0.0)
    shown = f"{sample.id}, the longest one," + (f" {batch} times" if batch > 1 else "")
    budget = "full memory" if slots is None else f"{counted(slots, 'slot')} per layer"
    device = next(iter(trainable(model))).device
    cards = [device] if device.type == "cuda" else []
    # 2. one step without optimizer
    training, started = model.training, time.perf_counter()
    if cards:
        torch.cuda.reset_peak_memory_stats(device)
    opened = feeder.open(sample)
    if drawn != (None,) and sample.has_stream:
        warn([*unevicted(f"sample {sample.id}, the longest one", opened.tokens, run.memory.slots_per_layer)])
    run.tuning.check_segments(opened.segments)
    try:
        with torch.random.fork_rng(cards):
            model.train()
            outcome = streamed_loss(
                attached,
                feeder,
                [opened] * batch,
                policy_in_training(run.tuning, parts.policies(slots)),
                softness=softness,
                carry=gradient_of(run.tuning, attached.shape.layers),
                losses=run.tuning.loss.losses,
                model=model,
                chunk_tokens=chunk_tokens,
            )
            torch.autograd.grad(outcome.loss, trainable(model), allow_unused=True)
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        what = f"{shown} at {budget} does not fit on {device} ({first_line(error)})"
        cure = (
            "lower train.per_device_train_batch_size, tuning.budgets or stream.chunk_tokens, set tuning.recompute: "
            "layer or tuning.offload: true"
        )
        raise ConfigError([f"{what}; {cure}"]) from error
    finally:
        model.train(training)
    # 3. report
    states = STATES * sum(parameter.numel() for parameter in trainable(model))
    took = f"{time.perf_counter() - started:.1f} s, peak memory {_peak(device) / 1e6:,.0f} MB"
    return f"step: sample {shown} at {budget}: {took}, optimizer {states / 1e6:,.1f} MB in addition"


def _peak(device: torch.device) -> float:
    """Peak bytes so far: of the device, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_bytes()
