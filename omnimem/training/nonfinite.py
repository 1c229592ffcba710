"""Steps whose loss or gradient is not finite are skipped: no rank changes its weights or its optimizer state."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, final

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from omnimem.errors import counted
from omnimem.training.collectives import gather_lists, highest
from omnimem.tuning import trainable


@final
@dataclass(frozen=True, kw_only=True)
class NonFiniteStep:
    """A skipped step, and the samples whose loss or gradient was not finite."""

    step: int
    samples: tuple[str, ...]


@final
@dataclass(kw_only=True)
class _MicroStep:
    """One micro-step on this rank."""

    samples: Sequence[str]
    nonfinite: Tensor  # bool: whether its loss or a gradient was not finite


@final
@dataclass
class NonFiniteGuard(TrainerCallback):
    """Checks the loss and each gradient of a step, and skips the update when one of them is not finite.

    Independent of the engine: hooks check the gradients as autograd produces them, before they are reduced over the
    ranks, and replace non-finite values by 0, so that the engine sees finite numbers. Before the update all gradients
    are set to None, so the optimizer changes neither weights nor state. The step still counts, and so does its
    learning rate.
    """

    limit: int  # non-finite steps in a row that end the run
    found: list[NonFiniteStep] = field(default_factory=list)
    in_a_row: int = 0

    def __enter__(self) -> "NonFiniteGuard":
        self._hooks: list[Any] = []
        self._micro_steps: list[_MicroStep] = []
        self._verdict: bool | None = None
        self._logged = 0.0
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def too_many(self) -> bool:
        """Whether `limit` steps in a row were not finite."""
        return self.in_a_row >= self.limit

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Registers the hooks, after the engine has been built."""
        self._device = args.device
        self._hooks.append(register_optimizer_step_pre_hook(self._before_update))
        if not args.fp16:  # in fp16 the engine checks for infinities itself, to lower its loss scale
            self._hooks += [parameter.register_hook(self._check_gradient) for parameter in trainable(model)]

    def begin(self, samples: Sequence[str]) -> None:
        """Start a micro-step with these sample ids."""
        nonfinite = torch.zeros((), dtype=torch.bool, device=self._device)
        self._micro_steps.append(_MicroStep(samples=samples, nonfinite=nonfinite))

    def check(self, loss: Tensor) -> None:
        """Record whether the loss of the micro-step is finite."""
        self._micro_steps[-1].nonfinite |= ~torch.isfinite(loss.detach()).all()

    def loss_to_log(self, loss: Tensor, *, last: bool) -> Tensor:
        """The loss that the micro-step adds to the logged sum; the sum over a skipped step is 0.

        `last`: the micro-step is the last of its step.
        """
        finite = torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0)
        if last and self._any_nonfinite():
            finite, self._logged = -torch.full_like(loss, self._logged), 0.0
        else:
            self._logged = 0.0 if last else self._logged + float(finite)
        return finite

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Records a skipped step and its samples on every rank; collective."""
        # 1. agree on whether the step was finite
        skipped, micro_steps = self._any_nonfinite(), self._micro_steps
        self._micro_steps, self._verdict = [], None
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if not skipped:
            return
        # 2. record the samples of all ranks
        mine = [sample for each in micro_steps if bool(each.nonfinite) for sample in each.samples]
        samples = gather_lists(mine, args.world_size)
        self.found.append(NonFiniteStep(step=state.global_step, samples=tuple(samples)))
        # 3. report it, and end the run after too many
        control.should_log = True
        if state.is_world_process_zero:
            print(f"step {state.global_step}: skipped, not finite: {', '.join(samples)}", flush=True)
        if self.too_many:
            control.should_save = control.should_training_stop = True

    def verdict(self) -> str:
        """Why the run ends, with the samples of the last steps and a cure."""
        steps = self.found[-self.in_a_row :]
        names = ", ".join(dict.fromkeys(name for each in steps for name in each.samples))
        return (
            f"{counted(self.in_a_row, 'step')} in a row, the last of them {steps[-1].step}, not finite, with {names}; "
            "nothing was learned from them; lower train.learning_rate or check these samples"
        )

    def since(self, step: int) -> list[NonFiniteStep]:
        """The skipped steps after this one."""
        return [each for each in self.found if each.step > step]

    def _check_gradient(self, gradient: Tensor) -> Tensor:
        if self._micro_steps:
            self._micro_steps[-1].nonfinite |= ~torch.isfinite(gradient).all()
        return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)

    def _before_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._any_nonfinite():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def _any_nonfinite(self) -> bool:
        """Whether the step is not finite on any rank; collective once per step, after its last backward pass."""
        if self._verdict is None:
            mine = any(bool(each.nonfinite) for each in self._micro_steps)
            self._verdict = highest(int(mine), self._device) > 0
        return self._verdict


def mean_without(skipped: int, steps: int, mean: float) -> float:
    """The mean loss of the other steps, from a mean over `steps` in which the skipped ones count as 0."""
    return mean * steps / (steps - skipped) if steps > skipped else math.nan
