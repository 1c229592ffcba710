"""Options of an evaluation."""

from collections import Counter
from dataclasses import dataclass
from typing import final

from omnimem.errors import UserError
from omnimem.limits import exceeds
from omnimem.media import TracksOption
from omnimem.policies.base import Policy
from omnimem.tasks import BenchmarkOptions


class EvaluationError(UserError):
    """An evaluation cannot continue; the message says why and how to fix it."""


@final
@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Options of an evaluation."""

    after_training: bool = True  # evaluate and compare at the end of a training run
    benchmarks: tuple[BenchmarkOptions, ...] = ()  # chosen by name
    batch_size: int = 1  # streams of one layout per pass; above 1 the encoded stream is held as a whole
    max_new_tokens: int = 16  # of an answer
    limit: int | None = None  # streams per benchmark; None: all
    probes: bool = True  # also the blind, vision-only and audio-only arms
    max_failures: float = 0.01  # fraction of streams that may be unreadable
    processes: int = 1  # on this machine, one GPU each if there are several
    decoders: int = 1  # decoding processes of each; 0: decode in the process itself

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        for name in ("processes", "decoders"):
            if what := exceeds("processes", getattr(self, name)):
                raise ValueError(f"{name} = {what}")
        if self.decoders < 0:
            raise ValueError(f"decoders = {self.decoders} must be 0 or more")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit = {self.limit} must be at least 1; leave it out for all streams")
        labels = Counter(benchmark.label for benchmark in self.benchmarks)
        for label in labels:
            if labels[label] > 1:
                raise ValueError(f"benchmarks: {label} is given {labels[label]} times; keep one, or change its options")


@final
@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of answering; `tracks` None: no stream is read (blind)."""

    name: str
    policy: Policy
    tracks: TracksOption | None = "both"
