"""ZeRO-3 for ranks that do different things: when one of them needs the weights of a layer, all of them gather it.

DeepSpeed gathers in module hooks, so every rank must run the same modules in the same order, forward and backward.
With streams they do not: streams differ in their chunks and questions, a batch may be divided into several streams, a
sample may fail or have no audio, and a teacher may read only some of the streams. Here the ranks all-reduce (max) the
index of the layer that they need next and gather that layer together; a rank that does not need it releases it and asks
again. A rank that needs nothing more asks for nothing and takes part until no rank asks. Ranks in step share each
gathering, and since no order is assumed, no rank can block the others (ours).

Partitioned are the frozen matrices of the decoder layers. Everything else (encoders, embeddings, head, norms, adapters)
is gathered for the whole micro-step.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omnimem.textfile import read_stored
from omnimem.training.collectives import highest
from omnimem.training.deepspeed_internals import gather, release, remove_gathering_hooks


def stage_of(section: Mapping[str, Any]) -> int | None:
    """The ZeRO stage in a section `train`; None without DeepSpeed."""
    settings = engine_settings(section)
    return settings.get("zero_optimization", {}).get("stage", 0) if settings else None


def engine_settings(section: Mapping[str, Any]) -> dict[str, Any] | None:
    """The DeepSpeed settings in a section `train`, read from their file; None without DeepSpeed."""
    settings = section.get("deepspeed")
    if isinstance(settings, str):
        return read_stored(Path(settings), dict[str, Any], "see configs/deepspeed")
    return settings or None


@final
class LayerGathering:
    """Gathers the weights of a model under ZeRO-3; at most one decoder layer is whole at a time."""

    def __init__(self, engine: Any, layers: Sequence[nn.Module]) -> None:
        """Replaces the hooks of DeepSpeed."""
        remove_gathering_hooks(engine)
        self.device: torch.device = engine.device
        self.layers: list[list[Tensor]] = []
        for number, layer in enumerate(layers):
            frozen = [part for part in layer.modules() if type(part) is nn.Linear and not part.weight.requires_grad]
            for part in frozen:
                part.forward = partial(_linear, self, number, part.weight, part.bias)  # pyright: ignore[reportAttributeAccessIssue]
            self.layers.append([part.weight for part in frozen])
        partitioned = {id(weight) for weights in self.layers for weight in weights}
        self.rest = [parameter for parameter in engine.module.parameters() if id(parameter) not in partitioned]
        self._held: int | None = None

    @contextmanager
    def micro_step(self) -> Iterator[None]:
        """Gathers everything but the decoder layers; collective."""
        for weights in self.layers:  # small weights are not partitioned by DeepSpeed yet
            release(weights)
        with whole(self.rest):
            yield

    def open(self, number: int) -> None:
        """Gather the weights of a layer, until the next call."""
        if self._held != number:
            self._drop()
            while self._agreed(number + 1) != number + 1:
                pass

    def settle(self) -> None:
        """Take part in the gatherings of the other ranks until every rank is here."""
        self._drop()
        while self._agreed(0):
            pass

    def _agreed(self, wish: int) -> int:
        """Gather the layer of the highest wish of all ranks (its index + 1; 0: none); other ranks release it again."""
        agreed = highest(wish, self.device)
        if agreed:
            gather(self.layers[agreed - 1])
            self._held = agreed - 1
            if agreed != wish:
                self._drop()
        return agreed

    def _drop(self) -> None:
        if self._held is not None:
            release(self.layers[self._held])
        self._held = None


@contextmanager
def whole(parameters: Sequence[Any], *, changed: bool = False) -> Iterator[None]:
    """Inside, partitioned parameters are whole; collective. `changed`: all ranks change them in the same way."""
    gather(parameters)
    try:
        yield
    finally:
        release(parameters, changed=changed)


def _linear(gathering: LayerGathering, number: int, weight: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    return _Linear.apply((gathering, number, weight, bias), inputs)  # pyright: ignore[reportReturnType]


@final
class _Linear(torch.autograd.Function):
    """x W^T + b with a frozen W, which is gathered in forward and in backward and never saved."""

    @staticmethod
    def forward(ctx: Any, layer: tuple[LayerGathering, int, Tensor, Tensor | None], inputs: Tensor) -> Tensor:
        gathering, number, weight, bias = ctx.layer = layer
        gathering.open(number)
        return F.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, Tensor]:
        gathering, number, weight, _ = ctx.layer
        gathering.open(number)
        return None, upstream[0] @ weight
