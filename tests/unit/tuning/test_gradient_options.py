"""Gradient settings: what they build, what they change for the policy, and what means nothing together."""

from dataclasses import replace

import pytest
from support.streams import policy_of

from omnimem.config import ConfigError, load
from omnimem.errors import UserError
from omnimem.policies.base import Policy
from omnimem.selection import SelectionOptions, Softness
from omnimem.tokens import Tokens
from omnimem.tuning import (
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
    ],
)
def test_settings_say_how_far_gradient_reaches(options, built) -> None:
    assert gradient_of(options, 36) == built


PAPER = ("tuning.gradient=paper", "tuning.selection.softening=hard")


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["tuning.horizon=0"], "tuning.horizon", "horizon = 0"),
        (["tuning.gradient=state"], "tuning.gradient", "'state'"),
        (["tuning.gradient=states", "tuning.horizon=2"], "tuning.horizon", "horizon = 2"),
        (["tuning.stop_layer=2"], "tuning.stop_layer", "stop_layer = 2"),
        (["tuning.gradient=released", "tuning.stop_layer=0"], "tuning.stop_layer", "stop_layer = 0"),
        (["tuning.gradient=released"], "tuning.selection", "straight_through"),
        ([*PAPER, "memory.policy={name: distinct, per_head: true}"], "tuning.gradient", "policy distinct"),
        ([*PAPER, "memory.policy={name: recursive_uniform}"], "tuning.gradient", "policy recursive_uniform"),
        (["memory.policy={name: distinct}", "tuning.selection.gradient=both"], "tuning.selection.gradient", "both"),
    ],
)
def test_settings_that_mean_nothing_are_refused_in_one_line(overrides, key, value) -> None:
    with pytest.raises(ConfigError) as refused:
        load("tiny.yaml", overrides)
    (said,) = str(refused.value).splitlines()
    assert key in said
    assert value in said


@pytest.mark.parametrize("stop_layer", [4, 9])
def test_a_stop_layer_that_the_model_does_not_have_is_refused(stop_layer) -> None:
    options = TuningOptions(gradient="released", stop_layer=stop_layer, selection=HARD)
    with pytest.raises(GradientError, match=rf"^tuning.stop_layer = {stop_layer} must be from 1 to 3: the model has 4"):
        gradient_of(options, 4)
    assert issubclass(GradientError, UserError)  # exit code 2


class Whole(Policy):
    """A policy of another kind: it decides by itself what becomes of the pool."""

    def keep(self, layer: int, view: LayerView, softness: Softness | None = None) -> Tokens:
        return view.pool


@pytest.mark.parametrize("gradient", ["states", "paper"])
def test_a_policy_that_does_not_keep_tokens_as_they_came_is_refused(gradient) -> None:
    options = TuningOptions(gradient=gradient, selection=HARD)  # pyright: ignore[reportArgumentType]
    for policy in (Whole(name="whole", budget=None), replace(policy_of("omnimem"), per_head=True)):
        with pytest.raises(GradientError, match=rf"^tuning.gradient = {gradient} .* set it to full$"):
            described(options, policy, 4)
        assert policy_in_training(TuningOptions(), policy) is policy


@pytest.mark.parametrize("gradient", ["released", "paper"])
def test_modes_that_run_some_layers_alone_are_refused_with_selection_by_the_untuned_model(gradient) -> None:
    options = TuningOptions(gradient=gradient, selection=HARD)  # pyright: ignore[reportArgumentType]
    with pytest.raises(GradientError, match=rf"^tuning.gradient = {gradient} .*selection_from"):
        described(options, replace(policy_of("omnimem"), selection_from="base"), 4)


@pytest.mark.parametrize("name", ["omnimem", "random"])
def test_one_policy_in_training_and_evaluation_but_for_the_release(name) -> None:
    policy = policy_of(name)
    for gradient in ("full", "states", "paper"):
        options = TuningOptions(gradient=gradient, selection=HARD)  # pyright: ignore[reportArgumentType]
        assert policy_in_training(options, policy) is policy
    released = TuningOptions(gradient="released", selection=HARD)
    other = policy_in_training(released, policy)
    assert (other.name, other.budget, other.measures) == (policy.name, policy.budget, policy.measures)
    assert other.traits.needs_novelty
    assert described(TuningOptions(gradient="states"), policy, 4) == "the one used in evaluation"
    said = described(released, policy, 4)
    assert said.startswith(f"not the one used in evaluation ({name} in all 4 layers): chunks run layers 0 to 1")
    assert said.endswith("similarity alone")
