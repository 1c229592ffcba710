"""Gradient modes: what the memory carries through the graph, and how far gradient flows back; one a file."""

from omnimem.tuning.gradient.full import BackpropMode, FullGradient
from omnimem.tuning.gradient.horizon import HorizonGradient
from omnimem.tuning.gradient.released import GradientError, ReleasedGradient, by_similarity
from omnimem.tuning.gradient.states import StatesGradient

__all__ = [
    "BackpropMode",
    "FullGradient",
    "GradientError",
    "HorizonGradient",
    "ReleasedGradient",
    "StatesGradient",
    "by_similarity",
]
