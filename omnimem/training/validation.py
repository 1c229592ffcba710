"""Validation during training: loss and accuracy of streams that are not trained on; best checkpoint, early stopping."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import fmean
from typing import Any, final

from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from omnimem.config.exported import Policies
from omnimem.data import Sample
from omnimem.errors import UserError, counted
from omnimem.evaluation import left_out
from omnimem.media import MediaError
from omnimem.media.prefetch import DecoderLost
from omnimem.policies.base import Policy
from omnimem.streaming.ahead import ReadAhead
from omnimem.streaming.attach import StreamedAttention
from omnimem.streaming.feeder import EncodedSample, Feeder, batch_by_layout
from omnimem.training.collectives import gather_lists
from omnimem.training.failures import FailedSamples, failure_of
from omnimem.training.logging import Finished
from omnimem.tuning import Score, streamed_scores

PREFIX = "eval_"  # of the Trainer
FULL = "full_"  # of the metrics with full memory


class ValidationError(UserError):
    """No stream of the validation set can be answered."""


@final
@dataclass(frozen=True, kw_only=True)
class Validation:
    """Reads the validation streams as evaluation does, at the budget of the run and with full memory.

    `loss` is the mean over streams of the mean over a stream's answer tokens; `accuracy` the share of questions whose
    greedy answer is the reference, token by token. Blocks of `size` consecutive streams are distributed over the ranks
    and reduced in the order of the data: the numbers do not depend on the number of ranks.
    """

    attached: StreamedAttention
    feeder: Feeder
    workers: int  # that decode ahead
    policies: Policies
    slots: int  # per layer
    samples: Sequence[Sample]
    size: int  # streams per pass
    failed: FailedSamples

    def __call__(
        self, args: TrainingArguments, begin: Callable[[Sequence[str]], None], ready: AbstractContextManager[Any]
    ) -> dict[str, float]:
        """The metrics without prefix; collective.

        `begin` is called with the ids of each block, and `ready` surrounds the passes. Raises TooManyFailures, and
        ValidationError when no stream can be answered at the budget.
        """
        # 1. this rank's blocks, at the budget and with full memory
        blocks = [self.samples[start : start + self.size] for start in range(0, len(self.samples), self.size)]
        found: list[tuple[int, str, str, Score | None]] = []  # (block, id, prefix, None: left out)
        mine = range(args.process_index, len(blocks), args.world_size)
        with ready, ReadAhead(self.feeder, self.workers) as ahead:
            ahead.expect(sample for number in mine for sample in blocks[number])
            for number in mine:
                begin([sample.id for sample in blocks[number]])
                encoded = self._encoded(blocks[number], ahead)
                for prefix, slots in (("", self.slots), (FULL, None)):
                    for batch in batch_by_layout(encoded, self.size):
                        scores = self._scores(batch, self.policies(slots))
                        found += [(number, one.id, prefix, score) for one, score in zip(batch, scores, strict=True)]
        # 2. those of all ranks, in the order of the data
        self.failed.share(args)
        order = {sample.id: place for place, sample in enumerate(self.samples)}
        every = sorted(gather_lists(found, args.world_size), key=lambda each: order[each[1]])
        metrics: dict[str, float] = {"failed_samples": float(len(self.failed.found))}
        for prefix in ("", FULL):
            metrics |= _summary(prefix, [score for _, _, of, score in every if of == prefix])
        if math.isnan(metrics["loss"]):
            raise ValidationError("data.validation: no stream can be answered at the budget; see failed samples")
        return metrics

    def _encoded(self, samples: Sequence[Sample], ahead: ReadAhead) -> list[EncodedSample]:
        encoded = []
        for sample in samples:
            try:
                encoded.append(ahead.open(sample) if sample.has_stream else self.feeder.unseen(sample))
                self.failed.read(sample.id)
            except (MediaError, DecoderLost) as error:
                self.failed.record(failure_of(sample, error))
        return encoded

    def _scores(self, batch: Sequence[EncodedSample], policy: Policy) -> Sequence[Score | None]:
        """The scores of a batch; None where full memory cannot read it, as in evaluation."""
        try:
            return streamed_scores(self.attached, self.feeder, batch, policy)
        except left_out.ERRORS as error:
            if policy.budget is not None or left_out.reason_of(error, policy) is None:
                raise
        left_out.release()
        return [None] * len(batch)


def _summary(prefix: str, scores: Sequence[Score | None]) -> dict[str, float]:
    answered = [score for score in scores if score is not None]
    questions = sum(score.questions for score in answered)
    correct = sum(score.correct for score in answered)
    return {
        f"{prefix}loss": fmean(score.loss for score in answered) if answered else math.nan,
        f"{prefix}accuracy": correct / questions if questions else math.nan,
        f"{prefix}streams": float(len(answered)),
        f"{prefix}questions": float(questions),
        f"{prefix}left_out": float(len(scores) - len(answered)),
    }


@final
class EarlyStopping(EarlyStoppingCallback):
    """transformers' own, with a counter that continues in a resumed run, and a checkpoint where the run stops.

    Patience and threshold may change when a run is resumed.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Continue from the counter of the checkpoint. Raises Finished when the run had stopped there."""
        stored: Any = state.stateful_callbacks
        attributes: Mapping[str, Any] = stored.get(type(self).__name__, {}).get("attributes", {})
        self.early_stopping_patience_counter = int(attributes.get("early_stopping_patience_counter", 0))
        if state.global_step and self.early_stopping_patience_counter >= self.early_stopping_patience:
            raise Finished

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **rest: Any
    ) -> None:
        """Count, and end the run after too many evaluations without a new best."""
        super().on_evaluate(args, state, control, metrics, **rest)
        if self.early_stopping_patience_counter < self.early_stopping_patience:
            return
        control.should_save = True
        if state.is_world_process_zero:
            by = f" by more than {self.early_stopping_threshold:g}" if self.early_stopping_threshold else ""
            print(
                f"step {state.global_step}: {args.metric_for_best_model} has not improved{by} in "
                f"{counted(self.early_stopping_patience_counter, 'validation')}: training stops",
                flush=True,
            )
