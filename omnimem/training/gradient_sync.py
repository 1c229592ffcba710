"""One backward node for the whole stream, so that every rank hands the same gradients over in the same order.

ZeRO-1 and 2 flatten the gradients that they reduce in the order in which backward produces them, and assume that this
order is the same on every rank. With streams it is not: which chunk uses a projection last depends on where questions
were asked and on what was evicted, and a rank whose samples all failed uses none. With one autograd node that returns
all gradients at once, the order is the order of the parameters and no gradient is ever missing (ours).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor


def whole_gradient(loss: Tensor, parameters: Sequence[Tensor], finish: Callable[[], None] | None = None) -> Tensor:
    """The same loss; its backward returns a gradient for every parameter, zeros where the loss does not depend on it.

    `finish` is called when the gradients have been computed.
    """
    return _StreamBackward.apply(_Hidden(loss, finish), *parameters)  # pyright: ignore[reportReturnType]


@final
@dataclass
class _Hidden:
    """Hides the loss from the outer graph, which would otherwise run every node of the stream a second time."""

    loss: Tensor | None
    finish: Callable[[], None] | None


@final
class _StreamBackward(torch.autograd.Function):
    """Runs the backward pass of the stream inside one node, with the upstream gradient as its scale."""

    @staticmethod
    def forward(ctx: Any, hidden: _Hidden, *parameters: Tensor) -> Tensor:
        assert hidden.loss is not None
        ctx.hidden, ctx.parameters = hidden, parameters
        return hidden.loss.detach().clone()

    @staticmethod
    def backward(ctx: Any, *scale: Tensor) -> Any:
        loss, ctx.hidden.loss = ctx.hidden.loss, None  # the graph is freed while it is used
        if loss.requires_grad:
            found = torch.autograd.grad(loss, ctx.parameters, scale, allow_unused=True, materialize_grads=True)
        else:
            found = [torch.zeros_like(parameter) for parameter in ctx.parameters]
        if ctx.hidden.finish is not None:
            ctx.hidden.finish()
        return None, *found
