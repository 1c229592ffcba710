"""Selection of the tokens to keep: hard top-k per modality, and its softened forms for training."""

from omnimem.selection.choice import select
from omnimem.selection.layer_slots import LayerSlots, groups, taken
from omnimem.selection.softness import SelectionOptions, Softness, TemperatureOptions

__all__ = ["LayerSlots", "SelectionOptions", "Softness", "TemperatureOptions", "groups", "select", "taken"]
