"""The one place that hooks into transformers' attention: `with attach(text_model) as attached`.

An attention function is registered under a name without a mask function, so transformers builds no mask and each
layer may have its own number of keys. The layer step of a pass travels as a keyword through the decoder layers; a
pre-hook on each adds the layer's number and its input, the residual stream. Nothing is kept between calls and no
attribute remains on a module, so a layer that is recomputed in backward gets the same inputs as in forward.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, cast, final, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel

from omnimem.memory import Shape
from omnimem.streaming.supported import (
    DirectCallError,
    UnsupportedModelError,
    require_all,
    require_plain,
    require_rotation,
    require_supported,
)
from omnimem.tokens import DeepStack

NAME = "omnimem"
KEYWORD = "omnimem_layer"


@runtime_checkable
class LayerStep(Protocol):
    """The attention of a layer: a function of the layer's input and projections that returns the attention output.

    `memory` are the layer's flat tensors, as given to `StreamedAttention.run`; a step that is recomputed in backward
    holds no memory itself.
    """

    def __call__(
        self,
        layer: int,
        states: Float[Tensor, "batch queries width"],
        queries: Float[Tensor, "batch heads queries dim"],
        keys: Float[Tensor, "batch kv_heads queries dim"],
        values: Float[Tensor, "batch kv_heads queries dim"],
        scale: float,
        *memory: Tensor,
    ) -> Float[Tensor, "batch heads queries dim"]: ...


@final
@dataclass(frozen=True)
class _Layer:
    """The keyword that reaches the attention function; the pre-hook of each layer fills in number and states."""

    step: LayerStep
    memories: dict[int, tuple[Tensor, ...]]  # by layer
    number: int = -1
    states: Tensor | None = None
    called: set[int] = field(default_factory=set)  # layers that have reached the attention function in this pass


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: [batch, heads, queries, dim] in, [batch, queries, heads, dim] out."""
    layer: _Layer | None = kwargs.get(KEYWORD)
    if layer is None or layer.states is None:
        raise DirectCallError(
            "the text model is attached to a stream; call it through StreamedAttention.run, not directly"
        )
    where = f"layer {layer.number} ({type(module).__name__})"
    if layer.number in layer.called:
        raise UnsupportedModelError(f"{where} calls attention twice in one pass; a memory needs one call per layer")
    others = {name: given for name, given in kwargs.items() if name != KEYWORD}
    require_plain(where, layer.states, key, value, attention_mask, others)
    layer.called.add(layer.number)
    memory = layer.memories.get(layer.number, ())
    output = layer.step(layer.number, layer.states, query, key, value, scaling, *memory)
    return output.transpose(1, 2).contiguous(), None


@final
class _Projection:
    """A layer step without attention that notes queries, keys and values."""

    def __init__(self) -> None:
        self._found: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(
        self, layer: int, states: Tensor, queries: Tensor, keys: Tensor, values: Tensor, scale: float, *memory: Tensor
    ) -> Tensor:
        self._found = queries, keys, values
        return queries

    def found(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values."""
        assert self._found is not None, "every attention module calls the attention function"
        return self._found


@final
class StreamedAttention:
    """A text model whose layers read and write an OmniMem memory."""

    def __init__(self, text_model: PreTrainedModel, recompute_layers: bool = False) -> None:
        self.text_model, self.recompute_layers = text_model, recompute_layers
        self.shape = shape_of(text_model)
        self.axes = axes_of(text_model)
        self._rotates = False  # known to be so

    def run(
        self,
        step: LayerStep,
        embeddings: Float[Tensor, "batch queries width"],
        positions: Int[Tensor, "batch axes queries"],
        deepstack: DeepStack | None = None,
        memories: Sequence[tuple[Tensor, ...]] = (),
    ) -> Float[Tensor, "batch queries width"]:
        """Final hidden states of one pass in which every layer's attention is `step`, given the layer's memory."""
        given = _Layer(step, dict(enumerate(memories)))
        extra: dict[str, Any] = {KEYWORD: given}
        if deepstack is not None:
            extra |= {"visual_pos_masks": deepstack.mask, "deepstack_visual_embeds": list(deepstack.features)}
        try:
            with self._recomputing():
                result = self.text_model(
                    inputs_embeds=embeddings,
                    position_ids=self._ids(positions.transpose(0, 1)),
                    use_cache=False,
                    **extra,
                )
        except DirectCallError as error:
            kind = type(self.text_model).__name__
            raise UnsupportedModelError(f"{kind}: its decoder layers do not pass keywords on to attention") from error
        require_all(self.text_model, given.called)
        return result.last_hidden_state

    def layers(
        self,
        step: LayerStep,
        states: Float[Tensor, "batch queries width"],
        positions: Int[Tensor, "batch axes queries"],
        deepstack: DeepStack | None,
        memories: Mapping[int, tuple[Tensor, ...]],
    ) -> Float[Tensor, "batch queries width"]:
        """Output of consecutive layers alone, those with an entry in `memories`, computed as in a whole pass."""
        model: Any = self.text_model
        given = _Layer(step, dict(memories))
        extra: dict[str, Any] = {"past_key_values": None, "position_ids": None, KEYWORD: given}
        rotary = model.rotary_emb(states, self._ids(positions.transpose(0, 1)))
        with self._recomputing():
            for number in memories:
                states = model.layers[number](states, attention_mask=None, position_embeddings=rotary, **extra)
                if deepstack is not None and number < len(deepstack.features):
                    added = deepstack.features[number].to(states.dtype)
                    states = states.index_put((deepstack.mask,), added, accumulate=True)
        return states

    def project(
        self, layer: int, states: Float[Tensor, "batch tokens width"], positions: Int[Tensor, "batch axes tokens"]
    ) -> tuple[
        Float[Tensor, "batch heads tokens dim"],
        Float[Tensor, "batch kv_heads tokens dim"],
        Float[Tensor, "batch kv_heads tokens dim"],
    ]:
        """Queries, keys (both after RoPE) and values that a layer computes from these inputs, with its own modules.

        The layer's whole attention module runs, so that no model family is a special case; its output is unused. The
        random generators are restored afterwards, so that later dropout masks do not change.
        """
        model: Any = self.text_model
        decoder, step = model.layers[layer], _Projection()
        if not hasattr(decoder, "input_layernorm"):
            raise UnsupportedModelError(
                f"{type(decoder).__name__} has no input_layernorm, so keys cannot be computed from its input; use"
                " stream.positions: original and policies without probes and re-indexing"
            )
        with torch.random.fork_rng(devices=[states.device] if states.is_cuda else []):
            decoder.self_attn(
                hidden_states=decoder.input_layernorm(states),
                position_embeddings=model.rotary_emb(states, self._ids(positions.transpose(0, 1))),
                attention_mask=None,
                **{KEYWORD: _Layer(step, {}, layer, states)},
            )
        return step.found()

    def _recomputing(self) -> AbstractContextManager[None]:
        """Decoder layers in training mode, which their checkpointing requires, where they are recomputed."""
        if not (self.recompute_layers and torch.is_grad_enabled()):
            return nullcontext()
        return _in_training(list(cast(Any, self.text_model).layers))

    def embed(self, ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens width"]:
        """Embeddings of token ids."""
        return self.text_model.get_input_embeddings()(ids)

    def rotary(self, positions: Int[Tensor, "axes batch tokens"]) -> tuple[Tensor, Tensor]:
        """cos and sin of a rotation by `positions`, axes merged, [batch, tokens, dim].

        Those of the model's rotary embedding without its scaling of attention (YaRN), which keys have once already.
        Raises UnsupportedModelError when keys of the model do not rotate so.
        """
        if not self._rotates:
            self._rotates = True
            require_rotation(self)
        like = torch.zeros(1, dtype=torch.float32, device=positions.device)
        rotary = cast(Any, self.text_model).rotary_emb
        cos, sin = rotary(like, self._ids(positions))
        scaling = getattr(rotary, "attention_scaling", 1.0)
        return (cos, sin) if scaling == 1.0 else (cos / scaling, sin / scaling)

    def _ids(self, positions: Int[Tensor, "axes batch tokens"]) -> Tensor:
        """Positions as the model takes them: all axes, or the time of a model of plain text."""
        return positions if self.axes == 3 else positions[0]


@contextmanager
def _in_training(layers: list[Any]) -> Iterator[None]:
    """The layers in training mode; their submodules keep their own mode."""
    modes = [layer.training for layer in layers]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.training = mode


def _layer_hook(number: int) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]] | None]:
    """Pre-hook of decoder layer `number`: adds the number and the layer's input to the keyword."""

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        layer: _Layer | None = kwargs.get(KEYWORD)
        if layer is None:
            return None
        states = args[0] if args else kwargs["hidden_states"]
        return args, {**kwargs, KEYWORD: replace(layer, number=number, states=states)}

    return hook


def _recompute(number: int, layer_forward: partial, states: Tensor, *rest: Any) -> Any:
    """Decoder layer `number` under torch's checkpoint, with every tensor that it reads as an argument.

    A tensor in a closure escapes the hooks on saved tensors: inside a recomputed chunk it would stay until the end of
    backward, for every layer of every chunk.
    """
    # 1. take the layer step out of the keywords; its closure holds the number of memory tensors, not the tensors
    keywords = dict(layer_forward.keywords)
    layer: _Layer = keywords.pop(KEYWORD)
    step, called, inner, fixed = layer.step, layer.called, layer_forward.func, layer_forward.args
    memory = layer.memories.get(number, ())
    held = len(memory)
    # 2. separate the tensors among the other arguments from the rest
    leaves, structure = tree_flatten((rest, keywords))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    plain = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    # 3. the layer as a function of tensors alone
    def again(states: Tensor, *tensors: Tensor) -> Any:
        values = list(plain)
        for place, tensor in zip(places, tensors[held:], strict=True):
            values[place] = tensor
        others, named = tree_unflatten(values, structure)
        given = _Layer(step, {number: tensors[:held]}, number, states)  # with a set of its own: it may run again
        result = inner(*fixed, states, *others, **named, **{KEYWORD: given})
        called.update(given.called)
        return result

    return checkpoint(again, states, *memory, *(leaves[place] for place in places), use_reentrant=False)


def axes_of(text_model: PreTrainedModel) -> int:
    """Axes of the model's positions: 3 (time, height, width), or 1 of a language model of plain text.

    The rotary embedding itself decides: the axes may be missing in a config whose class has a default for them.
    """
    rotary, device = cast(Any, text_model).rotary_emb, text_model.device
    positions = torch.zeros(3, 2, 1, dtype=torch.long, device=device)
    try:
        cos, _ = rotary(torch.zeros(1, device=device), positions)
    except RuntimeError:  # batch and axis of the positions do not agree
        return 1
    return 3 if cos.shape[:-1] == (2, 1) else 1


def shape_of(text_model: PreTrainedModel) -> Shape:
    """Sizes of the memory of a text model; the redundancy feature is the layer input unless a policy projects it."""
    config: Any = text_model.config
    dim = config.head_dim if "head_dim" in config.to_dict() else None
    return Shape(
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        dim=dim or config.hidden_size // config.num_attention_heads,
        width=config.hidden_size,
        feature=config.hidden_size,
        dtype=text_model.dtype,
        device=text_model.device,
    )


@contextmanager
def attach(text_model: PreTrainedModel, *, recompute_layers: bool = False) -> Iterator[StreamedAttention]:
    """The text model with our attention inside the block; its implementation and hooks are restored after it.

    With `recompute_layers`, activations of one layer at a time live in backward, at the cost of one more forward.
    Raises UnsupportedModelError for a model with layers that a memory cannot serve ([supported.py](supported.py)).
    """
    require_supported(text_model)
    # 1. register the attention function and hook every decoder layer
    before = text_model.config._attn_implementation or "sdpa"
    AttentionInterface.register(NAME, _attention)
    attached, decoder = StreamedAttention(text_model, recompute_layers), cast(Any, text_model)
    handles: list[Any] = []
    try:
        text_model.set_attn_implementation(NAME)
        for number, layer in enumerate(decoder.layers):
            handles.append(layer.register_forward_pre_hook(_layer_hook(number), with_kwargs=True))
            if recompute_layers:
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = partial(_recompute, number)
        yield attached
    # 2. restore the model
    finally:
        for handle in handles:
            handle.remove()
        for layer in decoder.layers if recompute_layers else ():
            del layer.gradient_checkpointing, layer._gradient_checkpointing_func
        text_model.set_attn_implementation(before)
