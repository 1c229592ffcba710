"""Loads named tensors into a module, all of them and nothing else."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from omnimem.pretrained.gguf import WeightsError

COUNTER = "num_batches_tracked"  # of batch normalisation; has no effect in evaluation


def load_exactly(module: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Copy the weights into the module and freeze it in evaluation mode.

    Raises WeightsError naming the first tensor of `path` that is missing, left over or of another shape.
    """
    expected = {name: each for name, each in module.state_dict().items() if not name.endswith(COUNTER)}
    for name in sorted(expected.keys() | weights.keys()):
        there, ours = (None if each is None else tuple(each.shape) for each in (weights.get(name), expected.get(name)))
        if there != ours:
            raise WeightsError(
                f"{path}: {name} has shape {there}, expected {ours}; install the package again (omnimem[real])"
            )
    module.load_state_dict(dict(weights), strict=False)
    module.eval().requires_grad_(False)
