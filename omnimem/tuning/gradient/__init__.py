"""Gradient modes: how the memory passes through the graph, and how far gradient flows back; one per file."""

from omnimem.tuning.gradient.full import FullGradient
from omnimem.tuning.gradient.horizon import HorizonGradient
from omnimem.tuning.gradient.released import GradientError, ReleasedGradient, by_similarity
from omnimem.tuning.gradient.states import StatesGradient

__all__ = ["FullGradient", "GradientError", "HorizonGradient", "ReleasedGradient", "StatesGradient", "by_similarity"]
