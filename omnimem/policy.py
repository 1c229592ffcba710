"""Policy: what layers keep after each chunk; the object used in training IS the one used in evaluation."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from omnimem.budget import Budget
from omnimem.scoring import AbstractScorer
from omnimem.selection import Room, Softness, select
from omnimem.tokens import Tokens
from omnimem.view import LayerView, Measures


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """What the layers keep after each chunk."""

    name: str
    budget: Budget | None  # None: full memory, nothing is evicted
    measures: Measures = field(default_factory=Measures)
    per_head: bool = False  # every key-value head keeps tokens of its own
    reindex: bool = False  # after every chunk the kept tokens move up to contiguous times

    @property
    def needs_novelty(self) -> bool:
        """Whether the feature that redundancy is judged on must be carried."""
        return False

    def with_budget(self, budget: Budget | None) -> "Policy":
        """The same policy at another budget."""
        return replace(self, budget=budget)

    def room(self, layer: int) -> Room | None:
        """Slots of one layer; None: unlimited."""
        return None if self.budget is None else room_of(self.budget, layer)

    @abstractmethod
    def keep(self, layer: int, view: LayerView, softness: Softness | None = None) -> Tokens:
        """The layer's memory after the chunk in `view`; with a softness, selection is softened (training)."""


def room_of(budget: Budget, layer: int) -> Room:
    """The slots of one layer of a budget."""
    audio, visual = budget.layer(layer)
    return Room(audio=audio, visual=visual, split=budget.split, lend=budget.lend)


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
        room = self.room(layer)
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
