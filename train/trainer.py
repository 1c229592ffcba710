"""HF Trainer whose loss streams a sample through the memory; everything else is the Trainer's own."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any, final

import torch
from accelerate.utils import gather_object
from pydantic import ValidationError
from torch import Tensor
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from omnimem.attach import Seam
from omnimem.config import ConfigError
from omnimem.data import Failure, Failures, Sample
from omnimem.feeding import Feeder, Opened, together
from omnimem.media import MediaError
from omnimem.run import RunFolder
from omnimem.tokens import Modality
from omnimem.tuning import (
    Outcome,
    Pass,
    Plan,
    Step,
    StreamedModel,
    gradient_of,
    policy_in_training,
    running_means,
    streamed_loss,
    tally,
)
from train.arguments import own_names
from train.assemble import Policies
from train.dealt import DealtTrainer
from train.order import seed_of


@final
class StreamTrainer(DealtTrainer):
    """Streams each batch at the budget and temperature of its step; one backward a micro-step."""

    def __init__(
        self,
        *,
        model: StreamedModel,
        seam: Seam,
        feeder: Feeder,
        policies: Policies,
        plan: Plan,
        failures: Failures,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, **kwargs)
        self.seam, self.feeder, self.policies, self.plan = seam, feeder, policies, plan
        self.failures = failures
        self.carry = gradient_of(plan.options, seam.shape.layers)
        self.model_accepts_loss_kwargs = False  # the Trainer then divides by the accumulation steps, exactly once
        self.outcomes: list[tuple[int, Outcome]] = []  # with the number of their step, until the next log
        for chatty in (PrinterCallback, ProgressCallback):
            self.remove_callback(chatty)  # they print every log as a dict; `Progress` has one bar

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """This rank's part of the mean loss of the step, the whole stream inside one forward pass of the engine."""
        step = self.plan(self.state.global_step, self.state.max_steps)
        opened = self._opened(inputs["samples"])
        self.watch.doing("in its streams")
        loss = model(streamed=lambda: self.delivered(self._loss(opened, step)))
        return self.bad_steps.judged(loss)

    def _loss(self, opened: Sequence[Opened], step: Step) -> Tensor:
        """Each sample weighs the same however the step is dealt out; one that failed weighs nothing."""
        policy = policy_in_training(self.plan.options, self.policies(step.slots))
        losses = [torch.zeros((), device=self.args.device)]
        for batch in together(opened, len(opened)):
            torch.manual_seed(seed_of(self.args.seed, self.state.global_step, *(one.sample.id for one in batch)))
            outcome = streamed_loss(
                self.seam,
                self.feeder,
                batch,
                policy,
                softness=step.softness,
                carry=self.carry,
                losses=self.plan.options.loss.losses,
                model=self.adapted,
                chunk_tokens=step.chunk_tokens,
            )
            self.outcomes.append((self.state.global_step, replace(outcome, loss=outcome.loss.detach())))
            losses.append(outcome.loss * len(batch))
        return torch.stack(losses).sum() * self.share

    def _opened(self, samples: Sequence[Sample]) -> list[Opened]:
        opened = []
        for sample in samples:
            try:
                opened.append(self.feeder.open(sample))
                self.plan.options.check_segments(opened[-1].segments)
            except MediaError as error:
                self._note(Failure(id=sample.id, reason=error.reason, message=str(error)))
        return opened

    def _note(self, failure: Failure) -> None:
        """Noted before it is judged: the one that stops the run stands in run.json too."""
        before = self.failures
        if all(known.id != failure.id for known in before.found):
            self.failures = replace(before, found=(*before.found, failure))
            before.add(failure)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: the Trainer's formula knows no streams."""
        return 0

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's log with what the streams of the step took; every rank comes here."""
        if "loss" in logs:
            self._share_failures()
            passes = self._passes()
            logs = {**logs, **tally(passes), **running_means(passes, self.state.log_history)}
            if self.outcomes:
                logs |= self._taken()
                self.outcomes = []
        super().log(logs, *args, **kwargs)

    def _share_failures(self) -> None:
        """Every rank learns which samples failed on the others; rank 0 judges their share of the whole data set."""
        if self.args.world_size == 1:
            return
        known = {failure.id: failure for failure in gather_object(list(self.failures.found))}
        if self.is_world_process_zero():
            for failure in known.values():
                self._note(failure)
        else:
            self.failures = replace(self.failures, found=tuple(known.values()))

    def _passes(self) -> list[Pass]:
        """The losses since the last log, of all ranks, without steps that were left out."""
        left_out = {bad.step - 1 for bad in self.bad_steps.found}
        taken = [(step, outcome) for step, outcome in self.outcomes if step not in left_out]
        mine = [Pass.of(outcome, step=step, budget=self.plan.budget(step)) for step, outcome in taken]
        return mine if self.args.world_size == 1 else gather_object(mine)

    def _taken(self) -> dict[str, float]:
        step = self.plan(self.state.global_step - 1, self.state.max_steps)
        outcomes = [outcome for _, outcome in self.outcomes]
        count, layers = len(outcomes), self.seam.shape.layers
        taken: dict[str, float] = {
            "slots": float(step.slots if step.slots is not None else -1),
            "chunk_tokens": float(step.chunk_tokens),
            "temperature": step.softness.temperature if step.softness else 0.0,
            "entries": max(outcome.usage.kept_entries for outcome in outcomes) / layers,
            "bytes": float(max(outcome.usage.bytes for outcome in outcomes)),
            "seconds_per_chunk": sum(outcome.seconds_per_chunk for outcome in outcomes) / count,
            "failed_samples": float(len(self.failures.found)),
        }
        for kind in Modality:
            name = kind.name.lower()
            taken[f"tokens_in/{name}"] = sum(outcome.usage.tokens_in[kind] for outcome in outcomes) / count
            taken[f"kept/{name}"] = sum(outcome.kept[name] for outcome in outcomes) / count / layers
        return taken


def training_arguments(section: Mapping[str, Any], folder: RunFolder) -> TrainingArguments:
    """transformers' arguments of a run; a host without a GPU trains on the CPU.

    Raises ConfigError when transformers refuses them.
    """
    defaults: dict[str, Any] = {"logging_steps": 1, "save_strategy": "steps", "save_steps": 100}
    defaults["ddp_find_unused_parameters"] = False  # every adapter is used in every step
    given = {name: value for name, value in section.items() if value is not None and name not in own_names()}
    try:
        if "report_to" in given:
            raise ValueError("report_to: TensorBoard's event files and metrics.jsonl are always written")
        arguments = TrainingArguments(
            **{**defaults, **given},
            output_dir=str(folder.path),
            remove_unused_columns=False,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        )
        _try_recipe(arguments)
        _try_engine(arguments)
    except (ValueError, TypeError, ImportError) as error:  # do not go together, or cannot be had on this machine
        raise ConfigError([f"train: {' '.join(str(error).split())}; change it in the config"]) from error
    return arguments


def _try_recipe(arguments: TrainingArguments) -> None:
    """Optimizer and schedule once in the small: their own options are looked at only when they are built."""
    Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    options: Any = arguments.lr_scheduler_kwargs
    get_scheduler(arguments.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=options)


def _try_engine(arguments: TrainingArguments) -> None:
    """What DeepSpeed says of its settings, and of half precision, only when the engine is built."""
    if arguments.fp16 and not torch.cuda.is_available():
        raise ValueError("fp16 needs a GPU; bf16 does not")
    if not arguments.deepspeed:
        return
    settings = arguments.hf_deepspeed_config
    if settings.mismatches:
        each = ", ".join(mismatch.removeprefix("- ") for mismatch in settings.mismatches)
        raise ValueError(f'{arguments.deepspeed}: {each} ("auto" there takes ours)')
    given = settings.config.get("zero_optimization", {})
    known = {name: value for name, value in given.items() if value != "auto"}
    theirs = import_module("deepspeed.runtime.zero.config")  # only now: `prepare_process` says for which device
    try:
        theirs.DeepSpeedZeroConfig(**known)
    except ValidationError as error:
        each = (f"zero_optimization.{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise ValueError(f"{arguments.deepspeed}: {', '.join(each)}") from error
