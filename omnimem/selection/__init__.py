"""Which tokens of a pool stay: hard top-k per modality, and the temperature-softened forms of it used in training."""

from omnimem.selection.choice import Selected, select
from omnimem.selection.room import Room, taken
from omnimem.selection.softness import SelectionOptions, Softening, Softness, TemperatureOptions

__all__ = [
    "Room",
    "Selected",
    "SelectionOptions",
    "Softening",
    "Softness",
    "TemperatureOptions",
    "select",
    "taken",
]
