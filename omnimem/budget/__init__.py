"""How many audio and visual tokens each layer may keep: audio-visual budget allocation (AVBA), exact to the slot.

Tables are [audio, visual] a layer, as released. Signals are measured once per model (`omnimem.calibration`); from them
come shares of the whole memory, and from the shares the slots of a memory of any size.
"""

from omnimem.budget.allocation import BudgetError, Rounding, Shares, Slots
from omnimem.budget.options import AudioVisualBudget, BudgetOptions, SharedBudget, SplitBudget
from omnimem.budget.signals import Form, Readings, Signals
from omnimem.budget.table import UNLIMITED, Budget

__all__ = [
    "UNLIMITED",
    "AudioVisualBudget",
    "Budget",
    "BudgetError",
    "BudgetOptions",
    "Form",
    "Readings",
    "Rounding",
    "SharedBudget",
    "Shares",
    "Signals",
    "Slots",
    "SplitBudget",
]
