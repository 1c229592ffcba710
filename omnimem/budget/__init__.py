"""How many audio and visual tokens each layer may keep: audio-visual budget allocation (AVBA), exact to the slot.

Tables hold [audio, visual] per layer, as in the release. Signals are measured once per model (`omnimem.calibration`).
They determine the shares of layers and modalities, and the shares determine the slots for any memory size.
"""

from omnimem.budget.allocation import BudgetError, Shares, Slots
from omnimem.budget.options import AudioVisualBudget, BudgetOptions, ReleasedBudget, SharedBudget, SplitBudget, scaled
from omnimem.budget.signals import Readings, Signals
from omnimem.budget.table import Budget

__all__ = [
    "AudioVisualBudget",
    "Budget",
    "BudgetError",
    "BudgetOptions",
    "Readings",
    "ReleasedBudget",
    "SharedBudget",
    "Shares",
    "Signals",
    "Slots",
    "SplitBudget",
    "scaled",
]
