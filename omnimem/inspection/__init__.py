"""The memory inspector: the tokens of one stream that each layer holds over time, under two policies side by side."""

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
