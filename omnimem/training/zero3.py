"""ZeRO-3 with ranks that do different things: when one of them needs a layer's weights, all of them gather it.

DeepSpeed gathers in the hooks of the modules, so every rank must pass the same modules in the same order, forward and
backward. Ours do not: streams differ in chunks and questions, a batch may fall into several streams, a sample may fail
or have no sound, a teacher may take one stream and not another. Here the ranks agree on each gathering: all say which
layer they want next, the highest wins, everybody gives their part of it, and who is not concerned drops it again and
asks once more. Who has done its share wants nothing and goes on giving until all have done theirs. Ranks that do the
same stay in step and each gathering serves all; no order of passes is assumed, so none can hang the others (ours).

Sharded are the frozen matrices of the decoder layers. All else (encoders, embeddings, head, norms, adapters) is whole
while a micro-step runs.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omnimem.training.collectives import highest


def stage_of(section: Mapping[str, Any]) -> int | None:
    """The ZeRO stage that a section `train` asks for; None: no DeepSpeed."""
    settings = section.get("deepspeed")
    if isinstance(settings, str):
        settings = json.loads(Path(settings).read_text(encoding="utf-8"))
    return settings.get("zero_optimization", {}).get("stage", 0) if settings else None


@final
class LayerGathering:
    """The weights of a model under ZeRO-3; at most one decoder layer is whole at a time."""

    def __init__(self, engine: Any, layers: Sequence[nn.Module]) -> None:
        """Takes over from DeepSpeed's own hooks."""
        engine.optimizer.parameter_offload.destroy()
        self.device: torch.device = engine.device
        self.layers: list[list[Tensor]] = []
        for number, layer in enumerate(layers):
            frozen = [part for part in layer.modules() if type(part) is nn.Linear and not part.weight.requires_grad]
            for part in frozen:
                part.forward = partial(_linear, self, number, part.weight, part.bias)  # pyright: ignore[reportAttributeAccessIssue]
            self.layers.append([part.weight for part in frozen])
        sharded = {id(weight) for weights in self.layers for weight in weights}
        self.rest = [parameter for parameter in engine.module.parameters() if id(parameter) not in sharded]
        self._held: int | None = None

    @contextmanager
    def micro_step(self) -> Iterator[None]:
        """Every rank is in it at the same time."""
        for weights in self.layers:  # DeepSpeed may have left small ones whole
            release(weights)
        with whole(self.rest):
            yield

    def open(self, number: int) -> None:
        """Until the next call the weights of a layer are whole."""
        if self._held != number:
            self._drop()
            while self._agreed(number + 1) != number + 1:
                pass

    def settle(self) -> None:
        """Give until every rank is here."""
        self._drop()
        while self._agreed(0):
            pass

    def _agreed(self, wish: int) -> int:
        """The highest wish of all ranks, granted; it is kept by those whose wish it was."""
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
    """Inside, parameters that ZeRO-3 has dealt out are whole; every rank enters it, and changes them alike or not."""
    gather(parameters)
    try:
        yield
    finally:
        release(parameters, changed=changed)


def gather(parameters: Sequence[Any]) -> None:
    """Every rank gives its part; `all_gather` is what DeepSpeed adds to a parameter that it has dealt out."""
    if parameters:
        parameters[0].all_gather(param_list=list(parameters))


def release(parameters: Sequence[Any], *, changed: bool = False) -> None:
    """Each rank keeps its part alone."""
    if parameters:
        parameters[0].partition(param_list=list(parameters), has_been_updated=changed)


def _linear(shards: LayerGathering, number: int, weight: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    return _Linear.apply((shards, number, weight, bias), inputs)  # pyright: ignore[reportReturnType]


@final
class _Linear(torch.autograd.Function):
    """x W^T + b with a frozen W that is asked for whenever it is needed, forward and backward, and never saved."""

    @staticmethod
    def forward(ctx: Any, layer: tuple[LayerGathering, int, Tensor, Tensor | None], inputs: Tensor) -> Tensor:
        shards, number, weight, bias = ctx.layer = layer
        shards.open(number)
        return F.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, Tensor]:
        shards, number, weight, _ = ctx.layer
        shards.open(number)
        return None, upstream[0] @ weight
