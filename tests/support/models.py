"""Tiny random text models: real transformers classes, random weights, no network."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    Qwen2_5_VLTextConfig,
    Qwen2_5OmniTextConfig,
    Qwen3OmniMoeTextConfig,
    Qwen3VLTextConfig,
)
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniThinkerTextModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeThinkerTextModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from omnimem.tokens import Chunk, DeepStack, Modality

FAMILIES = ("qwen2_5_omni", "qwen2_5_vl", "qwen3_vl", "qwen3_omni", "llama")
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": None,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


def text_model(family: str, seed: int = 0, rope_parameters: dict[str, Any] | None = None) -> PreTrainedModel:
    """A random text model of one of the families, in evaluation mode; other RoPE for Qwen2.5-Omni alone."""
    torch.manual_seed(seed)
    if family == "qwen2_5_omni":
        model = Qwen2_5OmniThinkerTextModel._from_config(
            Qwen2_5OmniTextConfig(**SIZES, rope_parameters=dict(rope_parameters or ROPE))
        )
    elif family == "qwen2_5_vl":
        model = Qwen2_5_VLTextModel._from_config(Qwen2_5_VLTextConfig(**SIZES, rope_parameters=dict(ROPE)))
    elif family == "llama":  # plain text: positions have one axis
        model = LlamaModel._from_config(
            LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
        )
    elif family == "qwen3_vl":
        model = Qwen3VLTextModel._from_config(Qwen3VLTextConfig(**SIZES, head_dim=16, rope_parameters=dict(ROPE)))
    else:
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "decoder_sparse_step": 1}
        config = Qwen3OmniMoeTextConfig(**SIZES, **experts, head_dim=16, rope_parameters=dict(ROPE))
        model = Qwen3OmniMoeThinkerTextModel._from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)  # far from the near-linear regime of the default 0.02
    return model.eval().requires_grad_(False)


def one_layer(family: str = "qwen2_5_omni") -> PreTrainedModel:
    """The text model of a family with its first layer alone."""
    model: Any = text_model(family)
    model.layers, model.config.num_hidden_layers = model.layers[:1], 1
    return model


def whole_stream(count: int = 96, batch: int = 1, width: int = 64, seed: int = 1, levels: int = 0) -> Chunk:
    """A random stream of text, audio and visual tokens with 3-axis positions, as one chunk."""
    generator = torch.Generator().manual_seed(seed)
    modality = torch.tensor([0, 0, 0] + [2, 2, 2, 2, 1, 0] * count)[:count].to(torch.int8).expand(batch, count)
    time = torch.arange(count) // 2
    rows, columns = ((time - torch.arange(count) % step).clamp_min(0) for step in (3, 2))
    positions = torch.stack([time, rows, columns])  # time reaches furthest: models with one axis read it alone
    deepstack = None
    if levels:
        visual = int((modality == Modality.VISUAL).sum())
        features = tuple(torch.randn(visual, width, generator=generator) * 0.3 for _ in range(levels))
        deepstack = DeepStack(mask=modality == Modality.VISUAL, features=features)
    return Chunk(
        embeddings=torch.randn(batch, count, width, generator=generator),
        positions=positions[None].expand(batch, 3, count),
        modality=modality,
        deepstack=deepstack,
    )


def cut(whole: Chunk, lengths: list[int]) -> list[Chunk]:
    """The stream in chunks of these lengths; deepstack features are sliced with it (batch 1)."""
    chunks, first = [], 0
    for length in lengths:
        last = first + length
        modality = whole.modality[:, first:last]
        deepstack = None
        if whole.deepstack is not None:
            before = int((whole.modality[:, :first] == Modality.VISUAL).sum())
            until = before + int((modality == Modality.VISUAL).sum())
            features = tuple(level[before:until] for level in whole.deepstack.features)
            deepstack = DeepStack(mask=modality == Modality.VISUAL, features=features)
        embeddings, positions = whole.embeddings[:, first:last], whole.positions[:, :, first:last]
        chunks.append(Chunk(embeddings=embeddings, positions=positions, modality=modality, deepstack=deepstack))
        first = last
    return chunks


def row_of(part: Any, row: int) -> Any:
    """One stream of a batch: of a chunk without deepstack, or of a prompt."""
    return replace(part, **{n: t[row : row + 1] for n, t in vars(part).items() if isinstance(t, Tensor)})


def merged(chunks: Sequence[Chunk]) -> Chunk:
    """Streams of one layout as one batch, deepstack features one stream after the other."""
    stacks = [chunk.deepstack for chunk in chunks if chunk.deepstack is not None]
    deepstack = None
    if stacks:
        features = tuple(torch.cat(level) for level in zip(*(stack.features for stack in stacks), strict=True))
        deepstack = DeepStack(mask=torch.cat([stack.mask for stack in stacks]), features=features)
    parts = {n: torch.cat([getattr(c, n) for c in chunks]) for n in ("embeddings", "positions", "modality")}
    return Chunk(**parts, deepstack=deepstack)


def position_ids(model: PreTrainedModel, positions: Tensor) -> Tensor:
    """Positions [batch, axes, tokens] as the model takes them: axes first, or the first axis alone."""
    return positions[:, 0] if isinstance(model, LlamaModel) else positions.transpose(0, 1)


def one_shot(model: PreTrainedModel, whole: Chunk) -> Tensor:
    """Hidden states of the stock forward pass over the whole stream."""
    extra = {}
    if whole.deepstack is not None:
        extra = {"visual_pos_masks": whole.deepstack.mask, "deepstack_visual_embeds": list(whole.deepstack.features)}
    if isinstance(model, LlamaModel):  # without a mask, repeated positions would separate packed sequences
        extra = {"attention_mask": torch.ones(whole.modality.shape, dtype=torch.long)}
    places = position_ids(model, whole.positions)
    result = model(inputs_embeds=whole.embeddings, position_ids=places, use_cache=False, **extra)
    return result.last_hidden_state


def assert_equal_logits(got: Tensor, expected: Tensor) -> None:
    """Standard 1: max |difference| <= 1e-5 x max(1, max |value|) in float32."""
    bound = 1e-5 * max(1.0, float(expected.abs().max()))
    difference = float((got - expected).abs().max())
    assert difference <= bound, f"differs by {difference:.2e}, allowed {bound:.2e}"
