"""The memory inspector: what each layer still holds of one stream as it goes on, two policies side by side."""

from omnimem.inspection.ledger import Holding, Ledger, Merged, follow
from omnimem.inspection.page import Side, render
from omnimem.inspection.reading import Grid, Mark, Reading, Sounds, read

__all__ = ["Grid", "Holding", "Ledger", "Mark", "Merged", "Reading", "Side", "Sounds", "follow", "read", "render"]
