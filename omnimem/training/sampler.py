"""Which samples a step takes: the same on any number of ranks, with gradient accumulation or a larger batch."""

import hashlib
import math
import os.path
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from torch.utils.data import Dataset, Sampler

from omnimem.data import ManifestError, Sample
from omnimem.media import FrameList


def seed_of(*parts: int | str) -> int:
    """A seed computed from its parts alone, such as (seed, step, sample ids): no generator state is involved."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") % (1 << 63)


def held_out(samples: Sequence[Sample], share: float) -> tuple[list[Sample], list[Sample]]:
    """(training, validation): `share` of the recordings, rounded and at least one, with all their samples.

    A recording is a file, so that no stream is on both sides. Which ones are held out depends on the names of the files
    alone. Raises ManifestError when there is only one recording.
    """
    recordings = {recording(sample): None for sample in samples}
    if len(recordings) < 2:
        cure = "give data.validation a manifest, or more recordings to data.train"
        raise ManifestError([f"data.validation: {share:g} of {len(recordings)} recording leaves nothing; {cure}"])
    ordered = sorted(recordings, key=lambda name: (seed_of("validation", os.path.basename(name)), name))
    held = set(ordered[: min(len(ordered) - 1, max(1, round(share * len(ordered))))])
    return (
        [sample for sample in samples if recording(sample) not in held],
        [sample for sample in samples if recording(sample) in held],
    )


def recording(sample: Sample) -> str:
    """The file that a sample is cut from, of a frame list the folder of the first; its id where it has none."""
    path = sample.video or sample.audio
    path = path.files[0].parent if isinstance(path, FrameList) else path
    return sample.cluster or (sample.id if path is None else os.path.normpath(path))


@final
@dataclass(frozen=True, kw_only=True)
class Batching:
    """How an epoch is divided into steps of `size` samples, counted over all ranks and accumulated micro-steps.

    The last step of an epoch takes the remaining samples; with `drop_last` they are skipped.
    """

    samples: int
    size: int
    drop_last: bool = False

    @property
    def steps(self) -> int:
        """Steps per epoch."""
        return self.samples // self.size if self.drop_last else math.ceil(self.samples / self.size)

    def taken(self, step: int) -> int:
        """Number of samples in step `step` of the run, counted from 0."""
        return min(self.size, self.samples - step % self.steps * self.size)

    def sample_weight(self, step: int, micro_batch: int) -> float:
        """Weight of a sample in the loss of its micro-step: size / (micro_batch * taken(step)).

        The mean over ranks and micro-steps that follows divides by positions, of which the last step of an epoch may
        leave some empty; with this weight all samples of a step have the same weight, and their sum is 1.
        """
        filled = self.taken(step) / self.size
        return 1 / (micro_batch * filled)


@final
@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The samples of an epoch from several sources (ours): round(w n) from a source of n samples and weight w.

    Each source is read in passes over one order of its samples, drawn from (seed, id); epoch e takes places e k to
    (e + 1) k of the endless sequence of passes, k samples per epoch. So a weight of 1 is every sample once, 2 each
    twice, and with 0.5 two epochs take each once. What is taken is a function of (seed, epoch, sample id).
    """

    samples: Sequence[Sample]
    weights: Mapping[str, float] = field(default_factory=dict)  # by Sample.source; 1 if it is not named

    @property
    def size(self) -> int:
        """Samples per epoch."""
        return sum(self._taken(source, count) for source, count in self._counts().items())

    def of_epoch(self, seed: int, epoch: int) -> list[tuple[int, int]]:
        """Index of each sample taken, in manifest order, and how often it was taken before in this epoch."""
        taken: Counter[int] = Counter()
        for source, count in self._counts().items():
            number = self._taken(source, count)
            if number == count:  # every sample once
                indices = [index for index, sample in enumerate(self.samples) if sample.source == source]
                taken.update(indices)
                continue
            order = [index for index, sample in enumerate(self.samples) if sample.source == source]
            order.sort(key=lambda index: seed_of(seed, "pass", self.samples[index].id))
            taken.update(order[place % count] for place in range(epoch * number, (epoch + 1) * number))
        return [(index, before) for index in sorted(taken) for before in range(taken[index])]

    def _counts(self) -> Counter[str]:
        return Counter(sample.source for sample in self.samples)

    def _taken(self, source: str, count: int) -> int:
        return max(1, round(self.weights.get(source, 1.0) * count))


@final
class SampleDataset(Dataset[Sample | None]):
    """The samples of a manifest; a padding index gives None."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample | None:
        return self.samples[index] if index < len(self.samples) else None


def collate(samples: Sequence[Sample | None]) -> dict[str, list[Sample]]:
    """A batch without its padding; the samples are opened in the training step."""
    return {"samples": [sample for sample in samples if sample is not None]}


@final
class EpochSampler(Sampler[int]):
    """Indices of the samples, in an order that depends on (seed, epoch, sample id) alone, or in manifest order.

    Padding indices fill the last step, so that every rank has its part of each step. The stock sampler would repeat
    samples on some numbers of ranks only, and its order depends on the global seed.
    """

    def __init__(
        self, mixture: Mixture, batching: Batching, seed: int, epoch: Callable[[], int], *, shuffled: bool
    ) -> None:
        self.mixture, self.batching, self.seed = mixture, batching, seed
        self.epoch, self.shuffled = epoch, shuffled

    def __len__(self) -> int:
        return self.batching.steps * self.batching.size

    def __iter__(self) -> Iterator[int]:
        epoch, samples = self.epoch(), self.mixture.samples
        taken = self.mixture.of_epoch(self.seed, epoch)
        if self.shuffled:  # of a sample that is taken again, the number of its copy is a part of the key
            taken.sort(key=lambda each: seed_of(self.seed, epoch, samples[each[0]].id, *each[1:] * (each[1] > 0)))
        indices = [index for index, _ in taken]
        padding = [len(samples)] * max(0, len(self) - len(indices))
        return iter((indices + padding)[: len(self)])
