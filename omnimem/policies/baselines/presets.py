"""Presets of the rivals, named after their source: how options become settings, and what they do with a budget."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Literal, TypeVar

from omnimem.budget import Budget
from omnimem.budget.apportion import apportion

Preset = Literal["as_published", "shared_split"]
PresetWithRelease = Literal["as_published", "as_released", "shared_split"]  # of methods whose code does something else

Part = TypeVar("Part")


def settings(options: Any, presets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of the preset that `options` name, with those replaced that are given.

    `shared_split` is as published where it says nothing else.
    """
    given = {field.name: value for field in fields(options) if (value := getattr(options, field.name)) is not None}
    return {**presets["as_published"], **presets.get(options.preset, {}), **given}


def part(kind: type[Part], chosen: Mapping[str, Any]) -> Part:
    """The part of a method that these settings describe."""
    return kind(**{field.name: chosen[field.name] for field in fields(kind) if field.name in chosen})  # type: ignore[arg-type]


def allotted(budget: Budget | None, preset: str) -> Budget | None:
    """The budget as a preset uses it: as it is given, or as published, one pool of equal size in every layer.

    No rival knows audio: as published, audio and visual tokens compete for the same slots; with `shared_split` each
    modality and layer has what our audio-visual budget gives it. Both hold the same entries in all.
    """
    if budget is None or preset == "shared_split":
        return budget
    layers = budget.layers
    sizes = apportion([1.0] * layers, budget.total, [1] * layers, [budget.total] * layers)
    return replace(budget, slots=tuple((0, size) for size in sizes), split=False, shares=None, signals=None)
