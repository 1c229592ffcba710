"""What a stream keeps of each part of its time, in a bounded number of bins."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from omnimem.memory import Memory
from omnimem.tokens import EVICTABLE, Chunk

BINS = 240  # at most; two become one where there would be more


@final
@dataclass(frozen=True)
class Bin:
    """Consecutive parts of chunks."""

    end: float  # seconds
    order: int  # arrival number after its last token
    arrived: tuple[int, ...]  # tokens by EVICTABLE

    def before(self, later: "Bin") -> "Bin":
        """This bin and the next one together."""
        added = tuple(one + other for one, other in zip(self.arrived, later.arrived, strict=True))
        return Bin(later.end, later.order, added)


@final
class Timeline:
    """Arrived and kept tokens of each bin of a stream."""

    def __init__(self, most: int = BINS) -> None:
        self._most = most
        self._bins: list[Bin] = []
        self._kept = np.zeros((0, len(EVICTABLE)))  # mean over the layers
        self._parts, self._open = 1, 0  # parts per bin, and in the last one
        self._order = 0

    def add(self, parts: Sequence[Chunk], memory: Memory) -> None:
        """Note the parts of a chunk that was read, and what the layers hold now."""
        # 1. the bins of the parts
        for part in parts:
            self._order += part.count
            arrived = tuple(int((part.modality == kind).sum()) for kind in EVICTABLE)
            self._append(Bin(part.seconds, self._order, arrived))
        # 2. what is held of each: a token of one of H heads counts 1 / H
        ends = np.asarray([each.order for each in self._bins])
        self._kept = np.zeros((len(ends), len(EVICTABLE)))
        for tokens in memory.layers:
            kinds, order = tokens.modality[0].cpu().numpy(), tokens.order[0].cpu().numpy()
            for column, kind in enumerate(EVICTABLE):
                bins = np.searchsorted(ends, order[kinds == kind], side="right")
                self._kept[:, column] += np.bincount(bins, minlength=len(ends)) / tokens.heads
        self._kept /= len(memory.layers)

    def _append(self, came: Bin) -> None:
        if 0 < self._open < self._parts:
            self._bins[-1], self._open = self._bins[-1].before(came), self._open + 1
        else:
            self._bins.append(came)
            self._open = 1
        if len(self._bins) > self._most:  # of an odd number the last one stays open
            odd = len(self._bins) % 2
            pairs = zip(self._bins[::2], self._bins[1::2], strict=False)
            self._bins = [*(one.before(other) for one, other in pairs), *self._bins[len(self._bins) - odd :]]
            self._open += 0 if odd else self._parts
            self._parts *= 2

    def shown(self) -> list[list[float]]:
        """For the page: end in seconds, arrived audio and visual, kept audio and visual tokens of each bin."""
        rows = zip(self._bins, self._kept.round(2).tolist(), strict=True)
        return [[each.end, *each.arrived, *kept] for each, kept in rows if any(each.arrived)]
