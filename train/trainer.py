"""HF Trainer whose loss streams a sample through the memory; everything else is the Trainer's own."""

import hashlib
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from deepspeed.ops import __compatible_ops__ as compatible_ops
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from omnimem.attach import Seam
from omnimem.data import Failure, Failures, Sample
from omnimem.feeding import Feeder, Opened, together
from omnimem.media import MediaError
from omnimem.run import RunFolder, append_line
from omnimem.tokens import Modality
from omnimem.tuning import FullGradient, Outcome, Plan, Step, StreamedModel, streamed_loss, trainable
from train.assemble import Policies


def in_a_batch(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """The collator: nothing is padded, streams are decoded where the loss is computed."""
    return {"samples": list(samples)}


@final
class StreamTrainer(Trainer):
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
        super().__init__(model=model, data_collator=in_a_batch, **kwargs)
        self.adapted = model
        self.seam, self.feeder, self.policies, self.plan = seam, feeder, policies, plan
        self.failures = failures
        self.carry = FullGradient(offload=plan.options.offload)
        self.model_accepts_loss_kwargs = False  # the Trainer then divides by the accumulation steps, exactly once
        self.outcomes: list[Outcome] = []
        self._micro = 0

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Mean answer loss of the batch, the whole stream inside one forward pass of the engine."""
        step = self.plan(self.state.global_step, self.state.max_steps)
        opened = self._opened(inputs["samples"])
        self._micro += 1
        torch.manual_seed(seed_of(self.args.seed, self.state.global_step, self._micro, self.args.process_index))
        return model(streamed=lambda: self._loss(opened, step))

    def _loss(self, opened: Sequence[Opened], step: Step) -> Tensor:
        if not opened:  # every sample of the batch failed and is counted; the other ranks go on
            return torch.stack([parameter.sum() * 0.0 for parameter in trainable(self.adapted)]).sum()
        policy, losses, asked = self.policies(step.slots), [], 0
        for batch in together(opened, len(opened)):
            outcome = streamed_loss(
                self.seam, self.feeder, batch, policy, temperature=step.temperature, carry=self.carry
            )
            self.outcomes.append(outcome)
            losses.append(outcome.loss * len(batch))
            asked += len(batch)
        return torch.stack(losses).sum() / asked

    def _opened(self, samples: Sequence[Sample]) -> list[Opened]:
        opened = []
        for sample in samples:
            try:
                opened.append(self.feeder.open(sample))
            except MediaError as error:
                self.failures = self.failures.add(Failure(id=sample.id, reason=error.reason, message=str(error)))
        return opened

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's own; the count of micro-steps starts anew with each optimizer step."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self._micro = 0
        return loss

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: the Trainer's formula knows no streams."""
        return 0

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's log with what the streams of the step took."""
        if "loss" in logs and self.outcomes:
            logs = {**logs, **self._taken()}
            self.outcomes = []
        super().log(logs, *args, **kwargs)

    def _taken(self) -> dict[str, float]:
        step = self.plan(self.state.global_step - 1, self.state.max_steps)
        count, layers = len(self.outcomes), self.seam.shape.layers
        taken: dict[str, float] = {
            "slots": float(step.slots if step.slots is not None else -1),
            "temperature": step.temperature or 0.0,
            "entries": max(outcome.usage.kept_entries for outcome in self.outcomes) / layers,
            "bytes": float(max(outcome.usage.bytes for outcome in self.outcomes)),
            "seconds_per_chunk": sum(outcome.seconds_per_chunk for outcome in self.outcomes) / count,
            "failed_samples": float(len(self.failures.found)),
        }
        for kind in Modality:
            name = kind.name.lower()
            taken[f"tokens_in/{name}"] = sum(outcome.usage.tokens_in[kind] for outcome in self.outcomes) / count
            taken[f"kept/{name}"] = sum(outcome.kept[name] for outcome in self.outcomes) / count / layers
        return taken


@final
class MetricsLines(TrainerCallback):
    """metrics.jsonl: one line a logged step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Nested where TensorBoard's names have a slash."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        line: dict[str, Any] = {"step": state.global_step}
        for name, value in logs.items():
            group, _, member = name.partition("/")
            if member:
                line.setdefault(group, {})[member] = value
            else:
                line[name] = value
        append_line(self.path, line)


def seed_of(*numbers: int) -> int:
    """A seed as a function of numbers: dropout depends on (seed, step, micro-step, rank), never on what came before."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "big") % (1 << 63)


def training_arguments(section: Mapping[str, Any], folder: RunFolder) -> TrainingArguments:
    """transformers' arguments of a run; a host without a GPU trains on the CPU."""
    defaults: dict[str, Any] = {"logging_steps": 1, "save_strategy": "steps", "save_steps": 100}
    given = {name: value for name, value in section.items() if value is not None}
    return TrainingArguments(
        **{**defaults, **given},
        output_dir=str(folder.path),
        remove_unused_columns=False,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )


def callbacks_of(folder: RunFolder, *, first: bool) -> list[TrainerCallback]:
    """metrics.jsonl and, on the first process, TensorBoard's event files."""
    tensorboard = [TensorBoardCallback(SummaryWriter(str(folder.tensorboard)))] if first else []
    return [MetricsLines(folder.metrics), *tensorboard]


def prepare_process() -> None:
    """Environment of plain `python` (one rank, a free port), and of a host without a GPU.

    On the CPU DeepSpeed would compile a shared-memory op for minutes, and a run killed meanwhile leaves a lock that
    every later one waits for; gloo does without it.
    """
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    if "RANK" not in os.environ:
        os.environ.update(alone, MASTER_PORT=str(_free_port()))
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        compatible_ops["deepspeed_shm_comm"] = False
        # Models that fit a CPU run are small: two threads were measured 10 times slower than one on a busy machine.
        torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
