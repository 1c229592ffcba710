"""Samples that could not be decoded during training, or of which one track is missing, known to all ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Generic, TypeVar, final

from transformers import TrainingArguments

from omnimem.data import Failure, Failures, Sample
from omnimem.media import MediaError
from omnimem.media.prefetch import DecoderLost
from omnimem.tokens import Tracks
from omnimem.training.collectives import gather_lists

Finding = TypeVar("Finding")


def failure_of(sample: Sample, error: MediaError | DecoderLost) -> Failure:
    """The failure of a sample whose stream could not be opened; `memory`: its decoding process was killed."""
    reason = error.reason if isinstance(error, MediaError) else "memory"
    return Failure(id=sample.id, reason=reason, message=str(error))


@final
class Latest(Generic[Finding]):
    """What the latest read of each sample found, for samples where it found something; known to all ranks."""

    def __init__(self) -> None:
        self.found: dict[str, Finding] = {}
        self.past: list[str] = []  # samples of an earlier finding, whose latest read found nothing
        self._news: dict[str, Finding | None] = {}  # of this rank since the last `share`

    def note(self, sample: str, finding: Finding | None) -> None:
        """A sample was read; None: nothing was found."""
        if finding is not None or sample in self.found:
            self._news[sample] = finding
            self._apply(sample, finding)

    def share(self, ranks: int) -> None:
        """Merge the news of all ranks; where they differ about a sample, a finding counts; collective."""
        news = gather_lists(list(self._news.items()), ranks)
        for sample, finding in sorted(news, key=lambda each: each[1] is not None):
            self._apply(sample, finding)
        self._news = {}

    def _apply(self, sample: str, finding: Finding | None) -> None:
        if finding is None and self.found.pop(sample, None) is not None:
            self.past.append(sample)
        elif finding is not None:
            self.found[sample] = finding
            self.past = [each for each in self.past if each != sample]


@final
class FailedSamples:
    """The samples of a run whose latest read failed; too many of them end it."""

    def __init__(self, failures: Failures) -> None:
        self._limit = failures  # without failures
        self._latest: Latest[Failure] = Latest()

    @property
    def found(self) -> tuple[Failure, ...]:
        """Each sample that could not be read when it was last due, once."""
        return tuple(self._latest.found.values())

    @property
    def read_later(self) -> tuple[str, ...]:
        """Samples that failed earlier in the run, and were read when they were last due."""
        return tuple(self._latest.past)

    def restore(self, earlier: Sequence[Failure], read_later: Sequence[str] = ()) -> None:
        """Continue from the failures of a checkpoint; the limit is checked at the next one that is recorded."""
        self._latest.found = {failure.id: failure for failure in (*earlier, *self.found)}
        self._latest.past = [each for each in read_later if each not in self._latest.found]

    def record(self, failure: Failure) -> None:
        """Record a failure first, so that run.json has it too, then raise TooManyFailures above the limit."""
        before = self.found
        self._latest.note(failure.id, failure)
        replace(self._limit, found=before).add(failure)

    def read(self, sample: str) -> None:
        """A sample was read: an earlier failure, such as that of a file repaired since, no longer counts."""
        self._latest.note(sample, None)

    def share(self, args: TrainingArguments) -> None:
        """Merge the failures of all ranks; rank 0 checks the limit of the whole data set; collective."""
        before = self.found
        self._latest.share(args.world_size)
        if args.process_index == 0:
            kept = tuple(failure for failure in before if failure.id in self._latest.found)
            replace(self._limit, found=kept).add(*self.found)


@final
class OneTrackSamples:
    """The samples of whose latest read only one track was there, because their files lack the other."""

    def __init__(self) -> None:
        self._latest: Latest[str] = Latest()

    @property
    def found(self) -> dict[str, str]:
        """Id to the track that was read."""
        return self._latest.found

    def restore(self, earlier: Mapping[str, str]) -> None:
        """Continue from those of a checkpoint."""
        self._latest.found = {**earlier, **self.found}

    def record(self, sample: str, tracks: Tracks | None) -> None:
        """Record a sample unless both tracks were read."""
        self._latest.note(sample, tracks if tracks in ("video", "audio") else None)

    def share(self, args: TrainingArguments) -> None:
        """Merge the samples of all ranks; collective."""
        self._latest.share(args.world_size)
