"""The memory inspector: what each layer still holds of one stream as it goes on, two policies side by side."""

from omnimem.inspection.page import Side, render
from omnimem.inspection.retention import Holding, Merged, RetentionLog, follow
from omnimem.inspection.snapshot import Grid, Mark, Sounds, StreamSnapshot, read

__all__ = [
    "Grid",
    "Holding",
    "Mark",
    "Merged",
    "RetentionLog",
    "Side",
    "Sounds",
    "StreamSnapshot",
    "follow",
    "read",
    "render",
]
