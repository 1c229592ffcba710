"""Fine-tune a model under its memory budget, then evaluate it beside the base model.

deepspeed train/finetune.py --config budget8k.yaml [a.b=c ...] [--dry-run [--sample ID]]
    [--resume auto|PATH] [--overwrite] [--skip-preflight]
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from math import ceil, inf
from pathlib import Path
from typing import Any, cast

import torch
from transformers import SchedulerType, Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from omnimem.backbones import Backbone, load_backbone
from omnimem.backbones.files import checkpoint_errors
from omnimem.backbones.load import check_quantization, family_at
from omnimem.budget import BudgetError
from omnimem.cli.arms import applicable, check_benchmarks, evaluate_arms, left_out
from omnimem.cli.build import (
    Parts,
    Policies,
    budget_of,
    check_calibration,
    feeder_of,
    policies_of,
    refuse_unpadded,
    training_samples,
    validation_samples,
)
from omnimem.cli.dry_run import preview
from omnimem.cli.environment import prepare_process, world_size
from omnimem.cli.parser import Parser, rank, warn
from omnimem.cli.preflight import check_data, check_run, rehearse
from omnimem.cli.tuned_model import write_adapter_description
from omnimem.cli.workers import LocalWorkers, RankWorkers, Workers
from omnimem.comparison import compare
from omnimem.config import ConfigError, RunConfig, differences, dump, load, refuse_changes, refuse_unseen_budget
from omnimem.data import Failures, ManifestError, Sample
from omnimem.errors import counted
from omnimem.evaluation import Evaluation
from omnimem.extras import require
from omnimem.run import Record, RunFolder, Start, plan, provenance, sha256, update_json
from omnimem.shipped import shipped
from omnimem.sources import digest, missing_sources, remarks_on
from omnimem.streaming.attach import attach
from omnimem.streaming.feeder import Feeder
from omnimem.textfile import StoredFileError, read_stored
from omnimem.training.arguments import (
    OwnSettings,
    refuse_adapter,
    refuse_engine_changes,
    refuse_mixed_precision,
    refuse_zero_rate,
    trackers_of,
    train_changes,
    train_section,
    training_arguments,
)
from omnimem.training.collectives import first_rank_first
from omnimem.training.logging import Progress, callbacks_of
from omnimem.training.pickles import refuse_code
from omnimem.training.portable import refuse_other_batch
from omnimem.training.sampler import Mixture, recording, seed_of
from omnimem.training.shutdown import follow_launcher
from omnimem.training.trainer import StreamTrainer
from omnimem.training.zero3 import engine_settings, stage_of, whole
from omnimem.tuning import (
    Plan,
    StreamedModel,
    adapter_tensors,
    add_adapter,
    described,
    load_adapter,
    require_base,
    start_adapter,
)


def main(arguments: Sequence[str]) -> None:
    """Check everything, then train; with --dry-run, show what would be done instead."""
    follow_launcher()
    # 1. read the config
    parser = _parser()
    given = parser.parse(arguments)
    if given.sample is not None and not given.dry_run:
        parser.error("--sample goes with --dry-run")
    run = load(given.config, given.overrides, train=train_section())
    refuse_unseen_budget(run)
    refuse_mixed_precision(run)
    refuse_adapter(run)
    check_quantization(run.model)
    warn(differences(run))
    require("scipy", *(["deepspeed"] if run.train.get("deepspeed") else []))  # before hours of training, not after
    # 2. decide on the run folder and the checkpoint
    start = checked_start(run, given)
    unmeasured = unmeasurable(run, start)
    if given.dry_run:
        warn(unmeasured)
        dry_run(run, start, given.sample)
        return
    if unmeasured:
        raise BudgetError(unmeasured[0])
    check_model_and_trackers(run)
    # 3. read and check the data
    samples, validation = training_samples(run), validation_samples(run)
    check_answers([*samples, *validation])
    warn([*remarks_on([*samples, *validation]), *trained_on(samples, validation)])
    if rank() == 0 and not start.budgeted:
        check_calibration(run, samples)
    if run.evaluate.after_training:
        check_benchmarks(run)
    longest = None
    if rank() == 0 and not given.skip_preflight:
        line, longest = check_data(run, samples)
        report(line)
        if validation:
            report(check_data(run, validation, what="validation")[0])
    # 4. train
    prepare_process()
    finetune(run, start, samples, longest, validation)


def finetune(
    run: RunConfig, start: Start, samples: Sequence[Sample], longest: Sample | None, validation: Sequence[Sample] = ()
) -> None:
    """Train, save and verify the adapter, evaluate, compare; every rank runs this.

    `longest` is the sample of the rehearsal, on the first rank; None: no preflight.
    """
    # 1. open the run folder
    settings = training_arguments(run.train, start.folder, validated=bool(validation))
    partitioned = stage_of(run.train) == 3
    taken = Mixture(samples=samples, weights=run.data.weights).size  # per epoch
    refuse_zero_rate(settings, step_count(settings, taken))
    warn(plan_of(run, settings).untrained(step_count(settings, taken)))
    first = settings.process_index == 0
    if first:
        warn([*changed_data(start, samples), *changed_settings(start)])
        start.open(dump(run), _provenance(run, settings, samples, start))
        for line in begun(start, step_count(settings, taken)):
            print(line, flush=True)
    # 2. build the model with its adapter
    backbone, model, feeder = build_model(run, settings)
    with attach(backbone.text_model, recompute_layers=run.tuning.recompute == "layer") as attached:
        # 3. read or measure the budget of the layers
        with first_rank_first(first=first):
            budget = budget_of(run, attached, feeder, start.folder)
        policies = policies_of(run, budget)
        parts = Parts(backbone=backbone, model=model, attached=attached, feeder=feeder, policies=policies)
        if first:
            in_training = described(run.tuning, policies(None), attached.shape.layers)
            update_json(start.folder.record, policy_in_training=in_training, selection_from=run.memory.selection_from)
        # 4. rehearse one step
        with first_rank_first(first=first):
            if longest is not None:
                rehearse_run(run, start.folder, parts, longest, settings, checkpoint_count(settings, taken))
        # 5. train, and save the adapter
        trainer = build_trainer(run, start, samples, parts, settings, validation)
        train(trainer, start, first=first)
        step = trainer.load_best() if run.train.get("load_best_model_at_end") else trainer.state.global_step
        if first:
            update_json(start.folder.record, adapter_step=step)
            if best := trainer.state.best_global_step:
                metric, value = trainer.args.metric_for_best_model, trainer.state.best_metric
                print(f"best checkpoint: {start.folder.checkpoint(best)}, validation {metric} {value:.4g}", flush=True)
        trainer.save_adapter(start.folder.adapter, step)
        # 6. verify what was saved, evaluate on all ranks, compare
        workers = evaluation_workers(run, start.folder)
        workers.prepare(lambda leading: describe_adapter(start.folder))
        if not partitioned:
            evaluate_and_compare(run, start.folder, parts, workers)
    if partitioned and run.evaluate.after_training:
        with reloaded(run, start.folder, policies, settings.device) as parts:
            evaluate_and_compare(run, start.folder, parts, workers)


def dry_run(run: RunConfig, start: Start, name: str | None) -> None:
    """Everything that a run does before it loads its model, then the plan; nothing is written.

    `name` is the id of the sample to show; None: the first one.
    """
    # 1. the settings of the trainer, on every rank that a launcher starts
    prepare_process()
    settings = training_arguments(run.train, start.folder, validated=run.data.validation is not None)
    # 2. the data, if they are there
    taken = None
    if not missing_sources(run.data):
        samples, validation = training_samples(run), validation_samples(run)
        check_answers([*samples, *validation])
        warn([*remarks_on([*samples, *validation]), *trained_on(samples, validation)])
        if not start.budgeted:
            check_calibration(run, samples)
        taken = Mixture(samples=samples, weights=run.data.weights).size
        refuse_zero_rate(settings, step_count(settings, taken))
        warn(plan_of(run, settings).untrained(step_count(settings, taken)))
    # 3. the plan
    warn(changed_settings(start))
    if rank() == 0:
        preview(run, name, describe_training(settings, start, taken), start.folder if start.budgeted else None)


def describe_training(settings: TrainingArguments, start: Start, taken: int | None) -> Iterator[str]:
    """Optimizer, schedule, trackers, steps and checkpoints; `taken` is the number of samples per epoch, if known."""
    # 1. optimizer and trackers
    engine = settings.hf_deepspeed_config if settings.deepspeed else None
    if engine is not None and "optimizer" in engine.config:
        yield f"optimizer: {engine.config['optimizer'].get('type')} of {settings.deepspeed}"
    else:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(settings)
        yield f"optimizer: {kind.__module__}.{kind.__name__}, {options}, weight decay {settings.weight_decay:g}"
    others = [name for name in settings.report_to or () if name not in ("none", "tensorboard")]
    yield f"trackers: {', '.join(['tensorboard', *others])} ({start.folder.tensorboard}), {start.folder.metrics}"
    # 2. steps
    steps = step_count(settings, taken) if taken else max(0, settings.max_steps)
    size = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * settings.world_size
    if not steps:
        yield "steps: unknown until the training data are there"
        return
    rate, warmup = f"learning rate {settings.learning_rate:g}", settings.get_warmup_steps(steps)
    schedule = f"{SchedulerType(settings.lr_scheduler_type).value} after {counted(warmup, 'step')} of warm-up"
    of = f", {counted(taken, 'sample')} per epoch" if taken else ""
    yield f"steps: {start.step} of {steps:,} done, {counted(size, 'sample')} each{of}; {rate}, {schedule}"
    # 3. checkpoints
    every = checkpoint_interval(settings, steps, taken or 0)
    at = [*range(int(every), steps + 1, int(every))] if every < inf else []
    at = [step for step in (at if at[-1:] == [steps] else [*at, steps]) if step > start.step]
    listed = ", ".join(map(str, at if len(at) <= 6 else [*at[:3], "...", *at[-2:]]))
    kept = f"the newest {settings.save_total_limit} are kept" if settings.save_total_limit else "all are kept"
    where = start.folder.checkpoint(at[0]) if at else start.folder.path
    begin = f"continue from {start.checkpoint}; " if start.checkpoint else ""
    if settings.eval_strategy != IntervalStrategy.NO:
        by_step = settings.eval_steps if settings.eval_strategy == IntervalStrategy.STEPS else None
        often = f"every {counted(by_step, 'step')}" if by_step else "after each epoch"
        yield f"validation: {often}"
    yield f"checkpoints: {begin}after steps {listed or 'none'} ({kept}), the first one in {where}"


# --------------------------------------------------------------------------------------------------------------- checks


def checked_start(run: RunConfig, given: argparse.Namespace) -> Start:
    """How the run starts; raises an error for settings that a resumed run may not change."""
    start = plan(run.name, resume=given.resume, overwrite=given.overwrite)
    if start.resumed and start.folder.config.is_file():
        try:
            refuse_changes(run, start.folder.config)
        except ConfigError:
            if not start.untrained:
                raise
            start = start.without_old_budget()
        if start.checkpoint is not None:
            refuse_engine_changes(run, start.folder.record)
            start = replace(start, changed=train_changes(run, start.folder.config))
    if start.checkpoint is not None:
        refuse_code(start.checkpoint)
        with checkpoint_errors(shipped(run.model.path)):
            require_base(start.checkpoint, shipped(run.model.path))
        refuse_other_batch(start.checkpoint, run.train, world_size())
    return start


def unmeasurable(run: RunConfig, start: Start) -> list[str]:
    """A line when the budget must be measured and no process will hold the whole model; a dry run may go on."""
    if stage_of(run.train) == 3 and run.memory.budget.needs_signals and not start.budgeted:
        return [
            "memory.budget: under ZeRO-3 no process holds the whole model, which the measurement needs; run "
            f"`omnimem calibrate` with this config first, which writes {start.folder.budget}"
        ]
    return []


def check_model_and_trackers(run: RunConfig) -> None:
    """What else would end the run after its data were read, which may take hours.

    Raises CheckpointError without a config.json of a known family, ConfigError for a tracker that is not installed.
    """
    family_at(shipped(run.model.path))
    try:
        trackers_of(run.train.get("report_to") or ())
    except ValueError as error:
        raise ConfigError([f"train.{error}"]) from error


def check_answers(samples: Sequence[Sample]) -> None:
    """Raises ManifestError when no question of a sample has an answer to learn."""
    silent = [sample for sample in samples if not sample.is_learned]
    if silent:
        what = "messages: no answer to learn; add an assistant message (loss: true), or remove the line"
        raise ManifestError([f"{sample.origin} {what}" for sample in silent])


def changed_data(start: Start, samples: Sequence[Sample]) -> list[str]:
    """A warning if a run is resumed with other data than it was started with: its order cannot be the same then."""
    if start.checkpoint is None:
        return []
    try:
        earlier = read_stored(start.folder.record, Record, "").get("sha256", {}).get("data")
    except StoredFileError:  # missing or damaged: the run goes on without it
        return []
    if earlier in (None, digest(samples)):
        return []
    return [f"data.train: the rows differ from those that {start.folder.path} was started with; some may come twice"]


def begun(start: Start, steps: int) -> list[str]:
    """What is said of the checkpoints of a resumed run: where it continues, or that no step is left."""
    lines = [start.news] if start.news else []
    if start.checkpoint is not None:
        left = "" if start.step < steps else "; no step is left, a larger train.max_steps adds some"
        lines.append(f"continue from {start.checkpoint}: {start.step} of {counted(steps, 'step')} done{left}")
    return lines


def changed_settings(start: Start) -> list[str]:
    """A line for each setting of `train` that a resumed run changes."""
    when = f"from step {start.step + 1} on"
    return [f"train.{name}: {now!r} {when}, {before!r} until then" for name, (before, now) in start.changed.items()]


def trained_on(samples: Sequence[Sample], validation: Sequence[Sample]) -> list[str]:
    """A warning when recordings of the validation are trained on too."""
    seen = {recording(sample) for sample in samples}
    both = sorted({recording(sample) for sample in validation} & seen)
    return [f"data.validation: {counted(len(both), 'recording')} also in data.train, {both[0]} first"] if both else []


def report(line: str) -> None:
    """Print a finding of the preflight."""
    print(f"preflight: {line}", flush=True)


def rehearse_run(
    run: RunConfig, folder: RunFolder, parts: Parts, longest: Sample, settings: TrainingArguments, saves: int
) -> None:
    """The part of the preflight that needs the model; under ZeRO-3 no rank can take a step alone."""
    for line in check_run(run, parts.model, folder.path, saves):
        report(line)
    if stage_of(run.train) == 3:
        report("step: not tried, since under ZeRO-3 no process holds the whole model")
    else:
        batch = settings.per_device_train_batch_size
        report(rehearse(run, parts, longest, batch))


def checkpoint_count(settings: TrainingArguments, samples: int) -> int:
    """Number of checkpoints that a run writes, including those it removes later."""
    steps = step_count(settings, samples)
    return ceil(steps / checkpoint_interval(settings, steps, samples))


def checkpoint_interval(settings: TrainingArguments, steps: int, samples: int) -> float:
    """Steps between two checkpoints; infinite: only the last step has one."""
    interval = settings.save_steps * steps if settings.save_steps < 1 else settings.save_steps
    strategy = SaveStrategy(settings.save_strategy).value
    return {"no": inf, "epoch": max(1, _steps_of_epoch(settings, samples)), "steps": max(1, ceil(interval))}[strategy]


def step_count(settings: TrainingArguments, samples: int) -> int:
    """Number of steps of a run."""
    epochs = settings.num_train_epochs
    return settings.max_steps if settings.max_steps > 0 else ceil(_steps_of_epoch(settings, samples) * epochs)


def _steps_of_epoch(settings: TrainingArguments, samples: int) -> int:
    batch = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * settings.world_size
    return ceil(samples / batch)


# ------------------------------------------------------------------------------------------------------------- building


def build_model(run: RunConfig, settings: TrainingArguments) -> tuple[Backbone, StreamedModel, Feeder]:
    """The base model, the same model with its adapter, and the feeder, which needs whole encoders."""
    backbone = load_backbone(run.model, settings.device)
    refuse_unpadded(run, backbone)
    torch.manual_seed(seed_of(settings.seed, "adapter"))
    decoder = set(backbone.text_model.parameters())
    encoders = [each for each in backbone.model.parameters() if each not in decoder]
    lora, begun = run.tuning.lora, run.model.adapter
    model = start_adapter(backbone.model, lora, Path(begun)) if begun else add_adapter(backbone.model, lora)
    with whole(encoders) if stage_of(run.train) == 3 else nullcontext():
        return backbone, model, feeder_of(run, backbone)


def build_trainer(
    run: RunConfig,
    start: Start,
    samples: Sequence[Sample],
    parts: Parts,
    settings: TrainingArguments,
    validation: Sequence[Sample] = (),
) -> StreamTrainer:
    """The trainer of a run."""
    return StreamTrainer(
        # 1. the model and how it is streamed
        model=parts.model,
        layers=cast(Any, parts.backbone.text_model).layers,
        attached=parts.attached,
        feeder=parts.feeder,
        policies=parts.policies,
        # 2. the steps
        args=settings,
        own=OwnSettings.of(run.train),
        plan=plan_of(run, settings),
        # 3. the data
        samples=samples,
        weights=run.data.weights,
        validation=validation,
        failures=Failures(samples=len(samples), max_failures=run.data.max_failures),
        # 4. what is written
        folder=start.folder,
        callbacks=callbacks_of(start, first=settings.process_index == 0),
    )


def plan_of(run: RunConfig, settings: TrainingArguments) -> Plan:
    """What every step of a run draws."""
    slots, chunk_tokens = run.memory.slots_per_layer, run.stream.chunk_tokens
    return Plan(options=run.tuning, slots_per_layer=slots, chunk_tokens=chunk_tokens, seed=settings.seed)


@contextmanager
def reloaded(run: RunConfig, folder: RunFolder, policies: Policies, device: torch.device) -> Iterator[Parts]:
    """The whole model with the saved adapter, loaded again: under ZeRO-3 each rank holds a part."""
    unset_hf_deepspeed_config()
    backbone = load_backbone(run.model, device)
    model, feeder = load_adapter(backbone.model, folder.adapter), feeder_of(run, backbone)
    with attach(backbone.text_model) as attached:
        yield Parts(backbone=backbone, model=model, attached=attached, feeder=feeder, policies=policies)


# --------------------------------------------------------------------------------------------------- training and after


def train(trainer: StreamTrainer, start: Start, *, first: bool) -> None:
    """Take all remaining steps; run.json records steps, failed samples and skipped steps even when it is stopped."""
    try:
        with Progress() as progress:
            trainer.add_callback(progress)
            trainer.train(resume_from_checkpoint=str(start.checkpoint) if start.checkpoint else None)
    finally:
        if first:
            failed = [asdict(failure) for failure in trainer.failed.found]
            left_out = [asdict(step) for step in trainer.nonfinite.found]
            counts: dict[str, Any] = {"steps": trainer.state.global_step}
            if trainer.feeder.cache:
                counts["encoder_cache"] = dict(trainer.metrics.cache_counts(trainer.args.world_size))
            if trainer.failed.read_later:
                counts["failed_samples_read_later"] = list(trainer.failed.read_later)
            if trainer.overlap.latest is not None:
                counts["selection_overlap"] = trainer.overlap.latest
            if trainer.feeder.trained.reached:
                counts["positions_reached"] = trainer.feeder.trained.reached
            if trainer.one_track.found:
                counts["one_track_samples"] = trainer.one_track.found
            if trainer.state.best_global_step:
                best = {"step": trainer.state.best_global_step, "value": trainer.state.best_metric}
                counts["best_checkpoint"] = {**best, "metric": trainer.args.metric_for_best_model}
            if trainer.validation.failed.found:
                counts["failed_validation_samples"] = [asdict(one) for one in trainer.validation.failed.found]
            update_json(start.folder.record, failed_samples=failed, left_out_steps=left_out, **counts)


def evaluation_workers(run: RunConfig, folder: RunFolder) -> Workers:
    """The ranks of the training; one rank alone starts `evaluate.processes` helpers."""
    if world_size() > 1:
        return RankWorkers()
    return LocalWorkers(run.evaluate.processes, ["--config", str(folder.config), "train={}"])


def describe_adapter(folder: RunFolder) -> None:
    """Verify the saved adapter, and record it in run.json."""
    tensors = adapter_tensors(folder.adapter)
    update_json(
        folder.record, adapter={"sha256": sha256(folder.adapter, suffixes=(".safetensors",)), "tensors": len(tensors)}
    )
    write_adapter_description(folder.path)
    print(f"adapter: {folder.adapter} ({counted(sum(t.numel() for t in tensors.values()), 'weight')})", flush=True)


def evaluate_and_compare(run: RunConfig, folder: RunFolder, parts: Parts, workers: Workers) -> None:
    """Evaluate all arms when the config asks for it, each rank its share of the questions; the first rank compares."""
    if not run.evaluate.after_training:
        return
    # 1. evaluate
    evaluation = Evaluation(attached=parts.attached, feeder=parts.feeder, options=run.evaluate)
    names = applicable(run, tuned=True, backbone=parts.feeder.backbone)
    warn(left_out(run, parts.feeder.backbone))
    with workers.claim(folder.path):
        evaluate_arms(run, evaluation, parts.policies, folder, names, parts.model, workers=workers)
    # 2. compare
    if workers.leads:
        compare([folder.path], folder.comparison)
        print(f"report: {folder.comparison / 'report.html'}", flush=True)


def _provenance(
    run: RunConfig, settings: TrainingArguments, samples: Sequence[Sample], start: Start
) -> dict[str, object]:
    base, begun = Path(run.model.path), run.model.adapter and Path(run.model.adapter)
    digests = {
        "base": sha256(base, suffixes=(".safetensors",)) if base.is_dir() else None,
        "data": digest(samples),
        **({"start_adapter": sha256(begun, suffixes=(".safetensors",))} if begun else {}),
    }
    found = provenance(command=sys.argv, seed=settings.seed, sha256=digests)
    if start.changed:
        found["changed_settings"] = {"after_step": start.step, "train": dict(start.changed)}
    engine = engine_settings(run.train) or {}
    return {**found, "device": str(settings.device), "torch_threads": torch.get_num_threads(), "engine": engine}


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_config()
    parser.add_argument(
        "--dry-run", action="store_true", help="check as a run does, and show what it would do; no training"
    )
    parser.add_argument("--sample", metavar="ID", help="with --dry-run: show this sample, with all its questions")
    parser.add_argument("--resume", metavar="auto|PATH", help="resume from the newest checkpoint, or from this one")
    parser.add_argument("--skip-preflight", action="store_true", help="train without checking data and disk first")
    parser.add_argument("--overwrite", action="store_true", help="start a new run; the old folder is moved to <name>.1")
    return parser
