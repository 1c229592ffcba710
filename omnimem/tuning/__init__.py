"""Tuning: what is trained, how far gradient flows, what is minimised, and at which budgets."""

from omnimem.tuning.gradient import FullGradient, Gradient, HorizonGradient
from omnimem.tuning.lora import (
    AdapterError,
    LoraOptions,
    StreamedModel,
    adapter_tensors,
    add_adapter,
    load_adapter,
    trainable,
)
from omnimem.tuning.losses import AbstractLoss, AnswerLoss, FullMemoryKL, LossOptions, Rows, answer_losses
from omnimem.tuning.plan import Plan, Step, TuningOptions
from omnimem.tuning.session import Outcome, streamed_loss

__all__ = [
    "AbstractLoss",
    "AdapterError",
    "AnswerLoss",
    "FullGradient",
    "FullMemoryKL",
    "Gradient",
    "HorizonGradient",
    "LoraOptions",
    "LossOptions",
    "Outcome",
    "Plan",
    "Rows",
    "Step",
    "StreamedModel",
    "TuningOptions",
    "adapter_tensors",
    "add_adapter",
    "answer_losses",
    "load_adapter",
    "streamed_loss",
    "trainable",
]
