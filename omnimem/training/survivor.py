"""HF Trainer that survives: whole checkpoints, steps that are not finite left out, an end on request."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor
from transformers import Trainer

from omnimem.data import Sample
from omnimem.run import RunFolder
from omnimem.training.checkpoints import rotate, written_by_all
from omnimem.training.logging import Finished, MetricsLines
from omnimem.training.nonfinite import NonFiniteGuard, without
from omnimem.training.shutdown import ShutdownSignal, Stopped


class SurvivingTrainer(Trainer):
    """What `StreamTrainer` gets besides its loss; the batch is `{"samples": [...]}`."""

    def __init__(self, *, folder: RunFolder, max_bad_steps: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.folder = folder
        self.bad_steps, self.interruption = NonFiniteGuard(max_bad_steps), ShutdownSignal()
        self.metrics = MetricsLines(folder.metrics)
        for callback in (self.bad_steps, self.interruption, self.metrics):
            self.add_callback(callback)
        self._taken_samples: list[str] = []  # on this rank, since the last log
        self._logged = 0  # the last step that was logged
        self._saved: int | None = None  # the last step that was saved
        self._output = str(folder.path)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's. Raises Stopped after a checkpoint when the run was asked to end, or must not go on."""
        output = None
        with self.bad_steps, self.interruption:
            try:
                output = super().train(*args, **kwargs)
            except Finished:
                self._saved = self.state.global_step
            self._require_end()
        return output

    def training_step(self, model: Any, inputs: Mapping[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward, backward and, in some engines, the update; what is returned is only logged."""
        samples: Sequence[Sample] = inputs["samples"]
        ids = [sample.id for sample in samples]
        self._taken_samples += ids
        self.bad_steps.begin(ids)
        loss = super().training_step(model, dict(inputs), num_items_in_batch)
        return self.bad_steps.counted(loss, last=self.accelerator.sync_gradients)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's, the loss over the steps that were taken; every rank comes here."""
        if "loss" in logs:
            step, bad = self.state.global_step, self.bad_steps.since(self._logged)
            if bad:
                since = step - max(self._logged, self._initial_global_step)
                logs["loss"] = without(len(bad), since, logs["loss"])
            if bad and bad[-1].step == step and "grad_norm" in logs:
                logs["grad_norm"] = math.nan
            mine, self._taken_samples, self._logged = self._taken_samples, [], step
            samples = mine if self.args.world_size == 1 else gather_object(mine)
            self.metrics.beside = {"samples": samples, "left_out": [name for each in bad for name in each.samples]}
        super().log(logs, *args, **kwargs)

    def save_whole(self, place: Path) -> None:
        """The adapter as it is, in a folder of its own."""
        with written_by_all(self.folder, place, self.accelerator) as partial:
            self.save_model(str(partial))

    def also_save(self, folder: Path) -> None:
        """What else goes into a checkpoint; every rank comes here, and all that it writes is sealed with the rest."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer's, but written aside and sealed. Asked for twice after one step (its end, and the epoch's)."""
        step = self.state.global_step
        if step == self._saved:
            return
        with written_by_all(self.folder, self.folder.checkpoint(step), self.accelerator) as partial:
            self._output = str(partial.parent)
            super()._save_checkpoint(model, trial)
            self.also_save(partial)
        self._output, self._saved = str(self.folder.path), step
        if self.is_world_process_zero():
            rotate(self.folder, self.args.save_total_limit)

    def _get_output_dir(self, trial: Any) -> str:
        return self._output

    def _require_end(self) -> None:
        """Raises Stopped on every rank, with words on the first, where training did not come to its end.

        Or where it did and a signal came meanwhile, as its last checkpoint was written: hours of evaluation may follow.
        """
        step, interruption, bad = self.state.global_step, self.interruption, self.bad_steps
        onwards = f"go on from {self.folder.checkpoint(step)} with --resume auto"
        if not bad.too_many and not interruption.agreed and not interruption.agree(self.args.device):
            return
        self._save_checkpoint(self.model_wrapped, None)  # after the last step there need not be one
        code, what = 128 + interruption.agreed, f"stopped after step {step}"
        if bad.too_many:
            names = ", ".join(dict.fromkeys(name for each in bad.found[-bad.in_a_row :] for name in each.samples))
            numbers = f"{bad.in_a_row} steps in a row, the last of them {step}, gave numbers that are not finite"
            cure = "nothing of them was learned; lower train.learning_rate or look at these samples"
            code, what = 1, f"{numbers}, with {names}; {cure}"
        self.accelerator.wait_for_everyone()  # launchers end all ranks when the first one goes
        raise Stopped(f"{what}; {onwards}" if self.is_world_process_zero() else "", code)
