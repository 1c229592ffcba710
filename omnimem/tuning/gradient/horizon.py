"""The exact gradient of the latest chunks alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from omnimem.memory import Memory
from omnimem.tuning.gradient.full import FullGradient


@final
@dataclass(frozen=True, kw_only=True)
class RandomState:
    """State of the random generators, so that a chunk that is read again has the same dropout masks."""

    cpu: Tensor
    devices: list[int]
    states: list[Tensor]

    @classmethod
    def now(cls, like: Tensor) -> "RandomState":
        """The current state on the CPU and on the device of a tensor."""
        devices, states = get_device_states(like)
        return cls(cpu=torch.get_rng_state(), devices=devices, states=states)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """This state inside the block; the state before the block is restored after it."""
        with torch.random.fork_rng(devices=self.devices):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states)
            yield


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ChunkRecord:
    """A chunk as it was read, and the memory before it."""

    step: Callable[[Memory, Tensor], Memory]
    embeddings: Tensor
    before: Memory
    random: RandomState


@final
@dataclass(frozen=True, kw_only=True)
class HorizonGradient:
    """`gradient: full` with `horizon: N`: a loss after chunk t has gradient through the computation of chunks
    t - N + 1 to t and of no earlier one; the memory after chunk t - N is constant.

    Each of several losses has its own N chunks, so the memory cannot be detached once for all of them: every chunk is
    read from a detached memory, and each loss reads the N - 1 chunks before the last again from the memory before
    them. Compared to no horizon, that costs N - 1 more forward passes per loss and saves the backward passes of all
    earlier chunks.
    """

    chunks: int
    each: FullGradient = field(default_factory=FullGradient)  # how the chunks within the horizon are kept
    records: tuple[ChunkRecord, ...] = ()  # of this stream: the latest chunks, oldest first

    def __call__(
        self, step: Callable[[Memory, Tensor], Memory], memory: Memory, embeddings: Tensor
    ) -> tuple[Memory, "HorizonGradient"]:
        """The memory after the chunk; gradient ends at the memory before it."""
        record = ChunkRecord(step=step, embeddings=embeddings, before=memory, random=RandomState.now(embeddings))
        after = self.each.after(step, memory.detached(), embeddings)
        records = (*self.records, record)
        return after, replace(self, records=records[max(0, len(records) - self.chunks + 1) :])

    def read(self, loss: Callable[[Memory], Tensor], memory: Memory) -> Tensor:
        """`loss` of the memory computed again by the latest chunks; the earliest of them reads a constant."""
        reached = self.records[0].before if self.records else memory
        for record in self.records:
            with record.random.restored():
                reached = self.each.after(record.step, reached, record.embeddings)
        return self.each.read(loss, reached)
