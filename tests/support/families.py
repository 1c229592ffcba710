"""Tiny random checkpoints of every family, written as their releases lay them out; streams of noise."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers import Qwen3OmniMoeThinkerConfig as Qwen3OmniConfig
from transformers import Qwen3OmniMoeThinkerForConditionalGeneration as Qwen3OmniModel

from omnimem.backbones.base import Backbone
from omnimem.backbones.qwen import VIDEO, template_of
from omnimem.backbones.video_salmonn2_plus import CLASSES as SALMONN
from omnimem.backbones.video_salmonn2_plus_qwen2_5 import CLASSES as SALMONN_25
from omnimem.media import LiveSource, SourceOptions
from omnimem.tiny.omni import build_tokenizer
from support import thinkers

NAMES = (
    *("qwen2_5_omni", "qwen2_5_vl", "video_salmonn2_plus_qwen2_5"),
    *("video_salmonn2_plus", "video_salmonn2_plus_moe", "qwen3_vl", "qwen3_vl_moe", "qwen3_omni"),
)
WORDS = ("vision_start", "vision_end", "image_pad", "video_pad", "audio_pad", "audio_start", "audio_end")
MARKS = tuple(f"<|{word}|>" for word in WORDS)
CLASSES: dict[str, tuple[Any, Any]] = {
    "video_salmonn2_plus": SALMONN["qwen3_vl"],
    "video_salmonn2_plus_moe": SALMONN["qwen3_vl_moe"],
    "video_salmonn2_plus_qwen2_5": SALMONN_25,
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen3_omni": (Qwen3OmniConfig, Qwen3OmniModel),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
    "qwen3_vl_moe": (Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration),
}
WINDOW = 8.0  # seconds of audio of the tiny audio branch; 1 token per second


def tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer with the markers and the template of Qwen3-VL."""
    made = build_tokenizer()
    made.add_special_tokens({"additional_special_tokens": list(MARKS)})
    made.chat_template = template_of(VIDEO)
    return made


def table_of(name: str, words: PreTrainedTokenizerFast, *, tied: bool = False) -> dict[str, Any]:
    """config.json of a tiny model with the keys that the releases write."""
    moe = name.endswith("moe") or name == "qwen3_omni"
    ids = {mark: words.convert_tokens_to_ids(mark) for mark in MARKS}
    text: dict[str, Any] = {
        **{"vocab_size": len(words), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096},
        "rope_parameters": {
            **{"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
        },
        "tie_word_embeddings": tied,
        **({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32} if moe else {}),
    }
    vision = {
        **{"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 16, "in_channels": 3},
        **{"spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64, "num_position_embeddings": 64},
        "deepstack_visual_indexes": [0, 1],
    }
    table = {
        "model_type": "qwen3_vl_moe" if moe else "qwen3_vl",
        **{"text_config": text, "vision_config": vision, "tie_word_embeddings": tied},
        **{"vision_start_token_id": ids[MARKS[0]], "vision_end_token_id": ids[MARKS[1]]},
        **{"image_token_id": ids[MARKS[2]], "video_token_id": ids[MARKS[3]]},
    }
    if name == "qwen3_omni":
        table |= {"model_type": "qwen3_omni_moe_thinker", "position_id_per_seconds": 13}
        table |= {"audio_token_id": ids[MARKS[4]], "audio_start_token_id": ids[MARKS[5]]}
        table["audio_config"] = {
            **{"num_mel_bins": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48},
            **{"d_model": 32, "output_dim": 64, "n_window": 50, "n_window_infer": 800, "downsample_hidden_size": 8},
        }
    if "2_5" in name:
        table = _of_qwen2_5(table)
    if name.startswith("video"):
        table["audio_token_id"] = ids[MARKS[4]]
        table["audio_config"] = {
            **{"model_type": "whisper", "encoder_layers": 2, "d_model": 32, "encoder_attention_heads": 2},
            **{"encoder_ffn_dim": 48, "num_mel_bins": 32, "max_source_positions": 16, "hop_length": 4000},
            **{"n_fft": 4096, "second_per_window": 1.0, "second_stride": 1.0},
            "qformer_config": {
                **{"model_type": "bert", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
                **{"intermediate_size": 48, "out_hidden_size": 7},
            },
        }
    return table


def _of_qwen2_5(table: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4.51 writes it: the fields of the text model side by side with the others."""
    text = {key: value for key, value in table["text_config"].items() if key not in ("rope_parameters", "head_dim")}
    vision = {
        **{"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 14, "in_chans": 3},
        **{"spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64, "window_size": 56},
        **{"fullatt_block_indexes": [1], "tokens_per_second": 2, "model_type": "qwen2_5_vl"},
    }
    rope = {"rope_theta": 1e4, "rope_scaling": {"type": "mrope", "mrope_section": [4, 2, 2]}}
    outer = {key: value for key, value in table.items() if key not in ("text_config", "vision_config")}
    return {**outer, **text, **rope, "vision_config": vision, "model_type": "qwen2_5_vl"}


def written_once(root: Path) -> Callable[[str], Path]:
    """The folder of a family below `root`, written when it is first asked for."""
    return cache(lambda name: write(root / name, name))


def write(folder: Path, name: str, *, tied: bool = False, seed: int = 0, processor: Path | None = None) -> Path:
    """A checkpoint folder with the names of the release; tokenizer and processor go to `processor`, if given."""
    if name == "qwen2_5_omni":
        return thinkers.write_folder(folder, tied=tied, rates="tiny", seed=seed)
    # 1. weights
    torch.manual_seed(seed)
    words = tokenizer()
    config_class, model_class = CLASSES[name]
    table = table_of(name, words, tied=tied)
    model = model_class(config_class.from_dict(table)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.tie_weights()
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(table))
    # 2. the buffer that the release stores
    if name.startswith("video"):
        weights = load_file(folder / "model.safetensors")
        inside = next(key for key in weights if key.endswith("audio.q_tokens")).removesuffix("q_tokens")
        weights[f"{inside}qformer.bert.embeddings.position_ids"] = torch.arange(512)[None]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # 3. tokenizer and processor
    beside = processor or folder
    beside.mkdir(exist_ok=True)
    words.save_pretrained(beside)
    halves: dict[str, Any] = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    if name == "qwen3_omni":
        halves |= {"feature_size": 32, "hop_length": 160, "n_fft": 400, "sampling_rate": 16000}
    (beside / "preprocessor_config.json").write_text(json.dumps(halves))
    return folder


def noise(
    backbone: Backbone,
    seconds: float,
    *,
    audio_seconds: float | None = None,
    fps: float = 1.0,
    tracks: str = "both",
    asks: tuple[float, ...] = (),
    seed: int = 0,
) -> LiveSource:
    """Frames of 2 x 3 cells and audio, the same for every length: a longer stream begins like a shorter one."""
    rate, cell = backbone.geometry.mel.rate, backbone.geometry.cell
    length = seconds if audio_seconds is None else audio_seconds

    def frames():
        generator = torch.Generator().manual_seed(seed)
        for number in range(int(seconds * fps)):
            yield number / fps, torch.randint(0, 256, (3, 2 * cell, 3 * cell), generator=generator, dtype=torch.uint8)

    def audio():
        generator = torch.Generator().manual_seed(seed + 1)
        left = round(length * rate)
        while left > 0:
            block = torch.rand(rate, generator=generator) - 0.5
            yield block[:left]
            left -= rate

    options = SourceOptions(fps=fps, max_pixels=6 * cell * cell, min_pixels=cell * cell, tracks=tracks)
    return LiveSource(
        frames() if tracks != "audio" else None,
        audio() if tracks != "video" else None,
        options=options,
        geometry=backbone.geometry,
        asks=asks,
    )
