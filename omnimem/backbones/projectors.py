"""Projectors: the modules between an encoder and the text model. They may be trained in full beside an adapter.

While one is trained, the encoder alone runs once per stream, without gradient, and its output, the projector's input,
is stored and cached; the projector runs whenever the stream is cut into chunks, in the graph of the step.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Track = Literal["visual", "audio"]
TRACKS: tuple[Track, ...] = ("visual", "audio")


@final
@dataclass(frozen=True, kw_only=True)
class Projector:
    """The modules of one track by their paths in the model.

    `steps` run one after the other on the encoder's output; each of `levels` gives the features of one decoder layer
    (deepstack). `rows` rows of the encoder's output become one token.
    """

    steps: tuple[str, ...]
    levels: tuple[str, ...] = ()
    rows: int = 1

    @property
    def paths(self) -> tuple[str, ...]:
        """All modules, also those without weights."""
        return (*self.steps, *self.levels)

    def weighted(self, model: nn.Module) -> tuple[str, ...]:
        """The modules that have weights, which are what can be trained."""
        return tuple(path for path in self.paths if any(True for _ in model.get_submodule(path).parameters()))

    def trained(self, model: nn.Module) -> bool:
        """Whether an adapter has its own copy of one of the modules (peft's `modules_to_save`)."""
        return any(isinstance(model.get_submodule(path), ModulesToSaveWrapper) for path in self.paths)


@contextmanager
def left_out(model: nn.Module, projectors: Iterable[Projector]) -> Iterator[None]:
    """Inside, the modules of these projectors return their input, [rows x tokens, width] as [tokens, rows x width].

    What an encoder does with the tokens after its projector, such as sorting them, it then does with the input.
    """
    modules = {path: (model.get_submodule(path), each.rows) for each in projectors for path in each.paths}
    before = {path: vars(module).get("forward") for path, (module, _) in modules.items()}
    for module, rows in modules.values():
        module.forward = partial(_packed, rows)
    try:
        yield
    finally:
        for path, (module, _) in modules.items():
            del module.forward
            if (former := before[path]) is not None:
                module.forward = former


def _packed(rows: int, states: Tensor) -> Tensor:
    return states if rows == 1 else states.reshape(-1, rows * states.shape[-1])


def in_use(model: nn.Module, path: str, *, original: bool) -> nn.Module:
    """The module at a path: the adapter's copy of it, or with `original` the base model's."""
    module = model.get_submodule(path)
    if not isinstance(module, ModulesToSaveWrapper):
        return module
    active = module.active_adapters
    if original or module.disable_adapters or not active:
        return module.original_module
    return module.modules_to_save[active[0]]


def adapter_is_on(text_model: nn.Module) -> bool:
    """Whether the adapter of a text model takes part in a pass; true of a model without one."""
    layers = [module for module in text_model.modules() if isinstance(module, BaseTunerLayer)]
    return not layers or any(layer.active_adapters and not layer.disable_adapters for layer in layers)


def applied(
    modules: Sequence[Any], states: Float[Tensor, "batch tokens packed"], rows: int
) -> Float[Tensor, "batch tokens width"]:
    """The tokens of packed states, computed in the precision of the modules' weights; recomputed in backward."""

    def run(packed: Tensor) -> Tensor:
        for module in modules:
            packed = module(packed)
        return packed

    weights = [parameter for module in modules for parameter in module.parameters()]
    unpacked = states.reshape(-1, states.shape[-1] // rows).to(weights[0].dtype)
    if not (torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)):
        tokens = run(unpacked)
    else:
        tokens = checkpoint(run, unpacked, use_reentrant=False, preserve_rng_state=False)
    return tokens.unflatten(0, states.shape[:2])


def named(projectors: Mapping[Track, Projector], model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The modules with weights by the name of their projector in settings: `visual_projector`, `audio_projector`."""
    return {f"{track}_projector": each.weighted(model) for track, each in projectors.items()}
