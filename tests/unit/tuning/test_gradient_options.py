"""Gradient settings: what they build, what they change for the policy, and what means nothing together."""

from dataclasses import replace

import pytest
from support.streams import policy_of

from omnimem.cli.parser import USER_ERRORS
from omnimem.config import ConfigError, load
from omnimem.policies.base import Policy
from omnimem.selection import SelectionOptions, Softness
from omnimem.tokens import Tokens
from omnimem.tuning import (
    BackpropMode,
    FullGradient,
    GradientError,
    HorizonGradient,
    ReleasedGradient,
    StatesGradient,
    TuningOptions,
    described,
    gradient_of,
    policy_in_training,
)
from omnimem.view import LayerView

HARD = SelectionOptions(softening="hard")


@pytest.mark.parametrize(
    ("options", "built"),
    [
        (TuningOptions(), FullGradient()),
        (TuningOptions(recompute="none", offload=True), FullGradient(recompute=False, offload=True)),
        (TuningOptions(horizon=2), HorizonGradient(chunks=2)),
        (TuningOptions(gradient="states", offload=True), StatesGradient(question=FullGradient(offload=True))),
        (TuningOptions(gradient="released", selection=HARD), ReleasedGradient(stop_layer=18)),
        (
            TuningOptions(gradient="paper", stop_layer=5, selection=HARD),
            ReleasedGradient(stop_layer=5, whole_last_chunk=True),
        ),
    ],
)  # fmt: skip
def test_settings_say_how_far_gradient_reaches(options: TuningOptions, built: BackpropMode) -> None:
    assert gradient_of(options, 36) == built


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["tuning.horizon=0"], "tuning.horizon: horizon = 0 must be at least 1 chunk, or all"),
        (["tuning.horizon=some"], "tuning.horizon: expected a whole number or 'all', got 'some'; known: all"),
        (["tuning.gradient=state"], "tuning.gradient: expected 'full', 'states', 'released' or 'paper', got 'state'; "
         "did you mean 'states'?"),
        (["tuning.gradient=states", "tuning.horizon=2"], "tuning.horizon: horizon = 2 means nothing with "
         "gradient: states, which has a reach of its own; set horizon: all, or gradient: full"),
        (["tuning.stop_layer=2"], "tuning.stop_layer: stop_layer = 2 means nothing with gradient: full, whose "
         "chunks run all layers; leave it out, or set gradient: released"),
        (["tuning.gradient=released", "tuning.stop_layer=0"], "tuning.stop_layer: stop_layer = 0 must be at "
         "least 1: chunks run the layers below it"),
        (["tuning.gradient=released"], "tuning.selection: selection.softening = straight_through means nothing "
         "with gradient: released, whose selection does not learn; set it to hard"),
        (["tuning.gradient=paper", "tuning.selection.softening=hard", "memory.policy.per_head=true"],
         "paper carries tokens that one score chose for all heads, which policy distinct does not; set it to full"),
        (["tuning.gradient=paper", "tuning.selection.softening=hard", "memory.policy={name: snapkv}"],
         "paper carries tokens that one score chose for all heads, which policy snapkv does not; set it to full"),
        (["tuning.gradient=paper", "tuning.selection.softening=hard", "memory.policy={name: recursive_uniform}"],
         "paper carries tokens that one score chose for all heads, which policy recursive_uniform does not; "
         "set it to full"),
        (["tuning.selection.gradient=both"],
         "both means nothing with policy distinct, whose score measures no attention; set it to redundancy"),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused_in_one_line(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load("tiny.yaml", overrides)
    (said,) = str(refused.value).splitlines()
    assert said.endswith(line)


@pytest.mark.parametrize("stop_layer", [4, 9])
def test_a_stop_layer_that_the_model_does_not_have_is_refused(stop_layer: int) -> None:
    options = TuningOptions(gradient="released", stop_layer=stop_layer, selection=HARD)
    with pytest.raises(GradientError, match=rf"^tuning.stop_layer = {stop_layer} must be from 1 to 3: the model has 4"):
        gradient_of(options, 4)
    assert GradientError in USER_ERRORS  # exit code 2


class Whole(Policy):
    """A policy of another kind: it decides by itself what becomes of the pool."""

    def keep(self, layer: int, view: LayerView, softness: Softness | None = None) -> Tokens:
        return view.pool


@pytest.mark.parametrize("gradient", ["states", "paper"])
def test_a_policy_that_does_not_keep_tokens_as_they_came_is_refused(gradient: str) -> None:
    options = TuningOptions(gradient=gradient, selection=HARD)  # pyright: ignore[reportArgumentType]
    for policy in (Whole(name="whole", budget=None), replace(policy_of("omnimem"), per_head=True)):
        with pytest.raises(GradientError, match=rf"^tuning.gradient = {gradient} .* set it to full$"):
            described(options, policy, 4)
        assert policy_in_training(TuningOptions(), policy) is policy


@pytest.mark.parametrize("name", ["omnimem", "random"])
def test_one_policy_in_training_and_evaluation_but_for_the_release(name: str) -> None:
    policy = policy_of(name)
    for gradient in ("full", "states", "paper"):
        options = TuningOptions(gradient=gradient, selection=HARD)  # pyright: ignore[reportArgumentType]
        assert policy_in_training(options, policy) is policy
    released = TuningOptions(gradient="released", selection=HARD)
    other = policy_in_training(released, policy)
    assert (other.name, other.budget, other.measures) == (policy.name, policy.budget, policy.measures)
    assert other.needs_novelty
    assert described(TuningOptions(gradient="states"), policy, 4) == "the one used in evaluation"
    said = described(released, policy, 4)
    assert said.startswith(f"not the one used in evaluation ({name} in all 4 layers): chunks run layers 0 to 1")
    assert said.endswith("similarity alone")
