"""Small parts of the assembled family with random weights, and a folder that names them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from omnimem.backbones import assembled

WIDTH, CHANNELS, MELS = 32, 12, 8
TEMPLATE = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nhelp<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def text_part(dtype: str = "float32") -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A Llama model with two layers, and a tokenizer of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pipeline = Tokenizer(BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = decoders.ByteLevel()
    pipeline.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pipeline, eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval().requires_grad_(False), tokenizer


def vision_part() -> nn.Module:
    """A feature map with one row per 32 pixels."""
    torch.manual_seed(2)

    class Vision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, CHANNELS, 32, 32)

        def forward(self, frames: Tensor) -> Tensor:
            return self.conv(nn.functional.pad(frames.float(), (0, -frames.shape[3] % 32, 0, -frames.shape[2] % 32)))

    return Vision().requires_grad_(False)


def audio_part() -> WhisperEncoder:
    """Windows of up to two seconds."""
    torch.manual_seed(3)
    config = WhisperConfig(
        d_model=16,
        num_mel_bins=MELS,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=24,
        max_source_positions=100,
        init_std=0.2,
    )
    return WhisperEncoder(config).eval().requires_grad_(False)


LOADERS: dict[str, dict[str, Any]] = {
    "text": {"small-text": text_part},
    "vision": {"small-vision": vision_part},
    "audio": {"small-audio": audio_part},
}


def weights(rank: int = 2) -> dict[str, Tensor]:
    """A bridge and an adapter that fit the parts."""
    torch.manual_seed(4)
    bridge = assembled.Bridge(visual=CHANNELS, audio=16, width=WIDTH, norm=3.0)
    found = {**bridge.state_dict(), "places": torch.randn(5, WIDTH)}
    text, _ = text_part()
    for number, layer in enumerate(text.model.layers):
        for name in assembled.TARGETS:
            linear = getattr(layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp, name)
            found[f"lora.{number}.{name}.a"] = torch.randn(rank, linear.in_features) / 8
            found[f"lora.{number}.{name}.b"] = torch.randn(linear.out_features, rank) / 8
    return found


def write_folder(folder: Path, **changes: Any) -> Path:
    """A folder of the family; `changes` replace keys of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"text": "small-text", "vision": "small-vision", "audio": "small-audio"}
    table = {"model_type": assembled.FAMILY, "parts": parts, "norm": 3.0, "adapter_scale": 0.5, **changes}
    (folder / "config.json").write_text(json.dumps({name: each for name, each in table.items() if each is not None}))
    save_file(weights(), folder / assembled.WEIGHTS)
    return folder
