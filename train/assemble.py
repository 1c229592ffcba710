"""From a run's configuration to its parts: backbone, feeder, budgets, policies."""

from dataclasses import replace
from pathlib import Path

from omnimem.attach import Seam
from omnimem.backbones import Backbone
from omnimem.budget import Budget, BudgetError
from omnimem.config import RunConfig, exported
from omnimem.config.exported import Policies
from omnimem.feeding import Feeder
from omnimem.policy import ScoredPolicy
from omnimem.run import RunFolder
from train.calibrate import budget_settings, measured_budget, training_samples

CACHE = Path(".cache/encoded")


def feeder_of(run: RunConfig, backbone: Backbone) -> Feeder:
    """What turns samples into chunks; encoder outputs are kept on disk where `data.cache` says so."""
    return Feeder(backbone, run.stream, CACHE if run.data.cache else None)


def budget_of(run: RunConfig, seam: Seam, feeder: Feeder, folder: RunFolder) -> Budget:
    """The run's budget: its own file if it has one already, else measured or built, and written there.

    Raises BudgetError when the file was made for other settings than the run's.
    """
    if folder.budget.is_file():
        budget = Budget.read(folder.budget)
        made_for = budget.provenance.get("settings", budget_settings(run))
        if made_for != budget_settings(run):
            raise BudgetError(
                f"{folder.budget} was made for {made_for}, the run asks for {budget_settings(run)}; "
                "delete the file, or give the run another name"
            )
        _measured_under(run, budget, folder.budget)
        return budget
    if run.memory.budget.needs_signals:
        budget = measured_budget(run, seam, feeder, training_samples(run))
    else:
        built = run.memory.budget.build(seam.shape.layers, run.memory.slots_per_layer)
        budget = replace(built, provenance={**built.provenance, "settings": budget_settings(run)})
    budget.write(folder.budget)
    return budget


def _measured_under(run: RunConfig, budget: Budget, file: Path) -> None:
    """Raises BudgetError when the signals of a file were measured under another score than the run's own."""
    own, measured = run.memory.policy.build(None), budget.provenance.get("policy")
    if budget.signals is None or measured is None or not isinstance(own, ScoredPolicy) or own.per_head:
        return
    if measured != own.name:
        raise BudgetError(
            f"{file} was measured under policy {measured}, the run has {own.name}; "
            "delete the file, or give the run another name"
        )


def policies_of(run: RunConfig, budget: Budget) -> Policies:
    """The run's policy at any number of slots per layer; None: full memory."""
    return exported.policies_of(run.memory, budget)


def resized(run: RunConfig, budget: Budget, slots: int) -> Budget:
    """The same allocation at another number of slots per layer."""
    return exported.resized(run.memory, budget, slots)
