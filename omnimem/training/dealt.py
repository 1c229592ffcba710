"""HF Trainer whose steps, weights and checkpoints are the same run on any number of ranks and at any ZeRO stage."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Sampler

from omnimem.data import Sample
from omnimem.training.gradient_sync import delivered
from omnimem.training.portable import Layout, State, needs_portable, restore_portable, write_portable
from omnimem.training.sampler import Batching, EpochOrder, Samples, in_a_batch
from omnimem.training.survivor import SurvivingTrainer
from omnimem.training.watchdog import Watchdog
from omnimem.training.zero3 import LayerGathering, whole
from omnimem.tuning import StreamedModel, trainable


class DealtTrainer(SurvivingTrainer):
    """Deals out samples and weights; `layers` are those that ZeRO-3 may split."""

    def __init__(
        self,
        *,
        model: StreamedModel,
        samples: Sequence[Sample],
        layers: Sequence[nn.Module],
        watch: Watchdog,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, data_collator=in_a_batch, train_dataset=Samples(samples), **kwargs)
        self.adapted, self.samples, self.layers, self.watch = model, samples, layers, watch
        self.shards: LayerGathering | None = None  # under ZeRO-3
        self.add_callback(watch)

    @property
    def batching(self) -> Batching:
        """How an epoch falls into steps."""
        each = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        drop_last = self.args.dataloader_drop_last
        return Batching(samples=len(self.samples), size=each * self.args.world_size, drop_last=drop_last)

    @property
    def share(self) -> float:
        """What a sample weighs in its micro-step, so that all samples of the step weigh the same in its mean.

        The mean over ranks and micro-steps that follows counts places, not samples.
        """
        batching = self.batching
        filled = batching.taken(self.state.global_step) / batching.size
        return 1 / (self.args.per_device_train_batch_size * filled)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        shuffled = self.args.train_sampling_strategy == "random"
        return EpochOrder(self.samples, self.batching, seed, lambda: int(self.state.epoch or 0), shuffled=shuffled)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """The Trainer's; a checkpoint of another layout is taken up by its portable part."""
        moved = None  # the checkpoint, where DeepSpeed cannot read it
        if resume_from_checkpoint is not None and needs_portable(Path(resume_from_checkpoint), self.layout):
            moved, resume_from_checkpoint = Path(resume_from_checkpoint), None
        engine, loader = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if moved is not None:
            restore_portable(moved, self._state(), cast(LRScheduler, self.lr_scheduler))
        if self.is_deepspeed_enabled and engine.zero_optimization_stage() == 3:
            self.shards = LayerGathering(engine, self.layers)
        return engine, loader

    @property
    def layout(self) -> Layout:
        """How the run is dealt out."""
        plugin = self.accelerator.state.deepspeed_plugin
        return Layout(
            ranks=self.args.world_size,
            stage=plugin.zero_stage if plugin is not None else None,
            batch=self.args.per_device_train_batch_size,
            accumulated=self.args.gradient_accumulation_steps,
            optimizer=str(self.args.optim),
            precision="bf16" if self.args.bf16 else "fp16" if self.args.fp16 else "fp32",
        )

    def _state(self) -> State:
        weights = {name: weight for name, weight in self.adapted.named_parameters() if weight.requires_grad}
        engine: Any = self.model_wrapped if self.is_deepspeed_enabled else None
        optimizer: Any = self.optimizer
        return State(weights, engine.basic_optimizer if engine else optimizer.optimizer, engine)

    def also_save(self, folder: Path) -> None:
        """What the run needs to go on with another number of ranks."""
        write_portable(folder, self._state(), self.layout, self.state.global_step, self.lr_scheduler)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, watched."""
        with self.watch:
            return super().train(*args, **kwargs)

    def training_step(self, model: Any, inputs: Mapping[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a micro-step."""
        self.watch.begin(self.state.global_step + 1, [sample.id for sample in inputs["samples"]])
        with self.shards.micro_step() if self.shards else nullcontext():
            return super().training_step(model, inputs, num_items_in_batch)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter; under ZeRO-3 peft alone would write empty tensors, and the Trainer gather the base as well."""
        if self.shards is None:
            super().save_model(output_dir, _internal_call)
            return
        with whole(trainable(self.adapted)):
            if self.args.should_save:
                self._save(output_dir)

    def delivered(self, loss: Tensor) -> Tensor:
        """The loss, whose backward gives every parameter its gradient on every rank."""
        self.watch.doing("in backward, the update, or waiting for other ranks")
        if self.shards is None:
            return delivered(loss, trainable(self.adapted))
        self.shards.settle()  # all ranks begin backward together
        return delivered(loss, trainable(self.adapted), finish=self.shards.settle)
