"""Presets of the baselines, named after their source: settings from options, and their use of the budget."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Literal, TypeVar

from omnimem.budget import Budget
from omnimem.budget.apportion import apportion

Preset = Literal["as_published", "shared_split"]
# of methods whose code differs from the paper
PresetWithRelease = Literal["as_published", "as_released", "shared_split"]

Part = TypeVar("Part")


def settings(options: Any, presets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of the preset of `options`, overridden by the options that are given.

    `shared_split` starts from `as_published`.
    """
    given = {field.name: value for field in fields(options) if (value := getattr(options, field.name)) is not None}
    return {**presets["as_published"], **presets.get(options.preset, {}), **given}


def part(kind: type[Part], chosen: Mapping[str, Any]) -> Part:
    """An instance of a class from the settings that are its fields."""
    return kind(**{field.name: chosen[field.name] for field in fields(kind) if field.name in chosen})  # type: ignore[arg-type]


def allotted(budget: Budget | None, preset: str) -> Budget | None:
    """The budget of a preset: with `shared_split` the given one, otherwise one pool of equal size in every layer.

    No baseline was published for audio: as published, audio and visual tokens compete for the same slots; with
    `shared_split` each modality and layer has its slots of our audio-visual budget. Both have the same total.
    """
    if budget is None or preset == "shared_split":
        return budget
    layers = budget.layers
    sizes = apportion([1.0] * layers, budget.total, [1] * layers, [budget.total] * layers)
    return replace(budget, slots=tuple((0, size) for size in sizes), split=False, shares=None, signals=None)
