"""HF Trainer whose loss streams a sample through the memory; everything else is the Trainer's own."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from omnimem.config.exported import Policies
from omnimem.data import Failure, Failures, Sample
from omnimem.media import MediaError
from omnimem.streaming.attach import StreamedAttention
from omnimem.streaming.feeder import EncodedSample, Feeder, batch_by_layout
from omnimem.tokens import Modality
from omnimem.training.dealt import DealtTrainer
from omnimem.training.sampler import seed_of
from omnimem.tuning import (
    Outcome,
    Pass,
    Plan,
    Step,
    StreamedModel,
    gradient_of,
    policy_in_training,
    running_means,
    step_metrics,
    streamed_loss,
)


@final
class StreamTrainer(DealtTrainer):
    """Streams each batch at the budget and temperature of its step; one backward a micro-step."""

    def __init__(
        self,
        *,
        model: StreamedModel,
        attached: StreamedAttention,
        feeder: Feeder,
        policies: Policies,
        plan: Plan,
        failures: Failures,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, **kwargs)
        self.attached, self.feeder, self.policies, self.plan = attached, feeder, policies, plan
        self.failures = failures
        self.carry = gradient_of(plan.options, attached.shape.layers)
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

    def _loss(self, opened: Sequence[EncodedSample], step: Step) -> Tensor:
        """Each sample weighs the same however the step is dealt out; one that failed weighs nothing."""
        policy = policy_in_training(self.plan.options, self.policies(step.slots))
        losses = [torch.zeros((), device=self.args.device)]
        for batch in batch_by_layout(opened, len(opened)):
            torch.manual_seed(seed_of(self.args.seed, self.state.global_step, *(one.sample.id for one in batch)))
            outcome = streamed_loss(
                self.attached,
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

    def _opened(self, samples: Sequence[Sample]) -> list[EncodedSample]:
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
            logs = {**logs, **step_metrics(passes), **running_means(passes, self.state.log_history)}
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
        count, layers = len(outcomes), self.attached.shape.layers
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
