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
class Draws:
    """State of the generators that dropout draws from, so that a chunk that is read again drops the same."""

    cpu: Tensor
    devices: list[int]
    states: list[Tensor]

    @classmethod
    def now(cls, like: Tensor) -> "Draws":
        """As they stand, on the CPU and on the device of a tensor."""
        devices, states = get_device_states(like)
        return cls(cpu=torch.get_rng_state(), devices=devices, states=states)

    @contextmanager
    def again(self) -> Iterator[None]:
        """The same draws inside the block; after it the generators stand where they stood before it."""
        with torch.random.fork_rng(devices=self.devices):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states)
            yield


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Link:
    """A chunk as it was read, and the memory that it met."""

    step: Callable[[Memory, Tensor], Memory]
    embeddings: Tensor
    before: Memory
    draws: Draws


@final
@dataclass(frozen=True, kw_only=True)
class HorizonGradient:
    """`gradient: full` with `horizon: N`: a loss read after chunk t sends gradient into the computation of chunks
    t - N + 1 to t and of no earlier one; what chunks up to t - N left in the memory is constant to it.

    Where several losses are read on the way, each has its own N chunks, so a chunk cannot be cut once for all: every
    chunk is read from a memory without a past, and the N - 1 latest are read again from the one before them when a
    loss is (ours). Against no horizon that costs N - 1 more forward passes a moment of asking and spares the backward
    passes of all chunks that are further back.
    """

    chunks: int
    each: FullGradient = field(default_factory=FullGradient)  # how the chunks within the horizon are kept

    def __call__(self, step: Callable[[Memory, Tensor], Memory], memory: Memory, embeddings: Tensor) -> Memory:
        """The memory after the chunk: gradient ends at the memory before it."""
        link = Link(step=step, embeddings=embeddings, before=replace(memory, note=None), draws=Draws.now(embeddings))
        after = self.each(step, memory.detached(), embeddings)
        links = (*_latest(memory), link)
        return replace(after, note=links[max(0, len(links) - self.chunks + 1) :])

    def read(self, loss: Callable[[Memory], Tensor], memory: Memory) -> Tensor:
        """`loss` of the memory as the latest chunks made it; the earliest of them was read from a constant."""
        links = _latest(memory)
        reached = links[0].before if links else memory
        for link in links:
            with link.draws.again():
                reached = self.each(link.step, reached, link.embeddings)
        return self.each.read(loss, reached)


def _latest(memory: Memory) -> tuple[Link, ...]:
    """The chunks to read again, oldest first."""
    match memory.note:
        case tuple() as links:
            return links
    return ()
