"""Tiny random Qwen2.5-Omni thinkers with the real checkpoints' rates, written as the hub lays them out."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    WhisperFeatureExtractor,
)

from omnimem.tiny.omni import IMAGE_PROCESSOR, build_tokenizer

RATES: dict[str, dict[str, int]] = {
    "real": {"mels": 128, "hop": 160, "n_fft": 400, "window": 100, "positions": 25},
    "tiny": {"mels": 64, "hop": 4000, "n_fft": 4096, "window": 4, "positions": 1},
}


def config_of(tokenizer: PreTrainedTokenizerFast, *, tied: bool, rates: str) -> Qwen2_5OmniThinkerConfig:
    """A thinker of 32 x 2 layers with the interface of the real ones."""
    rate = RATES[rates]
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("AUDIO", "IMAGE", "VIDEO")}
    marks = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("audio_bos", "audio_eos", "vision_bos")}
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        "tie_word_embeddings": tied,
        "pad_token_id": None,
    }
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 32}
    patches = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112}
    audio = {
        **{"num_mel_bins": rate["mels"], "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48},
        **{"d_model": 32, "n_window": rate["window"], "output_dim": 32},
    }
    return Qwen2_5OmniThinkerConfig(
        text_config=text,
        vision_config={**vision, **patches, "fullatt_block_indexes": [1]},
        audio_config=audio,
        audio_token_index=ids["AUDIO"],
        image_token_index=ids["IMAGE"],
        video_token_index=ids["VIDEO"],
        audio_start_token_id=marks["audio_bos"],
        audio_end_token_id=marks["audio_eos"],
        vision_start_token_id=marks["vision_bos"],
        position_id_per_seconds=rate["positions"],
        seconds_per_chunk=2,
        tie_word_embeddings=tied,
    )


def random_model(config: Qwen2_5OmniThinkerConfig, seed: int = 0) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """Random weights, large enough to leave the near-linear regime."""
    torch.manual_seed(seed)
    model = Qwen2_5OmniThinkerForConditionalGeneration(config).float()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.tie_weights()
    return model.eval()


def write_folder(folder: Path, *, tied: bool = False, rates: str = "real", hub: bool = False, seed: int = 0) -> Path:
    """A checkpoint folder; `hub` writes it as Qwen publishes it: thinker, talker and token2wav, sharded with index."""
    tokenizer = build_tokenizer()
    model = random_model(config_of(tokenizer, tied=tied, rates=rates), seed)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rate = RATES[rates]
    extractor = WhisperFeatureExtractor(feature_size=rate["mels"], hop_length=rate["hop"], n_fft=rate["n_fft"])
    table = {**json.loads(extractor.to_json_string()), **IMAGE_PROCESSOR}
    (folder / "preprocessor_config.json").write_text(json.dumps(table))
    if hub:
        _as_published(folder)
    return folder


def _as_published(folder: Path) -> None:
    weights = {f"thinker.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    weights["talker.model.layers.0.self_attn.q_proj.weight"] = torch.ones(4, 4)
    weights["token2wav.code2wav_dit_model.proj.weight"] = torch.ones(4, 4)
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: weights[name].contiguous() for name in members}, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    thinker = json.loads((folder / "config.json").read_text())
    whole = {"architectures": ["Qwen2_5OmniModel"], "model_type": "qwen2_5_omni", "enable_talker": True}
    (folder / "config.json").write_text(json.dumps({**whole, "thinker_config": thinker}))
