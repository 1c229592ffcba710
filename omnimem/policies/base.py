"""Policy: what layers keep after each chunk; the object used in training IS the one used in evaluation."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import final

import torch
from jaxtyping import Int, Int8
from torch import Tensor

from omnimem.budget import Budget
from omnimem.errors import UserError
from omnimem.scoring import AbstractScorer
from omnimem.selection import LayerSlots, Softness, select
from omnimem.tokens import Chunk, Tokens
from omnimem.view import LayerView, Measures


class PolicyError(UserError):
    """A policy that cannot work on the streams it is given; the message says why and how to repair it."""


@final
@dataclass(frozen=True, kw_only=True)
class ProbePrompt:
    """A text that is asked of the memory after every chunk, in place of the questions that no policy may know."""

    text: str | None  # None: what the chat template puts after a question
    read: bool = True  # through all layers, as a question; False: each layer projects the embeddings as they are


@final
@dataclass(frozen=True, kw_only=True)
class StreamOutline:
    """What a stream will hold, known before it is read: for baselines and bounds that are no streaming methods."""

    modality: Int8[Tensor, " tokens"]  # of all tokens, in order of arrival
    positions: Int[Tensor, "axes tokens"]
    needles: tuple[int, ...] = ()  # arrival numbers of the tokens that hold the answers, the dearest first


@final
@dataclass(frozen=True, kw_only=True)
class Prefiltered:
    """What is left of a chunk before it is read."""

    chunk: Chunk
    order: Int[Tensor, "batch tokens"]  # arrival numbers, those of the tokens that went left out


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """What the layers keep after each chunk.

    The cycle: a chunk may be sifted; every layer reads [memory ; chunk], and probes ask it; then each layer keeps its
    budget of what it saw, in the pass (`keep`), or all layers settle it together after the pass, when `joint`. What
    is kept may be merged tokens, at places of its own. With `reindex` it moves up before it is read again.
    """

    name: str
    budget: Budget | None  # None: full memory, nothing is evicted
    measures: Measures = field(default_factory=Measures)
    per_head: bool = False  # every key-value head keeps tokens of its own
    reindex: bool = False  # after every chunk the kept tokens move up to contiguous times

    @property
    def needs_novelty(self) -> bool:
        """Whether the feature that redundancy is judged on must be carried."""
        return False

    @property
    def joint(self) -> bool:
        """Whether no layer can decide before all have read the chunk; their pools then live until the pass ends."""
        return False

    @property
    def ragged(self) -> bool:
        """Whether streams of a batch, or heads of a stream, may keep unequal numbers."""
        return False

    @property
    def merges(self) -> bool:
        """Whether some of what is kept are no tokens that arrived."""
        return False

    @property
    def probes(self) -> tuple[ProbePrompt, ...]:
        """What is asked after every chunk; the view shows their queries and keys in this order."""
        return ()

    @property
    def needs_oracle(self) -> bool:
        """Whether it must be told what a stream will hold before it is read: then it is no streaming method."""
        return False

    def with_oracle(self, streams: Sequence[StreamOutline]) -> "Policy":
        """The policy for streams of which this is known beforehand; a streaming method does not listen."""
        return self

    def prefilter(self, chunk: Chunk, order: Int[Tensor, "batch tokens"]) -> Prefiltered:
        """What of a chunk is read at all."""
        return Prefiltered(chunk=chunk, order=order)

    def with_budget(self, budget: Budget | None) -> "Policy":
        """The same policy at another budget."""
        return replace(self, budget=budget)

    def layer_slots(self, layer: int) -> LayerSlots | None:
        """Slots of one layer; None: unlimited."""
        return None if self.budget is None else slots_of_layer(self.budget, layer)

    @abstractmethod
    def keep(self, layer: int, view: LayerView, softness: Softness | None = None) -> Tokens:
        """The layer's memory after the chunk in `view`; with a softness, selection is softened (training)."""

    def select_joint(self, views: Sequence[LayerView], softness: Softness | None = None) -> list[Tokens]:
        """The memory of every layer, where they decide together."""
        return [self.keep(layer, view, softness) for layer, view in enumerate(views)]


def slots_of_layer(budget: Budget, layer: int) -> LayerSlots:
    """The slots of one layer of a budget."""
    audio, visual = budget.layer(layer)
    return LayerSlots(audio=audio, visual=visual, split=budget.split, lend=budget.lend)


@final
@dataclass(frozen=True, kw_only=True)
class ScoredPolicy(Policy):
    """The highest scores of each modality within the layer's slots; each layer decides by itself, in the pass."""

    scorer: AbstractScorer

    @property
    def needs_novelty(self) -> bool:
        """As the scorer does."""
        return self.scorer.needs_novelty

    def keep(self, layer: int, view: LayerView, softness: Softness | None = None) -> Tokens:
        """The layer's memory after the chunk in `view`; with a softness, selection is softened (training)."""
        room = self.layer_slots(layer)
        if room is None:
            return view.pool
        pool = self._observed(view)
        selected = select(self.scorer(view), view.modality, room, softness, view.pool.gate)
        kept = pool.gather(selected.index)
        return kept if selected.gate is None else replace(kept, gate=selected.gate)

    def _observed(self, view: LayerView) -> Tokens:
        """The pool with what this chunk taught about its tokens."""
        pool = view.pool
        if self.scorer.needs_importance:
            pool = replace(pool, importance=view.importance)
        if self.scorer.needs_novelty:
            pool = replace(pool, novelty=view.novelty)
        return pool


def projection(width: int, feature: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Fixed random projection width -> feature (Johnson-Lindenstrauss): cosines survive to about 1 / sqrt(feature)."""
    generator = torch.Generator().manual_seed(2606_07577)
    matrix = torch.randn(width, feature, generator=generator) / feature**0.5
    return matrix.to(dtype=dtype, device=device)
