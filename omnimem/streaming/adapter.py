"""The adapter of a text model: whether it takes part in a pass, and passes without it."""

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def adapter_layers(text_model: nn.Module) -> list[BaseTunerLayer]:
    """The modules in which an adapter changes the output now; empty without adapter, or where it is off.

    Raises ValueError when it is merged into the weights, so that there is nothing to switch off.
    """
    layers = [module for module in text_model.modules() if isinstance(module, BaseTunerLayer)]
    if any(layer.merged for layer in layers):
        raise ValueError("the adapter is merged into the weights of the model; call unmerge_adapter() first")
    return [layer for layer in layers if layer.active_adapters and not layer.disable_adapters]


@contextmanager
def without_adapter(text_model: nn.Module) -> Iterator[None]:
    """The model without its adapter inside the block; afterwards the same parameters are trainable as before.

    It may be entered between two passes of one graph: parameters of earlier passes keep their place in the graph.
    """
    layers = adapter_layers(text_model)
    trained = [
        (parameter, parameter.requires_grad)
        for layer in layers
        if isinstance(layer, nn.Module)
        for parameter in layer.parameters()
    ]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, wanted in trained:
            parameter.requires_grad_(wanted)
