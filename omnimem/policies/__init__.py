"""Policies by name: presets of OmniMem, and the controls it must beat."""

from omnimem.policies.controls import ControlOptions
from omnimem.policies.perturbation import PerturbationOptions

PolicyOptions = PerturbationOptions | ControlOptions

__all__ = ["ControlOptions", "PerturbationOptions", "PolicyOptions"]
