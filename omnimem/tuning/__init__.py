"""Tuning: adapters, the backpropagation mode through the stream, losses, and the budgets of each step."""

from omnimem.tuning.curriculum import BudgetRange, ChunkRange
from omnimem.tuning.gradient import (
    FullGradient,
    GradientError,
    HorizonGradient,
    ReleasedGradient,
    StatesGradient,
    by_similarity,
)
from omnimem.tuning.gradient.build import described, gradient_of, policy_in_training
from omnimem.tuning.lora import (
    AdapterError,
    LoraOptions,
    StreamedModel,
    adapter_tensors,
    add_adapter,
    check_start,
    load_adapter,
    require_base,
    start_adapter,
    trainable,
)
from omnimem.tuning.losses import AbstractLoss, AnswerLoss, FullMemoryKL, LossOptions, Rows, answer_losses
from omnimem.tuning.metrics import Pass, running_means, step_losses, step_metrics
from omnimem.tuning.overlap import SelectionOverlap
from omnimem.tuning.plan import Plan, Step, TuningOptions
from omnimem.tuning.session import Outcome, Score, streamed_loss, streamed_scores

__all__ = [
    "AbstractLoss",
    "AdapterError",
    "AnswerLoss",
    "BudgetRange",
    "ChunkRange",
    "FullGradient",
    "FullMemoryKL",
    "GradientError",
    "HorizonGradient",
    "LoraOptions",
    "LossOptions",
    "Outcome",
    "Pass",
    "Plan",
    "ReleasedGradient",
    "Rows",
    "Score",
    "SelectionOverlap",
    "StatesGradient",
    "Step",
    "StreamedModel",
    "TuningOptions",
    "adapter_tensors",
    "add_adapter",
    "answer_losses",
    "by_similarity",
    "check_start",
    "described",
    "gradient_of",
    "load_adapter",
    "policy_in_training",
    "require_base",
    "running_means",
    "start_adapter",
    "step_losses",
    "step_metrics",
    "streamed_loss",
    "streamed_scores",
    "trainable",
]
