"""The trainer: a Hugging Face Trainer whose step streams its samples through the memory."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast, final

import torch
from accelerate.utils.memory import clear_device_cache
from peft.optimizers import create_loraplus_optimizer
from peft.utils import set_peft_model_state_dict
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.training_args import OptimizerNames

from omnimem.backbones.files import weights_digest
from omnimem.config.exported import Policies
from omnimem.data import Failures, Sample
from omnimem.errors import Stopped
from omnimem.media import MediaError
from omnimem.media.prefetch import DecoderLost
from omnimem.run import RunError, RunFolder
from omnimem.streaming.ahead import ReadAhead
from omnimem.streaming.attach import StreamedAttention
from omnimem.streaming.feeder import EncodedSample, Feeder, batch_by_layout
from omnimem.training.arguments import OwnSettings
from omnimem.training.checkpoints import CheckpointWriter, written_by_all
from omnimem.training.deepspeed_internals import keep_gradient_norm, same_buffer_types
from omnimem.training.failures import FailedSamples, OneTrackSamples, failure_of
from omnimem.training.gradient_sync import whole_gradient
from omnimem.training.logging import Finished, StepMetrics
from omnimem.training.nonfinite import NonFiniteGuard
from omnimem.training.pickles import weights_only
from omnimem.training.portable import Layout, Recipe, State, restore_portable
from omnimem.training.sampler import Batching, EpochSampler, Mixture, SampleDataset, collate, seed_of
from omnimem.training.shutdown import ShutdownSignal
from omnimem.training.validation import PREFIX, EarlyStopping, Validation, ValidationError
from omnimem.training.watchdog import Watchdog
from omnimem.training.zero3 import LayerGathering, whole
from omnimem.tuning import (
    Plan,
    SelectionOverlap,
    Step,
    StreamedModel,
    adapter_tensors,
    gradient_of,
    policy_in_training,
    streamed_loss,
    trainable,
)
from omnimem.tuning.saved_modules import copies


@final
class StreamTrainer(Trainer):
    """Streams the samples of each step at its own budget and temperature.

    `training_step` is the whole step. Everything else that the Trainer calls is delegated to an owned object:
    `batching`, `nonfinite`, `shutdown`, `watchdog`, `metrics`, `overlap`, `failed`, `checkpoints` and, under ZeRO-3,
    `gathering`.
    """

    def __init__(
        self,
        *,
        model: StreamedModel,
        args: TrainingArguments,
        own: OwnSettings,
        samples: Sequence[Sample],
        validation: Sequence[Sample] = (),
        layers: Sequence[nn.Module],
        attached: StreamedAttention,
        feeder: Feeder,
        policies: Policies,
        plan: Plan,
        folder: RunFolder,
        failures: Failures,
        callbacks: list[TrainerCallback],
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """`layers` are the decoder layers, which ZeRO-3 partitions; `weights` are those of `Mixture`."""
        workers, args.dataloader_num_workers = args.dataloader_num_workers, 0  # they decode (`ReadAhead`)
        self.ahead = ReadAhead(feeder, workers)
        dataset = SampleDataset(samples)
        held: Any = {"eval_dataset": SampleDataset(validation)} if validation else {}
        super().__init__(
            model=model, args=args, data_collator=self._announced, train_dataset=dataset, callbacks=callbacks, **held
        )
        # 1. what is trained, and how it is streamed
        self.adapted, self.samples, self.layers = model, samples, layers
        self.attached, self.feeder, self.policies, self.plan = attached, feeder, policies, plan
        self.backprop = gradient_of(plan.options, attached.shape.layers)
        # 2. the owned objects
        layout = Layout.of(self)
        self.mixture = Mixture(samples=samples, weights=weights or {})
        self.batching = Batching(
            samples=self.mixture.size, size=layout.global_batch, drop_last=args.dataloader_drop_last
        )
        self.failed, self.one_track = FailedSamples(failures), OneTrackSamples()
        self.nonfinite, self.shutdown = NonFiniteGuard(own.max_bad_steps), ShutdownSignal()
        known = (self.failed, self.one_track, feeder.trained, feeder)
        self.metrics = StepMetrics(folder.metrics, plan, attached.shape.layers, self.nonfinite, *known)
        own_policy, every = policies(plan.slots_per_layer), plan.options.overlap_every
        self.overlap = SelectionOverlap(attached, feeder, own_policy, samples, every)
        self.watchdog = Watchdog(own.step_timeout_seconds, args.process_index)
        base = weights_digest(model.name_or_path) if args.process_index == 0 else None
        self.checkpoints = CheckpointWriter(folder, self.accelerator, layout, args.save_total_limit, base)
        self.gathering: LayerGathering | None = None  # under ZeRO-3, once the engine is built
        self._rate: float | None = None  # learning rate of the step
        self.validation = self._validation(validation, workers, failures)
        for callback in (self.nonfinite, self.shutdown, self.metrics, self.watchdog):
            self.add_callback(callback)
        if own.early_stopping_patience is not None:
            self.add_callback(EarlyStopping(own.early_stopping_patience, own.early_stopping_threshold))
        # 3. settings of the Trainer
        self.model_accepts_loss_kwargs = False  # it then counts no tokens to divide the loss by
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)  # `Progress` shows one bar instead

    def _validation(self, samples: Sequence[Sample], workers: int, failures: Failures) -> Validation:
        return Validation(
            attached=self.attached,
            feeder=self.feeder,
            workers=workers,
            policies=self.policies,
            slots=self.plan.slots_per_layer,
            samples=samples,
            size=self.args.per_device_eval_batch_size,
            failed=FailedSamples(replace(failures, samples=max(1, len(samples)))),
        )

    # -------------------------------------------------------------------------------------------------------- the step

    def training_step(self, model: Any, inputs: Mapping[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-step, forward and backward; returns its part of the loss to log."""
        samples: Sequence[Sample] = inputs["samples"]
        step = self.plan(self.state.global_step, self.state.max_steps)
        self._begin(model, [sample.id for sample in samples])
        with self.gathering.micro_step() if self.gathering else nullcontext():
            # 1. decode and encode the samples, without those that fail
            encoded = self._encode(samples)
            # 2. stream the chunks, evicting after each, ask the questions, and compute the loss: one forward pass
            self.watchdog.doing("in its streams")
            loss = model(streamed=lambda: self._in_one_node(self._stream(encoded, step)))
            # 3. check the loss; hooks check the gradients
            self.nonfinite.check(loss)
            # 4. backward; the mean over accumulated micro-steps
            loss = loss / self.current_gradient_accumulation_steps
            self._backward(loss)
        # 5. count it in the logged loss; the update follows in the Trainer, or in the engine's backward
        return self.nonfinite.loss_to_log(loss.detach(), last=self.accelerator.sync_gradients)

    def _begin(self, model: Any, ids: Sequence[str]) -> None:
        self.watchdog.begin(self.state.global_step + 1, ids)
        self.nonfinite.begin(ids)
        self.metrics.samples += ids
        self._rate = float(cast(Any, self.optimizer).param_groups[0]["lr"])
        model.train()
        optimizer: Any = self.optimizer
        if callable(getattr(optimizer, "train", None)):  # of schedule-free optimizers
            optimizer.train()

    def _announced(self, samples: Sequence[Sample | None]) -> dict[str, list[Sample]]:
        """A batch, which the loader makes while the one before is trained on: its streams are decoded meanwhile."""
        batch = collate(samples)
        self.ahead.expect(batch["samples"])
        return batch

    def _encode(self, samples: Sequence[Sample]) -> list[EncodedSample]:
        encoded = []
        for sample in samples:
            try:
                encoded.append(self.ahead.open(sample) if sample.has_stream else self.feeder.unseen(sample))
                if not sample.has_stream:
                    continue
                self.failed.read(sample.id)
                self.plan.options.check_segments(encoded[-1].segments)
                if self.feeder.options.tracks == "both":
                    self.one_track.record(sample.id, encoded[-1].tracks)
            except (MediaError, DecoderLost) as error:
                self.failed.record(failure_of(sample, error))
        return encoded

    def _stream(self, encoded: Sequence[EncodedSample], step: Step) -> Tensor:
        """Weighted sum of the losses of the samples; 0 without samples."""
        policy = policy_in_training(self.plan.options, self.policies(step.slots))
        losses = [torch.zeros((), device=self.args.device)]
        for batch in batch_by_layout(encoded, len(encoded)):
            torch.manual_seed(seed_of(self.args.seed, self.state.global_step, *(one.sample.id for one in batch)))
            outcome = streamed_loss(
                self.attached,
                self.feeder,
                batch,
                policy,
                softness=step.softness,
                carry=self.backprop,
                losses=self.plan.options.loss.losses,
                model=self.adapted,
                chunk_tokens=step.chunk_tokens,
            )
            self.metrics.add(self.state.global_step, outcome)
            losses.append(outcome.loss * len(batch))
        weight = self.batching.sample_weight(self.state.global_step, self.args.per_device_train_batch_size)
        return torch.stack(losses).sum() * weight

    def _in_one_node(self, loss: Tensor) -> Tensor:
        """The loss with one backward node: ranks whose streams differ then reduce their gradients in the same order."""
        self.watchdog.doing("in backward, the update, or waiting for other ranks")
        if self.gathering is None:
            return whole_gradient(loss, trainable(self.adapted))
        self.gathering.settle()  # all ranks begin backward together
        return whole_gradient(loss, trainable(self.adapted), finish=self.gathering.settle)

    def _backward(self, loss: Tensor) -> None:
        """Backward with the options that the Trainer gives some engines and optimizers."""
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        options: dict[str, Any] = {}
        if self.args.optim in (OptimizerNames.LOMO, OptimizerNames.ADALOMO):
            options["learning_rate"] = self._get_learning_rate()
        if self.is_deepspeed_enabled:
            options["scale_wrt_gas"] = False  # the loss is a mean over micro-steps already
        self.accelerator.backward(loss, **options)

    # ----------------------------------------------------------------------------------------------- start, end, resume

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`. Raises Stopped, after a checkpoint, on a signal or too many non-finite steps."""
        output = None
        with self.watchdog, self.nonfinite, self.shutdown, self.ahead:
            try:
                output = super().train(*args, **kwargs)
            except Finished:
                self.checkpoints.saved = self.state.global_step
            self._stop_if_asked()
        return output

    def _stop_if_asked(self) -> None:
        """Raises Stopped on every rank, with a message on the first.

        Also when training is complete and a signal arrived during its last checkpoint: a long evaluation may follow.
        """
        # 1. agree on whether to stop
        too_many = self.nonfinite.too_many
        if not too_many and not self.shutdown.agreed and not self.shutdown.agree(self.args.device):
            return
        # 2. write a checkpoint, unless the step has one
        self._save_checkpoint(self.model_wrapped, None)
        # 3. end all ranks together: a launcher ends the others when the first one exits
        self.accelerator.wait_for_everyone()
        step = self.state.global_step
        code, reason = 128 + self.shutdown.agreed, f"stopped after step {step}"
        if too_many:
            code, reason = 1, self.nonfinite.verdict()
        cure = f"continue from {self.checkpoints.folder.checkpoint(step)} with --resume auto"
        raise Stopped(f"{reason}; {cure}" if self.is_world_process_zero() else "", code)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        native, portable = self.checkpoints.sources(resume_from_checkpoint)
        with weights_only(), same_buffer_types(self.adapted):
            engine, loader = super()._prepare_for_training(max_steps, train_dataloader, native)
        if portable is not None:
            restore_portable(portable, State.of(self, self.adapted), cast(LRScheduler, self.lr_scheduler))
        elif native is not None:
            self.recipe.restore(self.optimizer, getattr(self.lr_scheduler, "scheduler", self.lr_scheduler))
        if self.is_deepspeed_enabled and engine.zero_optimization_stage() == 0:
            keep_gradient_norm(engine)
        if self.is_deepspeed_enabled and engine.zero_optimization_stage() == 3:
            self.gathering = LayerGathering(engine, self.layers)
        return engine, loader

    # ------------------------------------------------------------------------------- what the Trainer calls, delegated

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As the Trainer's; with `tuning.lora.plus_ratio` B has a learning rate of its own (LoRA+), nothing else."""
        ratio, adapted = self.plan.options.lora.plus_ratio, cast(Any, self.adapted)
        if self.optimizer is None and ratio != 1:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, adapted)
            decay: Any = {"loraplus_weight_decay": self.args.weight_decay}
            self.optimizer = create_loraplus_optimizer(adapted, kind, loraplus_lr_ratio=ratio, **settings, **decay)
            _rate_of_a(self.optimizer, [weight for copy in copies(adapted) for weight in copy.parameters()])
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As the Trainer's; notes what the run sets, before a checkpoint is loaded."""
        schedule = super().create_scheduler(num_training_steps, optimizer)
        self.recipe = Recipe.of(self.optimizer if optimizer is None else optimizer)
        return schedule

    def _get_learning_rate(self) -> float:
        """Of the step that was taken last: DeepSpeed moves its schedule on before the Trainer logs."""
        return super()._get_learning_rate() if self._rate is None else self._rate

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        shuffled = self.args.train_sampling_strategy == "random"
        return EpochSampler(self.mixture, self.batching, seed, lambda: int(self.state.epoch or 0), shuffled=shuffled)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`, with the metrics of the streams; collective."""
        if "loss" in logs:
            logs = {**self.metrics.complete(logs, self), **self._overlap()}
        super().log(logs, *args, **kwargs)

    def _overlap(self) -> dict[str, float]:
        """The drift of selection after this step, where it is due; every rank reads the same stream."""
        lines = (int(line["step"]) for line in reversed(self.state.log_history) if "loss" in line)
        if not self.overlap.due(self.state.global_step, self.state.max_steps, next(lines, 0)):
            return {}
        with self._reading():
            return self.overlap()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Inside, the model reads streams without learning; every step begins in training mode again."""
        self.adapted.eval()
        with self.gathering.micro_step() if self.gathering else nullcontext():
            yield
            if self.gathering:
                self.gathering.settle()

    # ---------------------------------------------------------------------------------------------------- validation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Loss and accuracy of the validation streams, logged with the prefix `eval_`; collective.

        Raises ValidationError when the metric of the best checkpoint has no value.
        """
        if 0 < self.state.global_step == self.metrics.began:  # `eval_on_start` of a resumed run
            return {}
        step = self.state.global_step
        found = self.validation(self.args, partial(self.watchdog.begin, step), self._reading())
        self.watchdog.on_step_end(self.args, self.state, self.control)
        if math.isnan(found[str(self.args.metric_for_best_model)]):
            raise ValidationError(
                f"data.validation: no stream has {self.args.metric_for_best_model}; choose another one"
            )
        metrics = {f"{PREFIX}{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        best = super()._determine_best_metric(metrics=metrics, trial=trial)
        if best and self.state.best_global_step == self.state.global_step:  # 0 with save_strategy: no
            self.control.should_save = True
        return best

    def load_best(self) -> int:
        """Set the weights of the best checkpoint, and return its step; collective. Raises RunError if it is damaged."""
        step = int(self.state.best_global_step or self.state.global_step)
        place = self.checkpoints.folder.checkpoint(step)
        if what := self.checkpoints.folder.defect(place):
            raise RunError(f"{place}: the best checkpoint is damaged: {what}; remove train.load_best_model_at_end")
        tensors = adapter_tensors(place)
        with whole(trainable(self.adapted), changed=True) if self.gathering else nullcontext():
            set_peft_model_state_dict(self.adapted, tensors)
        return step

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: the formula of the Trainer does not apply to streams."""
        return 0

    def _get_output_dir(self, trial: Any) -> str:
        return self.checkpoints.parent

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        stock, state = partial(super()._save_checkpoint, model, trial), partial(State.of, self, self.adapted)
        step, best = self.state.global_step, self.state.best_global_step
        self.metrics.share(self.args)

        def files() -> None:
            stock()
            if best and self.args.should_save:  # the Trainer notes the partial folder
                place = Path(self.checkpoints.parent) / f"checkpoint-{step}" / TRAINER_STATE_NAME
                noted = replace(self.state, best_model_checkpoint=str(self.checkpoints.folder.checkpoint(best)))
                noted.save_to_json(str(place))
            self.state.best_model_checkpoint = None  # else the Trainer removes other checkpoints at its end

        self.checkpoints.save(step, files, state, self.lr_scheduler, best=best)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter; under ZeRO-3 peft would write empty tensors, and the Trainer gather the base model."""
        if self.gathering is None:
            super().save_model(output_dir, _internal_call)
            return
        with whole(trainable(self.adapted)):
            if self.args.should_save:
                self._save(output_dir)

    def save_adapter(self, place: Path, step: int) -> None:
        """Write the adapter, whose weights are those after `step` steps, into a folder of its own; collective."""
        origin = replace(self.checkpoints.origin, step=step)
        with written_by_all(self.checkpoints.folder, place, self.accelerator, origin) as partial_folder:
            self.save_model(str(partial_folder))


def _rate_of_a(optimizer: torch.optim.Optimizer, weights: Sequence[Tensor]) -> None:
    """Move biases and norms of these whole modules from the groups of B, where peft puts every vector.

    They get the learning rate of A, in a group of their own without weight decay.
    """
    own = {id(weight) for weight in weights if weight.ndim == 1}
    if not own:
        return
    vectors = []
    for group in optimizer.param_groups:
        vectors += [weight for weight in group["params"] if id(weight) in own]
        group["params"] = [weight for weight in group["params"] if id(weight) not in own]
    first = optimizer.param_groups[0]
    rest = {name: value for name, value in first.items() if name not in ("params", "weight_decay")}
    optimizer.add_param_group({**rest, "params": vectors, "weight_decay": 0.0})
