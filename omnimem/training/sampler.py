"""Which samples a step takes: the same on any number of ranks, with gradient accumulation or a larger batch."""

import hashlib
import math
import os.path
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import final

from torch.utils.data import Dataset, Sampler

from omnimem.data import ManifestError, Sample


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
    """The file that a sample is cut from; its id where it has none."""
    path = sample.video or sample.audio
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
class SampleDataset(Dataset[Sample | None]):
    """The samples of a manifest; a padding index gives None."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample | None:
        return self.samples[index] if index < len(self.samples) else None


def collate(samples: Sequence[Sample | None]) -> dict[str, list[Sample]]:
    """A batch without its padding; the samples are decoded in the training step."""
    return {"samples": [sample for sample in samples if sample is not None]}


@final
class EpochSampler(Sampler[int]):
    """Indices of the samples, in an order that depends on (seed, epoch, sample id) alone, or in manifest order.

    Padding indices fill the last step, so that every rank has its part of each step. The stock sampler would repeat
    samples on some numbers of ranks only, and its order depends on the global seed.
    """

    def __init__(
        self, samples: Sequence[Sample], batching: Batching, seed: int, epoch: Callable[[], int], *, shuffled: bool
    ) -> None:
        self.ids, self.batching, self.seed = [sample.id for sample in samples], batching, seed
        self.epoch, self.shuffled = epoch, shuffled

    def __len__(self) -> int:
        return self.batching.steps * self.batching.size

    def __iter__(self) -> Iterator[int]:
        epoch, indices = self.epoch(), list(range(len(self.ids)))
        if self.shuffled:
            indices.sort(key=lambda index: seed_of(self.seed, epoch, self.ids[index]))
        padding = [len(self.ids)] * max(0, len(self) - len(indices))
        return iter((indices + padding)[: len(self)])
