"""From a run's options to how far its gradient reaches, and what that changes for the policy."""

from omnimem.policies.base import Policy, ScoredPolicy
from omnimem.tuning.gradient import (
    BackpropMode,
    FullGradient,
    GradientError,
    HorizonGradient,
    ReleasedGradient,
    StatesGradient,
    by_similarity,
)
from omnimem.tuning.plan import TuningOptions

ONE_POLICY = "the one used in evaluation"


def gradient_of(options: TuningOptions, layers: int) -> BackpropMode:
    """How memories are carried in a run, for a model of so many layers.

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
    """The first layer that chunks do not run: half-way up where nothing is said, as the paper's 18 of 36."""
    stop = layers // 2 if options.stop_layer is None else options.stop_layer
    if not 0 < stop < layers:
        raise GradientError(f"tuning.stop_layer = {stop} must be from 1 to {layers - 1}: the model has {layers} layers")
    return stop


def policy_in_training(options: TuningOptions, policy: Policy) -> Policy:
    """The policy of evaluation itself, but for `gradient: released`, where similarity alone decides as in the release.

    Raises GradientError when the mode cannot carry what the policy keeps.
    """
    if options.gradient == "released":
        return by_similarity(policy)
    if options.gradient != "full" and (policy.per_head or not isinstance(policy, ScoredPolicy)):
        raise GradientError(
            f"tuning.gradient = {options.gradient} carries tokens as they came, one choice for all heads, and "
            f"policy {policy.name} does not; set it to full"
        )
    return policy


def described(options: TuningOptions, policy: Policy, layers: int) -> str:
    """What the policy in training is, for run.json: anything but ONE_POLICY is a departure that must be said.

    Raises GradientError as `policy_in_training`.
    """
    policy_in_training(options, policy)
    if options.gradient not in ("released", "paper"):
        return ONE_POLICY
    stop = stop_layer_of(options, layers)
    score = "similarity alone" if options.gradient == "released" else f"{policy.name} (at layer {stop}: similarity)"
    return (
        f"not {ONE_POLICY} ({policy.name} in all {layers} layers): chunks run layers 0 to {stop - 1}, what layer "
        f"{stop} keeps of its inputs stands for the past from there on, the score is {score}"
    )
