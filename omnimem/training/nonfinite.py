"""Steps whose loss or gradient is not finite: weights and optimizer stay as they were, on every rank alike."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, final

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from omnimem.training.collectives import highest
from omnimem.tuning import trainable


@final
@dataclass(frozen=True, kw_only=True)
class NonFiniteStep:
    """A step that was left out, and the samples that spoiled it."""

    step: int
    samples: tuple[str, ...]


@final
@dataclass(kw_only=True)
class _Pass:
    """One micro-step on this rank."""

    samples: Sequence[str]
    bad: Tensor  # whether a number of it was not finite


@final
@dataclass
class NonFiniteGuard(TrainerCallback):
    """Looks at the loss and at each gradient of a step, and keeps the optimizer from taking one that is not finite.

    The same for every engine: gradients are looked at where autograd delivers them, before ranks share them, and what
    is not finite is set to 0, so that no engine makes something of it. The optimizer then finds no gradient at all,
    and changes neither a weight nor a state. The number of the step and its learning rate go on.
    """

    limit: int  # of such steps in a row
    found: list[NonFiniteStep] = field(default_factory=list)
    in_a_row: int = 0

    def __enter__(self) -> "NonFiniteGuard":
        self._hooks: list[Any] = []
        self._passes: list[_Pass] = []
        self._verdict: bool | None = None
        self._finite = 0.0
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def too_many(self) -> bool:
        """Whether as many in a row were found as the run may have."""
        return self.in_a_row >= self.limit

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Now that the engine stands; before, it may change what gradients look like."""
        self._device = args.device
        self._hooks.append(register_optimizer_step_pre_hook(self._before_update))
        if not args.fp16:  # there the engine looks for infinities itself and lowers its scale
            self._hooks += [parameter.register_hook(self._delivered) for parameter in trainable(model)]

    def begin(self, samples: Sequence[str]) -> None:
        """A micro-step begins."""
        self._passes.append(_Pass(samples=samples, bad=torch.zeros((), dtype=torch.bool, device=self._device)))

    def judged(self, loss: Tensor) -> Tensor:
        """The loss of the micro-step, looked at."""
        self._passes[-1].bad |= ~torch.isfinite(loss.detach()).all()
        return loss

    def counted(self, loss: Tensor, *, last: bool) -> Tensor:
        """What the micro-step adds to the loss that is logged: over a bad step 0 in sum."""
        finite = torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0)
        if last and self._bad():
            finite, self._finite = -torch.full_like(loss, self._finite), 0.0
        else:
            self._finite = 0.0 if last else self._finite + float(finite)
        return finite

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Every rank comes here and learns which samples they were."""
        bad, passes = self._bad(), self._passes
        self._passes, self._verdict = [], None
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if not bad:
            return
        mine = [sample for each in passes if bool(each.bad) for sample in each.samples]
        samples = mine if args.world_size == 1 else gather_object(mine)
        self.found.append(NonFiniteStep(step=state.global_step, samples=tuple(samples)))
        control.should_log = True
        if state.is_world_process_zero:
            print(f"step {state.global_step}: left out, not finite: {', '.join(samples)}", flush=True)
        if self.too_many:
            control.should_save = control.should_training_stop = True

    def since(self, step: int) -> list[NonFiniteStep]:
        """Those after a step."""
        return [each for each in self.found if each.step > step]

    def _delivered(self, gradient: Tensor) -> Tensor:
        if self._passes:
            self._passes[-1].bad |= ~torch.isfinite(gradient).all()
        return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)

    def _before_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._bad():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def _bad(self) -> bool:
        """Whether the step is bad on any rank; asked once a step, after its last backward pass."""
        if self._verdict is None:
            mine = any(bool(each.bad) for each in self._passes)
            self._verdict = highest(int(mine), self._device) > 0
        return self._verdict


def without(bad: int, steps: int, mean: float) -> float:
    """The mean loss of the steps that were taken, from the mean in which the bad ones counted 0."""
    return mean * steps / (steps - bad) if steps > bad else math.nan
