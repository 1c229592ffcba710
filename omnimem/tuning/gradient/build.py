"""Gradient mode and training policy of a run, from its options."""

from omnimem.errors import counted
from omnimem.policies.base import Policy
from omnimem.streaming.chunk_pass import MemoryStep
from omnimem.tuning.gradient import (
    FullGradient,
    GradientError,
    HorizonGradient,
    ReleasedGradient,
    StatesGradient,
    by_similarity,
)
from omnimem.tuning.gradient.options import HALF_WAY
from omnimem.tuning.plan import TuningOptions

ONE_POLICY = "the one used in evaluation"


def gradient_of(options: TuningOptions, layers: int) -> MemoryStep:
    """The gradient mode of a run, for a model of so many layers.

    Raises GradientError when the model has no layer above `stop_layer`.
    """
    each = FullGradient(offload=options.offload, recompute=options.recompute != "none")
    if options.gradient == "states":
        return StatesGradient(question=each)
    if options.gradient == "full":
        return each if options.horizon == "all" else HorizonGradient(chunks=options.horizon, each=each)
    stop = stop_layer_of(options, layers)
    return ReleasedGradient(stop_layer=stop, whole_last_chunk=options.gradient == "paper", each=each)


def stop_layer_of(options: TuningOptions, layers: int) -> int:
    """The first layer that chunks do not run; by default the middle one, as the paper's 18 of 36."""
    stop = layers // 2 if options.stop_layer is None else options.stop_layer
    if not 0 < stop < layers:
        raise GradientError(
            f"tuning.stop_layer = {stop} must be from 1 to {layers - 1}: the model has {counted(layers, 'layer')}"
        )
    return stop


def policy_in_training(options: TuningOptions, policy: Policy) -> Policy:
    """The policy of evaluation, or with `gradient: released` similarity alone, as in the release.

    Raises GradientError when the policy does not support the mode.
    """
    if options.gradient in HALF_WAY and policy.selection_from == "base":
        raise GradientError(
            f"tuning.gradient = {options.gradient} runs some layers alone, and memory.selection_from = base needs "
            "every chunk read by all layers; set it to full or states, or selection_from to tuned"
        )
    if options.gradient == "released":
        return by_similarity(policy)
    if not policy.supports(options.gradient):
        raise GradientError(
            f"tuning.gradient = {options.gradient} needs one score per token that holds for all heads, and "
            f"policy {policy.name} has none; set it to full"
        )
    return policy


def described(options: TuningOptions, policy: Policy, layers: int) -> str:
    """The policy in training in words, for run.json: ONE_POLICY, or how it differs from evaluation.

    Raises GradientError as `policy_in_training`.
    """
    policy_in_training(options, policy)
    if options.gradient not in ("released", "paper"):
        return ONE_POLICY
    stop = stop_layer_of(options, layers)
    score = "similarity alone" if options.gradient == "released" else f"{policy.name} (at layer {stop}: similarity)"
    return (
        f"not {ONE_POLICY} ({policy.name} in all {counted(layers, 'layer')}): chunks run layers 0 to {stop - 1}, what "
        f"layer {stop} keeps of its inputs stands for the past from there on, the score is {score}"
    )
