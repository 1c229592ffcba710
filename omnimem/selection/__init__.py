"""Selection of the tokens to keep: hard top-k per modality, and its softened forms for training."""

from omnimem.selection.choice import Selected, select
from omnimem.selection.layer_slots import LayerSlots, taken
from omnimem.selection.softness import SelectionOptions, Softening, Softness, TemperatureOptions

__all__ = [
    "LayerSlots",
    "Selected",
    "SelectionOptions",
    "Softening",
    "Softness",
    "TemperatureOptions",
    "select",
    "taken",
]
