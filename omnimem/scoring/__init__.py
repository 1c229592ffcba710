"""Scorers: one frozen dataclass per method and file; tokens with the highest scores are kept."""

from omnimem.scoring.base import AbstractScorer
from omnimem.scoring.covered import Compared, Covered
from omnimem.scoring.key_difference import KeyDifference
from omnimem.scoring.perturbation import Perturbation
from omnimem.scoring.random import Random
from omnimem.scoring.recency import Recency
from omnimem.scoring.uniform import Uniform

__all__ = ["AbstractScorer", "Compared", "Covered", "KeyDifference", "Perturbation", "Random", "Recency", "Uniform"]
