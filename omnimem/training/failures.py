"""Samples that could not be decoded during training, known to all ranks."""

from collections.abc import Sequence
from dataclasses import replace
from typing import final

from transformers import TrainingArguments

from omnimem.data import Failure, Failures, Sample
from omnimem.media import MediaError
from omnimem.media.prefetch import DecoderLost
from omnimem.tokens import Tracks
from omnimem.training.collectives import gather_lists


def failure_of(sample: Sample, error: MediaError | DecoderLost) -> Failure:
    """The failure of a sample whose stream could not be opened; `memory`: its decoding process was killed."""
    reason = error.reason if isinstance(error, MediaError) else "memory"
    return Failure(id=sample.id, reason=reason, message=str(error))


@final
class FailedSamples:
    """The failed samples of a run; too many of them end it."""

    def __init__(self, failures: Failures) -> None:
        self.failures = failures

    @property
    def found(self) -> tuple[Failure, ...]:
        """Each failed sample once."""
        return self.failures.found

    def restore(self, earlier: Sequence[Failure]) -> None:
        """Continue from the failures of a checkpoint; the limit is checked at the next one that is recorded."""
        known = {failure.id: failure for failure in (*earlier, *self.found)}
        self.failures = replace(self.failures, found=tuple(known.values()))

    def record(self, failure: Failure) -> None:
        """Record a failure first, so that run.json has it too, then raise TooManyFailures above the limit."""
        before = self.failures
        if all(known.id != failure.id for known in before.found):
            self.failures = replace(before, found=(*before.found, failure))
            before.add(failure)

    def share(self, args: TrainingArguments) -> None:
        """Merge the failures of all ranks; rank 0 checks the limit of the whole data set; collective."""
        if args.world_size == 1:
            return
        known = {failure.id: failure for failure in gather_lists(self.found, args.world_size)}
        if args.process_index == 0:
            for failure in known.values():
                self.record(failure)
        else:
            self.failures = replace(self.failures, found=tuple(known.values()))


@final
class OneTrackSamples:
    """The samples of which only one track could be read, because their files lack the other, known to all ranks."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}  # id to the track that was read

    def record(self, sample: str, tracks: Tracks | None) -> None:
        """Record a sample unless both tracks were read."""
        if tracks in ("video", "audio"):
            self.found[sample] = tracks

    def share(self, args: TrainingArguments) -> None:
        """Merge the samples of all ranks; collective."""
        if args.world_size > 1:
            self.found = dict(gather_lists(list(self.found.items()), args.world_size))
