"""Curves of the report: drift of selection and validation, where they were measured."""

from typing import Any

import pytest

from omnimem.comparison.load import Run
from omnimem.comparison.report_cost import training


def line(step: int, share: float | None) -> dict[str, Any]:
    found: dict[str, Any] = {"step": step, "loss": 1.0, "slots": 8.0}
    return found if share is None else {**found, "selection_overlap": {"mean": share, "layer_0": 0.0}}


@pytest.mark.parametrize(
    ("shares", "drawn", "last"),
    [([None, 0.9, None, 0.75], True, "75.0"), ([None, 0.9], False, "90.0"), ([None, None], False, None)],
)
def test_the_mean_is_drawn_over_the_measured_steps_and_the_last_one_is_named(shares, drawn, last) -> None:
    metrics = tuple(line(step, share) for step, share in enumerate(shares, start=1))
    view = training(Run(name="x", budget=None, metrics=metrics))
    assert view["overlap_last"] == last
    assert (view["overlap"] is not None) == drawn
    if drawn:
        assert "Tokens that x and the untuned model both keep, by step" in view["overlap"]


def test_a_validation_is_drawn_at_the_budget_and_with_full_memory() -> None:
    found = [{"loss": 2.0 / step, "full_loss": 1.0 / step, "accuracy": 0.5, "full_accuracy": None} for step in (1, 2)]
    metrics = tuple({**line(step, None), "validation": each} for step, each in enumerate(found, start=1))
    loss, accuracy = training(Run(name="x", budget=None, metrics=metrics))["validation"]
    assert "Validation of x: loss by step" in loss["figure"]
    assert [(str(one["figure"]).count("<polyline"), len(one["legend"])) for one in (loss, accuracy)] == [(4, 2), (2, 1)]
    assert training(Run(name="x", budget=None, metrics=(line(1, None),)))["validation"] == []
