"""Which text models a memory serves: what the attention hook cannot give is refused by name, never computed wrongly."""

from collections.abc import Mapping
from typing import Any, Final, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from omnimem.errors import UserError, counted
from omnimem.positions import rotate

# what decoder layers send with a call and the attention of a stream does not need: its masks and positions are its own
UNUSED: Final = frozenset({"cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "deterministic", "max_length_k"}) | {
    "max_length_q",
    "output_attentions",
    "output_hidden_states",
    "position_ids",
    "return_dict",
    "use_cache",
}
MEANINGS: Final = {
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a bias by position",
    "sliding_window": "a sliding window",
    "softcap": "capped attention logits",
    "indices": "attention to chosen tokens only",
    "block_indices": "attention to chosen tokens only",
}
GROWING: Final = ("dynamic", "longrope")  # rotary embeddings whose frequencies depend on the length read so far


class UnsupportedModelError(UserError):
    """A text model has layers that do not attend to whatever keys they are given."""


class DirectCallError(RuntimeError):
    """The attention function of a stream was called without the step of a pass."""


def _refused(text_model: PreTrainedModel, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(text_model).__name__}: {what}; a memory needs decoder layers that all attend to any keys they are given"
        " (docs/adding_a_model.md, 'The text model')"
    )


def require_supported(text_model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError for a model whose layers, config or rotary embedding rule out a memory (ours)."""
    # 1. the decoder: numbered layers with one attention module each, and one rotary embedding
    layers = getattr(text_model, "layers", None)
    if layers is None or not hasattr(text_model, "rotary_emb"):
        missing = "layers" if layers is None else "rotary_emb"
        raise _refused(text_model, f"it has no attribute {missing!r}; give the text decoder itself")
    without = [number for number, layer in enumerate(layers) if not hasattr(layer, "self_attn")]
    if without or not len(layers):
        kind = type(layers[without[0]]).__name__ if without else "there are none"
        raise _refused(text_model, f"layers {_listed(without)} ({kind}) have no self_attn")
    # 2. the kinds of layers that the config names
    config: Any = text_model.config
    kinds = getattr(config, "layer_types", None) or ()
    other = {kind: [n for n, found in enumerate(kinds) if found == kind] for kind in kinds if kind != "full_attention"}
    for kind, numbers in other.items():
        raise _refused(text_model, f"layers {_listed(numbers)} are of the kind {kind!r}")
    # 3. attention in both directions
    both = [number for number, layer in enumerate(layers) if getattr(layer.self_attn, "is_causal", True) is False]
    if both:
        raise _refused(text_model, f"layers {_listed(both)} attend to later tokens too")
    # 4. keys are kept after RoPE: its frequencies must not change
    rope = getattr(text_model.rotary_emb, "rope_type", None)
    for found in rope.values() if isinstance(rope, Mapping) else (rope,):
        if found in GROWING:
            raise _refused(text_model, f"its rotary embedding ({found!r}) changes its frequencies as a stream grows")


def require_plain(
    where: str, states: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, keywords: Mapping[str, Any]
) -> None:
    """Raise UnsupportedModelError if a layer asks its attention function for more than attention to all keys (ours)."""
    if states.ndim != 3:
        raise UnsupportedModelError(
            f"{where} has {counted(states.ndim - 2, 'residual stream')}; a memory needs layers with one"
        )
    if key.shape != value.shape:
        raise UnsupportedModelError(
            f"{where} has keys of {key.shape[-1]} and values of {counted(value.shape[-1], 'number')} per head; a "
            "memory needs equal sizes"
        )
    if mask is not None:
        raise _refused_call(where, "attention_mask", "a mask of its own")
    for name, setting in keywords.items():
        if setting is None or name in UNUSED or (name == "is_causal" and setting is True):
            continue
        if name == "dropout":
            if setting:
                raise UnsupportedModelError(
                    f"{where} has attention_dropout {setting}, and attention over a memory has no dropout; set"
                    ' "attention_dropout": 0.0 in config.json (LoRA has a dropout of its own)'
                )
            continue
        raise _refused_call(where, name, MEANINGS.get(name, "unknown to the attention of a stream"))


def _refused_call(where: str, name: str, meaning: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{where} uses {name} ({meaning}), which the attention over a memory does not have; this model is not supported"
        " (docs/adding_a_model.md, 'The text model')"
    )


def require_all(text_model: PreTrainedModel, called: set[int]) -> None:
    """Raise UnsupportedModelError if some layers of a pass never called the attention function (ours)."""
    layers: list[Any] = list(cast(Any, text_model).layers)
    silent = [number for number in range(len(layers)) if number not in called]
    if silent:
        kind = type(layers[silent[0]].self_attn).__name__
        raise _refused(text_model, f"layers {_listed(silent)} ({kind}) do not use transformers' attention interface")


def require_rotation(attached: Any) -> None:
    """Raise UnsupportedModelError if a key at another position is not the key rotated by the difference (ours).

    k(p) = rotate(k(0), p) in every layer is what re-indexing and compaction rely on. Layers without RoPE, interleaved
    pairs and a rotary embedding of a part of each head are found by it. Parameters sharded by ZeRO-3 are not examined.
    """
    model: Any = attached.text_model
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return
    width, device = attached.shape.width, attached.shape.device
    states = torch.cos(torch.arange(width, dtype=torch.float32, device=device))[None, None].to(attached.shape.dtype)
    start = torch.zeros(1, attached.axes, 1, dtype=torch.long, device=device)
    bound = 1e-4 if states.dtype == torch.float32 else 3e-2
    wrong: list[int] = []
    with torch.no_grad():
        cos, sin = attached.rotary((start + 97).transpose(0, 1))
        for number in range(attached.shape.layers):
            _, before, _ = attached.project(number, states, start)
            _, after, _ = attached.project(number, states, start + 97)
            found = rotate(before.float(), cos, sin) if before.shape[-1] == cos.shape[-1] else after.float() + torch.inf
            if not bool((found - after.float()).abs().max() <= bound * after.float().abs().max().clamp_min(1e-6)):
                wrong.append(number)
    if wrong:
        raise UnsupportedModelError(
            f"{type(model).__name__}: keys of layers {_listed(wrong)} do not move with their positions as rotate_half"
            " does it, so kept tokens cannot be moved; use stream.positions: original and policies without re-indexing"
        )


def _listed(numbers: list[int]) -> str:
    """The first of them, and how many more."""
    shown = ", ".join(map(str, numbers[:6]))
    return shown if len(numbers) <= 6 else f"{shown} and {len(numbers) - 6} more"
