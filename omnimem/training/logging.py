"""What is told while a run trains: metrics.jsonl, TensorBoard, one progress bar; and the end of a resumed run."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, final

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from omnimem.run import Start, append_line


@final
class MetricsLines(TrainerCallback):
    """metrics.jsonl: one line a logged step; `beside` is what the next one says besides numbers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.beside: Mapping[str, Any] = {}

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
        append_line(self.path, {**line, **self.beside})


@final
class Progress(TrainerCallback):
    """One bar with loss, budget and temperature; where stderr is no terminal, about ten lines over the whole run."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Closed after an exception too, so that its message begins a line of its own."""
        if self.bar is not None:
            self.bar.close()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A resumed run goes on where it was."""
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="fine-tuning", unit="step", disable=None
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """The bar moves when the loss of its step is known."""
        if self.bar is None or not logs or "loss" not in logs:
            return
        slots, temperature = logs.get("slots"), logs.get("temperature", 0)
        shown = {"loss": f"{logs['loss']:.4g}"}
        if slots is not None:  # none where every sample of the step failed
            shown["slots"] = "full" if slots < 0 else f"{slots:g}"
        if temperature > 0:
            shown["temperature"] = f"{temperature:.3g}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(state.global_step - self.bar.n)
        if self.bar.disable and (state.global_step % max(1, state.max_steps // 10) == 0 or state.global_step == 1):
            words = ", ".join(f"{name} {value}" for name, value in shown.items())
            print(f"step {state.global_step} of {state.max_steps}: {words}", flush=True)


class Finished(Exception):
    """All steps are done."""


@final
class EndOfRun(TrainerCallback):
    """Raises Finished where a resumed run has no step left, its weights loaded: the Trainer would take one more."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Every rank comes here."""
        if state.global_step >= state.max_steps:
            raise Finished


def callbacks_of(start: Start, *, first: bool) -> list[TrainerCallback]:
    """The end of a resumed run and, on the first process, TensorBoard's event files, without what it will do again."""
    found: list[TrainerCallback] = [EndOfRun()]
    if first:
        writer = SummaryWriter(str(start.folder.tensorboard), purge_step=start.step + 1 if start.step else None)
        found.append(TensorBoardCallback(writer))
    return found
