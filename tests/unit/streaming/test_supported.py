"""Text models that a memory does not serve are refused in one line; those that pass equal the one-shot forward pass."""

from typing import Any

import pytest
import torch
import transformers
from support.models import ROPE, assert_equal_logits, text_model
from support.text_models import causal_model, tokenizer
from torch import Tensor

from omnimem.attention.blocked import attend
from omnimem.backbones.base import LayoutError
from omnimem.backbones.text import TextModel
from omnimem.policies import PerturbationOptions
from omnimem.positions import rotate
from omnimem.streaming.attach import StreamedAttention, attach
from omnimem.streaming.stream import Stream
from omnimem.streaming.supported import UnsupportedModelError
from omnimem.tokens import Chunk

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FULL = {"layer_types": ["full_attention"] * 4}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
REFUSED = {  # config class, settings, what the line says
    "sliding layers": ("Gemma2Config", {}, "layers 0, 2 are of the kind 'sliding_attention'"),
    "sliding window of a call": ("MistralConfig", {}, r"layer 0 \(MistralAttention\) uses sliding_window"),
    "linear layers": ("Qwen3NextConfig", {}, r"layers 0, 1, 2 \(Qwen3NextDecoderLayer\) have no self_attn"),
    "lightning layers": ("MiniMaxConfig", {}, "layers 1, 3 are of the kind 'linear_attention'"),
    "chunked layers": ("Llama4TextConfig", {}, "of the kind 'chunked_attention'"),
    "sinks": ("GptOssConfig", FULL, r"uses s_aux \(attention sinks\)"),
    "capped logits": ("Gemma2Config", FULL, r"uses softcap \(capped attention logits\)"),
    "two calls": ("DiffLlamaConfig", {}, "calls attention twice in one pass"),
    "dropped keywords": ("StableLmConfig", {}, "do not pass keywords on"),
    "growing frequencies": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "changes its frequencies",
    ),
    "no decoder": ("GPT2Config", {}, "has no attribute 'layers'"),
    "an encoder": ("BertConfig", {}, "has no attribute 'layers'"),
}
UNMOVED = {  # layers whose keys cannot be moved by rotate_half
    "interleaved pairs": ("GlmConfig", "layers 0, 1, 2, 3"),
    "layers without RoPE": ("SmolLM3Config", "layers 3 "),
    "a part of each head": ("PersimmonConfig", "layers 0, 1, 2, 3"),
    "no input_layernorm": ("Olmo2Config", "no input_layernorm"),
}


def built(config: str, **settings: object) -> Any:
    """A random model of the class that belongs to a config class."""
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(getattr(transformers, config)(**SIZES | settings))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval().requires_grad_(False)


def causal(
    layer: int, states: Tensor, queries: Tensor, keys: Tensor, values: Tensor, scale: float, *memory: Tensor
) -> Tensor:
    """A layer step without a past."""
    return attend(queries, keys, values, scale=scale)


def streamed(attached: StreamedAttention, embeddings: Tensor) -> Tensor:
    """Final hidden states of one pass over random embeddings."""
    places = torch.arange(embeddings.shape[1]).expand(1, 3, -1)
    return attached.run(causal, embeddings, places)


@pytest.mark.parametrize("name", REFUSED)
def test_models_with_other_layers_are_refused(name) -> None:
    config, settings, said = REFUSED[name]
    model = built(config, **settings)
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=said), attach(model) as attached:
        streamed(attached, torch.randn(1, 8, 32))
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name", UNMOVED)
def test_keys_that_do_not_rotate_are_refused_where_they_would_move(name) -> None:
    config, said = UNMOVED[name]
    model, embeddings = built(config, num_key_value_heads=4), torch.randn(1, 24, 32)
    expected = model(inputs_embeds=embeddings).last_hidden_state
    with attach(model) as attached:
        assert_equal_logits(streamed(attached, embeddings), expected)  # at their original positions they are served
        stream = Stream(attached, PerturbationOptions().build(None), last_position=40)
        places = torch.arange(12).expand(1, 3, 12)
        kinds = torch.full((1, 12), 1, dtype=torch.int8)
        stream.feed(Chunk(embeddings=embeddings[:, :12], positions=2 * places, modality=kinds))
        with pytest.raises(UnsupportedModelError, match=said):
            stream.feed(Chunk(embeddings=embeddings[:, 12:], positions=2 * places + 24, modality=kinds))


@pytest.mark.parametrize("recompute", [False, True])
def test_attention_dropout_is_refused_in_training(recompute) -> None:
    model: Any = text_model("qwen2_5_omni")
    for layer in model.layers:
        layer.self_attn.attention_dropout = 0.1
    places = torch.arange(8).expand(1, 3, 8)
    with attach(model, recompute_layers=recompute) as attached:
        attached.run(causal, torch.randn(1, 8, 64), places)
        model.train()
        with pytest.raises(UnsupportedModelError, match=r"attention_dropout 0\.1"):
            attached.run(causal, torch.randn(1, 8, 64), places)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_layer_that_never_calls_attention_is_refused(recompute) -> None:
    model: Any = text_model("qwen2_5_omni")
    silent = model.layers[2].self_attn
    silent.forward = lambda hidden_states, **rest: (hidden_states, None)
    embeddings = torch.randn(1, 8, 64, requires_grad=True)
    with (
        attach(model, recompute_layers=recompute) as attached,
        pytest.raises(UnsupportedModelError, match=r"layers 2 \(Qwen2_5OmniAttention\) do not use"),
    ):
        attached.run(causal, embeddings, torch.arange(8).expand(1, 3, 8))


@pytest.mark.parametrize("axes", [1, 3])
def test_rotation_leaves_out_the_scaling_of_yarn(axes) -> None:
    """A key that moves twice is the key computed at the last position: cos and sin of YaRN carry a factor."""
    if axes == 1:
        model = built("LlamaConfig", rope_parameters=YARN)
    else:
        model: Any = text_model("qwen2_5_omni", rope_parameters=ROPE | YARN)
    assert model.rotary_emb.attention_scaling > 1.1
    states = torch.randn(1, 1, model.config.hidden_size)
    at = torch.zeros(1, axes, 1, dtype=torch.long)
    with attach(model) as attached:
        _, keys, _ = attached.project(1, states, at)
        for _ in range(2):
            keys = rotate(keys, *attached.rotary((at + 40).transpose(0, 1)))
        _, expected, _ = attached.project(1, states, at + 80)
    assert torch.allclose(keys, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "settings"), [("GraniteConfig", {"logits_scaling": 8.0}), ("CohereConfig", {"logit_scale": 0.25})]
)
def test_a_head_with_scaled_logits_is_refused(config, settings) -> None:
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**SIZES | settings))
    torch.nn.init.normal_(made.get_output_embeddings().weight)
    with pytest.raises(LayoutError, match="changes the logits of its head"):
        TextModel(made, tokenizer())


def test_a_text_model_is_made_before_it_is_attached() -> None:
    made = causal_model()
    with attach(made.base_model), pytest.raises(LayoutError, match="before `with attach"):
        TextModel(made, tokenizer())
