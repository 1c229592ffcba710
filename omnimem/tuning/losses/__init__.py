"""Losses: each is a frozen dataclass in its own file and a field of `LossOptions`; a step minimises their sum."""

from omnimem.tuning.losses.answer import AnswerLoss, answer_losses
from omnimem.tuning.losses.base import AbstractLoss, Rows
from omnimem.tuning.losses.full_memory_kl import FullMemoryKL, kl_divergences
from omnimem.tuning.losses.options import LossOptions

__all__ = ["AbstractLoss", "AnswerLoss", "FullMemoryKL", "LossOptions", "Rows", "answer_losses", "kl_divergences"]
