"""Policy: which tokens each layer keeps after a chunk; training and evaluation use the same object."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, final

import torch
from torch import Tensor

from omnimem.budget import Budget
from omnimem.errors import UserError
from omnimem.scoring import AbstractScorer, Compared, Covered
from omnimem.selection import LayerSlots, Softness, select
from omnimem.tokens import Tokens
from omnimem.view import LayerView, Measures

# The gradient modes (`tuning.gradient`), measuring a budget's signals under the policy, and gradient through the
# attention that tokens receive (`selection.gradient: both`).
Mode = Literal["full", "states", "released", "paper", "calibration", "learned_importance"]


class PolicyError(UserError):
    """A policy that cannot work on the streams it is given; the message gives the reason and the fix."""


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """Which tokens each layer keeps after a chunk.

    The cycle: every layer reads [memory ; chunk], then keeps its budget of that pool (`keep`). Whatever else a method
    does (joint selection over layers, probe prompts, per-head storage, merging) is an optional protocol of
    `omnimem.policies.capabilities`.
    """

    name: str
    budget: Budget | None  # None: full memory, nothing is evicted
    measures: Measures = field(default_factory=Measures)

    def supports(self, mode: Mode) -> bool:
        """Whether the policy works in this mode; by default in those that need no score per token and layer."""
        return mode in ("full", "learned_importance")

    def with_budget(self, budget: Budget | None) -> "Policy":
        """The same policy at another budget."""
        return replace(self, budget=budget)

    def layer_slots(self, layer: int) -> LayerSlots | None:
        """Slots of one layer; None: unlimited."""
        return None if self.budget is None else slots_of_layer(self.budget, layer)

    @abstractmethod
    def keep(self, layer: int, view: LayerView, softness: Softness | None = None) -> Tokens:
        """The layer's memory after the chunk in `view`; with a softness, selection is softened (training)."""


@dataclass(frozen=True, kw_only=True)
class JointPolicy(Policy):
    """A policy whose layers decide together, once all of them have read the chunk."""

    @abstractmethod
    def select_joint(self, views: Sequence[LayerView], softness: Softness | None = None) -> list[Tokens]:
        """The memory of every layer; requires a budget."""

    @final
    def keep(self, layer: int, view: LayerView, softness: Softness | None = None) -> Tokens:
        """All tokens: `select_joint` evicts after the pass, and without a budget nothing is evicted."""
        return view.pool


def slots_of_layer(budget: Budget, layer: int) -> LayerSlots:
    """The slots of one layer of a budget."""
    audio, visual = budget.layer(layer)
    return LayerSlots(audio=audio, visual=visual, split=budget.split, lend=budget.lend)


@final
@dataclass(frozen=True, kw_only=True)
class ScoredPolicy(Policy):
    """Keeps the highest scores of each modality within the layer's slots; each layer decides alone, in the pass."""

    per_head: bool = False  # every key-value head keeps tokens of its own
    scorer: AbstractScorer

    @property
    def needs_novelty(self) -> bool:
        """Same as the scorer."""
        return self.scorer.needs_novelty

    @property
    def compared(self) -> Compared | None:
        """Which vectors the scorer compares between tokens."""
        return self.scorer.compared if isinstance(self.scorer, Covered) else None

    def supports(self, mode: Mode) -> bool:
        """Every mode, but for those that carry one choice for all heads, and scores that measure no attention."""
        if mode in ("states", "paper", "calibration"):
            return not self.per_head
        return self.scorer.needs_importance if mode == "learned_importance" else True

    def keep(self, layer: int, view: LayerView, softness: Softness | None = None) -> Tokens:
        """The layer's memory after the chunk in `view`; with a softness, selection is softened (training)."""
        slots = self.layer_slots(layer)
        if slots is None:
            return view.pool
        pool = self._observed(view)
        selected = select(self.scorer(view), view.modality, slots, softness, view.pool.gate)
        kept = pool.gather(selected.index)
        return kept if selected.gate is None else replace(kept, gate=selected.gate)

    def _observed(self, view: LayerView) -> Tokens:
        """The pool with importance and novelty as measured on this chunk."""
        pool = view.pool
        if self.scorer.needs_importance:
            pool = replace(pool, importance=view.importance)
        if self.scorer.needs_novelty:
            pool = replace(pool, novelty=view.novelty)
        return pool


def projection(width: int, feature: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Fixed random projection width -> feature; keeps cosines to about 1 / sqrt(feature) (Johnson-Lindenstrauss)."""
    generator = torch.Generator().manual_seed(2606_07577)
    matrix = torch.randn(width, feature, generator=generator) / feature**0.5
    return matrix.to(dtype=dtype, device=device)
