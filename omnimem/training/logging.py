"""Logging of a training run: metrics.jsonl, TensorBoard, one progress bar; and the end of a run without steps left."""

import math
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any, final

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ExportableState

from omnimem.data import Failure
from omnimem.run import Start, append_line
from omnimem.streaming.encoder_cache import COUNTED
from omnimem.streaming.feeder import Feeder
from omnimem.streaming.trained_range import TrainedRange
from omnimem.tokens import Modality
from omnimem.training.collectives import gather_lists, highest
from omnimem.training.failures import FailedSamples, OneTrackSamples
from omnimem.training.nonfinite import NonFiniteGuard, NonFiniteStep, mean_without
from omnimem.tuning import Outcome, Pass, Plan, running_means, step_losses, step_metrics


@final
@dataclass
class StepMetrics(TrainerCallback, ExportableState):
    """Collects the streams of the steps since the last log, and writes one line of metrics.jsonl per logged step.

    What is counted over the whole run is in the checkpoints, so that a resumed run counts on.
    """

    path: Path
    plan: Plan
    layers: int  # decoder layers
    nonfinite: NonFiniteGuard
    failed: FailedSamples
    one_track: OneTrackSamples
    trained: TrainedRange
    feeder: Feeder
    outcomes: list[tuple[int, Outcome]] = field(default_factory=list)  # with their step, until the next log
    samples: list[str] = field(default_factory=list)  # ids on this rank, until the next log
    began: int = 0  # the step that the run began at
    logged: int = 0  # the last logged step, or the one that the run began at
    names: Mapping[str, Any] = field(default_factory=dict)  # sample ids of the next line
    started: tuple[float, float] | None = None  # of the step that is under way: the clock, and the feeder's decoding
    busy: float = 0.0  # seconds in steps, until the next log
    decoded: float = 0.0  # those of them spent in decoding
    # counts of the encoder cache over the whole run: up to the checkpoint, and at the last exchange of the ranks
    earlier_cache: Mapping[str, int] = field(default_factory=dict)
    cached: Mapping[str, int] = field(default_factory=dict)

    def add(self, step: int, outcome: Outcome) -> None:
        """Record the streams of a batch."""
        self.outcomes.append((step, replace(outcome, loss=outcome.loss.detach())))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Count from the step and the samples of the checkpoint."""
        self.began = self.logged = state.global_step
        stored: Any = state.stateful_callbacks
        before: Mapping[str, Any] = stored.get(type(self).__name__, {}).get("attributes", {})
        self.failed.restore([Failure(**each) for each in before.get("failed", ())], before.get("read_later", ()))
        self.one_track.restore(before.get("one_track", {}))
        self.earlier_cache = {**before.get("encoder_cache", {})}
        self.trained.note(int(before.get("positions_reached", 0)))
        skipped = [(each["step"], tuple(each["samples"])) for each in before.get("skipped", ())]
        self.nonfinite.found[:0] = [NonFiniteStep(step=step, samples=samples) for step, samples in skipped]

    def share(self, args: TrainingArguments) -> None:
        """Exchange what is counted over the whole run between the ranks; collective."""
        self.failed.share(args)
        self.one_track.share(args)
        self.trained.note(highest(self.trained.reached, args.device))
        if self.feeder.cache is not None:
            self.cached = self._summed(gather_lists([self.feeder.cache.counts], args.world_size))

    def state(self) -> dict[str, Any]:
        """What is counted over the whole run, for the checkpoint."""
        failed = [asdict(failure) for failure in self.failed.found]
        counted = {
            "failed": failed,
            "read_later": self.failed.read_later,
            "encoder_cache": {**(self.cached or self.earlier_cache)},
            "one_track": self.one_track.found,
            "positions_reached": self.trained.reached,
            "skipped": [asdict(step) for step in self.nonfinite.found],
        }
        return {"args": {}, "attributes": counted}

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock: validation, logging and saving between two steps are not counted."""
        self.started = time.perf_counter(), self.feeder.decoding_seconds

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop the clock."""
        if self.started is not None:
            clock, decoding = self.started
            self.busy += time.perf_counter() - clock
            self.decoded += self.feeder.decoding_seconds - decoding
            self.started = None

    def complete(self, logs: Mapping[str, float], trainer: Trainer) -> dict[str, float]:
        """The logs of the Trainer with the metrics of the streams; collective."""
        state, ranks = trainer.state, trainer.args.world_size
        # 1. losses by name and by budget, of all ranks
        self.share(trainer.args)
        every, samples = gather_lists(self._passes(), ranks), gather_lists(self.samples, ranks)
        skipped = self.nonfinite.since(self.logged)
        passes = [each for each in every if each.step + 1 not in {step.step for step in skipped}]
        complete = {**logs, **step_metrics(passes), **running_means(passes, state.log_history)}
        # 2. memory, tokens and time of the streams of this rank
        if self.outcomes:
            complete |= self._usage(state.global_step - 1, state.max_steps)
        complete |= self._speed(trainer.args) | {f"cache/{name}": float(number) for name, number in self.cached.items()}
        # 3. loss and gradient norm without skipped steps; loss without the samples that could not be read
        if sum(each.streams for each in every) < len(samples):
            losses = [loss for _, loss in step_losses(passes)]
            complete["loss"] = fmean(losses) if losses else math.nan
        elif skipped:
            steps = state.global_step - self.logged
            complete["loss"] = mean_without(len(skipped), steps, complete["loss"])
        if skipped and skipped[-1].step == state.global_step and "grad_norm" in complete:
            complete["grad_norm"] = math.nan
        # 4. sample ids of all ranks
        left_out = [name for each in skipped for name in each.samples]
        self.names = {"samples": samples, "left_out": left_out}
        self.outcomes, self.samples, self.logged = [], [], state.global_step
        self.busy = self.decoded = 0.0
        return complete

    def _speed(self, args: TrainingArguments) -> dict[str, float]:
        """Tokens and samples per second of all ranks, the share of their time in decoding, and peak bytes of a rank."""
        tokens = sum(sum(outcome.usage.tokens_in) * outcome.streams for _, outcome in self.outcomes)
        streams = sum(outcome.streams for _, outcome in self.outcomes)
        mine = (float(tokens), float(streams), self.busy, self.decoded)
        every = list(zip(*gather_lists([mine], args.world_size), strict=True))
        seconds = max(*every[2], 1e-9)  # ranks wait for the slowest one
        speed = {
            "speed/tokens_per_second": sum(every[0]) / seconds,
            "speed/samples_per_second": sum(every[1]) / seconds,
            "speed/decoding": sum(every[3]) / max(sum(every[2]), 1e-9),
            "memory/host_bytes": float(highest(peak_bytes(), args.device)),
        }
        if args.device.type == "cuda":
            speed["memory/device_bytes"] = float(highest(torch.cuda.max_memory_allocated(args.device), args.device))
        return speed

    def cache_counts(self, ranks: int) -> Mapping[str, int]:
        """Reads and writes of the encoder cache over the whole run; of several ranks, up to the last exchange."""
        if self.feeder.cache is None or ranks > 1:
            return self.cached
        return self._summed([self.feeder.cache.counts])

    def _summed(self, every: Sequence[Mapping[str, int]]) -> dict[str, int]:
        """The counts of processes, and those up to the checkpoint."""
        return {name: sum(counts.get(name, 0) for counts in (self.earlier_cache, *every)) for name in COUNTED}

    def _passes(self) -> list[Pass]:
        """Losses of the batches of this rank since the last log."""
        return [Pass.of(outcome, step=step, budget=self.plan.budget(step)) for step, outcome in self.outcomes]

    def _usage(self, number: int, steps: int) -> dict[str, float]:
        step = self.plan(number, steps)
        outcomes = [outcome for _, outcome in self.outcomes]
        count = len(outcomes)
        usage: dict[str, float] = {
            "slots": float(step.slots if step.slots is not None else -1),
            "chunk_tokens": float(step.chunk_tokens),
            "temperature": step.softness.temperature if step.softness else 0.0,
            "entries": max(outcome.usage.kept_entries for outcome in outcomes) / self.layers,
            "bytes": float(max(outcome.usage.bytes for outcome in outcomes)),
            **self._selector(outcomes),
            "seconds_per_chunk": sum(outcome.seconds_per_chunk for outcome in outcomes) / count,
            "failed_samples": float(len(self.failed.found)),
            "one_track_samples": float(len(self.one_track.found)),
        }
        for kind in Modality:
            name = kind.name.lower()
            usage[f"tokens_in/{name}"] = sum(outcome.usage.tokens_in[kind] for outcome in outcomes) / count
            usage[f"kept/{name}"] = sum(outcome.kept[name] for outcome in outcomes) / count / self.layers
        return usage

    def _selector(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Of the memory that chooses the tokens, where there is one; `bytes` contains these bytes."""
        size = max(outcome.usage.selector_bytes for outcome in outcomes)
        entries = max(outcome.usage.selector_entries for outcome in outcomes) / self.layers
        return {"selector/entries": entries, "selector/bytes": float(size)} if size else {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append the line; GROUP/NAME is nested as {GROUP: {NAME: ...}}, eval_NAME as {validation: {NAME: ...}}."""
        if not state.is_world_process_zero or not logs:
            return
        validation = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
        if validation:
            append_line(self.path, {"step": state.global_step, "validation": validation})
        if "loss" not in logs:
            return
        line: dict[str, Any] = {"step": state.global_step}
        for name, value in logs.items():
            group, _, member = name.partition("/")
            if member:
                line.setdefault(group, {})[member] = value
            else:
                line[name] = value
        append_line(self.path, {**line, **self.names})


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def has_bar() -> bool:
    """Whether stderr is a terminal with a width; some, such as those of a container, have none."""
    try:
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):
        return False


@final
class Progress(TrainerCallback):
    """A progress bar with loss, its running mean at this budget, budget, temperature, learning rate, and time left.

    Without a terminal, or in one without width, about ten lines over the whole run.
    """

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close the bar after an exception too, so that the error message starts on a new line."""
        if self.bar is not None:
            self.bar.close()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the bar at the step of the checkpoint."""
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="fine-tuning", unit="step", disable=not has_bar()
            )
            self._began, self._first = time.monotonic(), state.global_step

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **_: Any
    ) -> None:
        """A line for each validation."""
        if self.bar is not None:
            self.bar.write(f"step {state.global_step}: {described(metrics)}")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Move the bar to the logged step."""
        if self.bar is None or not logs or "loss" not in logs:
            return
        slots, temperature = logs.get("slots"), logs.get("temperature", 0)
        shown = {"loss": f"{logs['loss']:.4g}"}
        means = [value for name, value in logs.items() if name.startswith("loss_at/")]
        if means:
            shown["mean"] = f"{means[-1]:.4g}"
        if slots is not None:  # missing when every sample of the step failed
            shown["slots"] = "full" if slots < 0 else f"{slots:g}"
        if temperature > 0:
            shown["temperature"] = f"{temperature:.3g}"
        if "learning_rate" in logs:
            shown["rate"] = f"{logs['learning_rate']:.3g}"
        if failed := logs.get("failed_samples"):
            shown["unreadable"] = f"{failed:g}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(state.global_step - self.bar.n)
        if self.bar.disable and (state.global_step % max(1, state.max_steps // 10) == 0 or state.global_step == 1):
            words = ", ".join(f"{name} {value}" for name, value in shown.items())
            each = (time.monotonic() - self._began) / max(1, state.global_step - self._first)
            words += f", {tqdm.format_interval(each * (state.max_steps - state.global_step))} left"
            print(f"step {state.global_step} of {state.max_steps}: {words}", flush=True)


def described(metrics: Mapping[str, float]) -> str:
    """The metrics of a validation in words."""
    at, full = (f"{metrics[f'eval_{of}loss']:.4g}, {metrics[f'eval_{of}accuracy']:.1%}" for of in ("", "full_"))
    return f"validation loss and accuracy {at}; with full memory {full}"


class Finished(Exception):
    """The run has no steps left."""


@final
class EndOfRun(TrainerCallback):
    """Raises Finished, once the weights are loaded, when no steps are left: the Trainer would take one more.

    A resumed run saves and logs at the steps of its own settings: the Trainer would keep those of the checkpoint.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called on every rank."""
        state.compute_steps(args, state.max_steps)
        state.best_model_checkpoint = None  # of the checkpoint's file; the Trainer would remove all others at its end
        if state.global_step >= state.max_steps:
            raise Finished


def callbacks_of(start: Start, *, first: bool) -> list[TrainerCallback]:
    """`EndOfRun` and, on the first process, TensorBoard event files, purged of the steps that a resumed run repeats."""
    found: list[TrainerCallback] = [EndOfRun()]
    if first:
        writer = SummaryWriter(str(start.folder.tensorboard), purge_step=start.step + 1 if start.step else None)
        found.append(TensorBoardCallback(writer))
    return found
