"""What only some policies do: an optional protocol per capability, and a function per question that callers ask."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

from jaxtyping import Int, Int8
from torch import Tensor

from omnimem.policies.base import JointPolicy, Policy
from omnimem.scoring import Compared
from omnimem.tokens import Chunk


@final
@dataclass(frozen=True, kw_only=True)
class ProbePrompt:
    """A text that is asked of the memory after every chunk, in place of the questions that no policy may know."""

    text: str | None  # None: the tokens that the chat template puts after a question
    read: bool = True  # through all layers, as a question; False: each layer projects the embeddings themselves


@final
@dataclass(frozen=True, kw_only=True)
class StreamOutline:
    """The content of a stream, known before it is read: for baselines and bounds that are no streaming methods."""

    modality: Int8[Tensor, " tokens"]  # of all tokens, in order of arrival
    positions: Int[Tensor, "axes tokens"]
    needles: tuple[int, ...] = ()  # arrival numbers of the tokens that hold the answers, most important first


@final
@dataclass(frozen=True, kw_only=True)
class Prefiltered:
    """The part of a chunk that is read."""

    chunk: Chunk
    order: Int[Tensor, "batch tokens"]  # arrival numbers; those of dropped tokens are missing


@runtime_checkable
class KeepsPerHead(Protocol):
    """A policy whose key-value heads may each keep tokens of their own."""

    @property
    def per_head(self) -> bool: ...


@runtime_checkable
class Reindexes(Protocol):
    """A policy whose kept tokens may move up to contiguous times after every chunk."""

    @property
    def reindex(self) -> bool: ...


@runtime_checkable
class Merges(Protocol):
    """A policy that may keep tokens that did not arrive: averages of others."""

    @property
    def merges(self) -> bool: ...


@runtime_checkable
class Ragged(Protocol):
    """A policy under which streams of a batch, or heads of a stream, may keep unequal numbers of tokens."""

    @property
    def ragged(self) -> bool: ...


@runtime_checkable
class Probes(Protocol):
    """A policy that asks probe prompts after every chunk; the view has their queries and keys in this order."""

    @property
    def probes(self) -> tuple[ProbePrompt, ...]: ...


@runtime_checkable
class Prefilters(Protocol):
    """A policy that drops or averages tokens of a chunk before the model reads it."""

    def prefilter(self, chunk: Chunk, order: Int[Tensor, "batch tokens"]) -> Prefiltered: ...


@runtime_checkable
class NeedsOracle(Protocol):
    """A policy that, under a budget, must know the content of the streams in advance: no streaming method."""

    def with_oracle(self, streams: Sequence[StreamOutline]) -> Policy: ...


@runtime_checkable
class MeasuresNovelty(Protocol):
    """A policy that may carry the feature on which redundancy is measured."""

    @property
    def needs_novelty(self) -> bool: ...


@runtime_checkable
class Compares(Protocol):
    """A policy that may compare each token with the tokens of higher score; None: it does not."""

    @property
    def compared(self) -> Compared | None: ...


def joint_of(policy: Policy) -> JointPolicy | None:
    """The policy, if its layers decide together after all have read the chunk: their pools live until then."""
    return policy if isinstance(policy, JointPolicy) and policy.budget is not None else None


def keeps_per_head(policy: Policy) -> bool:
    """Whether every key-value head keeps tokens of its own."""
    return isinstance(policy, KeepsPerHead) and policy.per_head


def reindexes(policy: Policy) -> bool:
    """Whether the kept tokens move up to contiguous times after every chunk."""
    return isinstance(policy, Reindexes) and policy.reindex


def merges(policy: Policy) -> bool:
    """Whether some of the kept tokens are averages of others."""
    return isinstance(policy, Merges) and policy.merges


def ragged(policy: Policy) -> bool:
    """Whether streams of a batch, or heads of a stream, may keep unequal numbers of tokens."""
    return isinstance(policy, Ragged) and policy.ragged


def probes_of(policy: Policy) -> tuple[ProbePrompt, ...]:
    """The probe prompts that are asked after every chunk."""
    return policy.probes if isinstance(policy, Probes) else ()


def prefiltered(policy: Policy, chunk: Chunk, order: Int[Tensor, "batch tokens"]) -> Prefiltered:
    """The part of a chunk that the model reads: all of it, unless the policy prefilters."""
    if isinstance(policy, Prefilters):
        return policy.prefilter(chunk, order)
    return Prefiltered(chunk=chunk, order=order)


def needs_oracle(policy: Policy) -> bool:
    """Whether the policy must know the content of a stream before it is read."""
    return isinstance(policy, NeedsOracle) and policy.budget is not None


def with_oracle(policy: Policy, streams: Sequence[StreamOutline]) -> Policy:
    """The policy for streams of this content; a streaming method ignores it."""
    return policy.with_oracle(streams) if isinstance(policy, NeedsOracle) else policy


def needs_novelty(policy: Policy) -> bool:
    """Whether the feature on which redundancy is measured must be carried."""
    return isinstance(policy, MeasuresNovelty) and policy.needs_novelty


def compared_by(policy: Policy) -> Compared | None:
    """Which vectors of a token are compared with those of tokens of higher score; None: none."""
    return policy.compared if isinstance(policy, Compares) else None
