"""The base of all scorers: a function from a layer's view to one number per token."""

from abc import abstractmethod
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from omnimem.view import LayerView


@dataclass(frozen=True, kw_only=True)
class AbstractScorer:
    """A query-agnostic score; it sees tensors only, never a module and never the question."""

    @property
    def needs_importance(self) -> bool:
        """Whether attention mass must be measured and carried for this score."""
        return False

    @property
    def needs_novelty(self) -> bool:
        """Whether redundancy must be measured and carried for this score."""
        return False

    @property
    def needs_place(self) -> bool:
        """Whether frame, row and column of kept tokens must be carried for this score (`pool.place`)."""
        return False

    @abstractmethod
    def __call__(self, view: LayerView) -> Float[Tensor, "batch tokens"]:
        """Scores in float32; the highest stay, ties go to the most recent token."""
