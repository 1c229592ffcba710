"""The gradient of a micro-step, taken whole and then handed to the engine: all parameters, in one order on every rank.

ZeRO-1 and 2 lay the gradients that they add up over the ranks side by side in the order in which backward finishes
them, and trust that this order is the same everywhere. It is not: which chunk is the last to touch a projection hangs
on where questions were asked and what was evicted, and a rank whose samples all failed touches none. With one node
that returns all gradients at once the order is that of the parameters, and none is ever missing (ours).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor


def delivered(loss: Tensor, parameters: Sequence[Tensor], finish: Callable[[], None] | None = None) -> Tensor:
    """The same loss, whose backward gives every parameter its gradient: zeros where the loss does not know it.

    `finish` is called when the gradients are known.
    """
    return _Delivery.apply(_Held(loss, finish), *parameters)  # pyright: ignore[reportReturnType]


@final
@dataclass
class _Held:
    """Hides the loss from the outer graph, where every node of the stream would run once more."""

    loss: Tensor | None
    finish: Callable[[], None] | None


@final
class _Delivery(torch.autograd.Function):
    """Backward of the whole stream inside one node's, scaled by all that the engine does to the loss."""

    @staticmethod
    def forward(ctx: Any, held: _Held, *parameters: Tensor) -> Tensor:
        assert held.loss is not None
        ctx.held, ctx.parameters = held, parameters
        return held.loss.detach().clone()

    @staticmethod
    def backward(ctx: Any, *scale: Tensor) -> Any:
        loss, ctx.held.loss = ctx.held.loss, None  # its graph is freed as it is used
        if loss.requires_grad:
            found = torch.autograd.grad(loss, ctx.parameters, scale, allow_unused=True, materialize_grads=True)
        else:
            found = [torch.zeros_like(parameter) for parameter in ctx.parameters]
        if ctx.held.finish is not None:
            ctx.held.finish()
        return None, *found
