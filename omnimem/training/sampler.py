"""Which samples a step takes: the same on any number of ranks, accumulated or in a batch."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import final

from torch.utils.data import Dataset, Sampler

from omnimem.data import Sample


def seed_of(*parts: int | str) -> int:
    """A seed as a function of its parts: a draw depends on (seed, step, sample ids), never on what came before."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") % (1 << 63)


@final
@dataclass(frozen=True, kw_only=True)
class Batching:
    """How an epoch falls into steps of `size` samples over all ranks and accumulated micro-steps.

    The last step of an epoch takes what is left; with `drop_last` it is left out.
    """

    samples: int
    size: int
    drop_last: bool = False

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.samples // self.size if self.drop_last else math.ceil(self.samples / self.size)

    def taken(self, step: int) -> int:
        """How many samples step number `step` of the run takes."""
        return min(self.size, self.samples - step % self.steps * self.size)


@final
class Samples(Dataset[Sample | None]):
    """A manifest's samples; at places beyond them is nobody."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: int) -> Sample | None:
        return self.samples[place] if place < len(self.samples) else None


def in_a_batch(samples: Sequence[Sample | None]) -> dict[str, list[Sample]]:
    """The collator: nothing is padded, streams are decoded where the loss is computed."""
    return {"samples": [sample for sample in samples if sample is not None]}


@final
class EpochOrder(Sampler[int]):
    """The samples in an order that is a function of (seed, epoch, sample id) alone, or as the manifest has them.

    Filled up with nobody to whole steps, so that every rank has its part of each: the stock sampler would repeat
    samples on some numbers of ranks and not on others, and its order hangs on whichever seed was set last.
    """

    def __init__(
        self, samples: Sequence[Sample], batching: Batching, seed: int, epoch: Callable[[], int], *, shuffled: bool
    ) -> None:
        self.ids, self.batching, self.seed = [sample.id for sample in samples], batching, seed
        self.epoch, self.shuffled = epoch, shuffled

    def __len__(self) -> int:
        return self.batching.steps * self.batching.size

    def __iter__(self) -> Iterator[int]:
        number, places = self.epoch(), list(range(len(self.ids)))
        if self.shuffled:
            places.sort(key=lambda place: seed_of(self.seed, number, self.ids[place]))
        nobody = [len(self.ids)] * max(0, len(self) - len(places))
        return iter((places + nobody)[: len(self)])
