"""The tiny Qwen2.5-Omni thinker: configuration, tokenizer, chat template, layout and towers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    WhisperFeatureExtractor,
)

from omnimem.media import Geometry, LogMel
from omnimem.recall.worlds import CELLS, TOKEN_SECONDS
from omnimem.tiny.base import (
    SYSTEM,
    Layout,
    TinyBase,
    layout_of,
    rescale_convolutions,
    scale_weights,
    token_id,
    tokenizer_of,
)

SPECIAL: dict[str, str] = {
    "endoftext": "<|endoftext|>",
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
    "audio_token": "<|AUDIO|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
}
CHAT_TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\n" + SYSTEM + "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'video' %}<|vision_bos|><|VIDEO|><|vision_eos|>"
    "{% elif part.type == 'image' %}<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif part.type == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer with the special tokens and the template of Qwen2.5-Omni."""
    return tokenizer_of(SPECIAL, CHAT_TEMPLATE)


def build_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5OmniThinkerConfig:
    """Configuration with 4 x 4 visual tokens per 2 s of 112-px frames, and one audio token per second."""
    # 1. text, vision and audio
    ids = {name: token_id(tokenizer, token) for name, token in SPECIAL.items()}
    width = 96
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 4, 4]},
        "max_position_embeddings": 32768,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "pad_token_id": ids["endoftext"],
        "eos_token_id": ids["im_end"],
    }
    vision = {
        **{"depth": 2, "hidden_size": 48, "num_heads": 2, "intermediate_size": 96, "out_hidden_size": width},
        **{"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2},
        **{"window_size": 112, "fullatt_block_indexes": [1]},
    }
    audio = {
        **{"num_mel_bins": 64, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 96},
        **{"d_model": 48, "n_window": 4, "output_dim": width, "max_source_positions": 1500},
    }
    # 2. the thinker
    undeclared: dict[str, Any] = {  # not fields of the class, but read by get_rope_index and generate
        "vision_start_token_id": ids["vision_bos_token"],
        "vision_end_token_id": ids["vision_eos_token"],
        "pad_token_id": ids["endoftext"],
        "eos_token_id": ids["im_end"],
    }
    return Qwen2_5OmniThinkerConfig(
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        audio_token_index=ids["audio_token"],
        image_token_index=ids["image_token"],
        video_token_index=ids["video_token"],
        audio_start_token_id=ids["audio_bos_token"],
        audio_end_token_id=ids["audio_eos_token"],
        user_token_id=token_id(tokenizer, "user"),
        position_id_per_seconds=1,
        seconds_per_chunk=2,
        tie_word_embeddings=False,
        **undeclared,
    )


def build_feature_extractor() -> WhisperFeatureExtractor:
    """Four mel frames per second; the audio tower turns four of them into one token."""
    return WhisperFeatureExtractor(feature_size=64, sampling_rate=16000, hop_length=4000, chunk_length=300, n_fft=4096)


IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGE_PROCESSOR: dict[str, object] = {
    **{"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 3136, "max_pixels": 176400},
    "image_mean": list(IMAGE_MEAN),
    "image_std": list(IMAGE_STD),
    **{"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5OmniProcessor"},
}


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: video-text-to-text
---
# A tiny Qwen2.5-Omni thinker for audio-visual recall

{weights:,} weights in float32, the architecture of `Qwen2_5OmniThinkerForConditionalGeneration` (vision 2 x 48,
audio 2 x 48, text 6 x 96 with 4 query and 2 key-value heads), trained from scratch with full memory on the worlds of
`omnimem/recall/worlds.py`. It answers three kinds of questions in one word: `what colour was the star ?`,
`what word did the robot say ?`, `what word was heard during the star ?`. It has no other knowledge.

Frames of 112 x 112 pixels at 1 per second become 16 visual tokens every 2 s, audio becomes 1 token per second: a
stream of 64 s has 576 tokens. For tests and demonstrations of fixed-size memory only.

Recipe: `python train/pretrain_tiny.py --seed {seed} --out DIR`; its log is `log.jsonl` in this folder.

Accuracy with full memory on 64 new streams of each length, straight from the renderer and through H.264 + AAC files:

| stream | source | visual | auditory | cross-modal |
|---|---|---|---|---|
{rows}

Licence: Apache-2.0, weights included. Trained without weights of other models and without recorded media.
"""


PREFIX = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n<|vision_bos|><|audio_bos|>"
SUFFIX = "<|audio_eos|><|vision_eos|>"


@final
class OmniBase(TinyBase):
    """The tiny Qwen2.5-Omni thinker."""

    levels = (("shape", "colour"),)
    card = CARD
    geometry = Geometry(
        patch=14,
        merge=2,
        temporal_patch=2,
        mean=IMAGE_MEAN,
        std=IMAGE_STD,
        mel=LogMel(mels=64, hop=4000, n_fft=4096),
        segment_seconds=2.0,
    )

    @classmethod
    def create(cls, seed: int) -> "OmniBase":
        tokenizer = build_tokenizer()
        torch.manual_seed(seed)
        model = Qwen2_5OmniThinkerForConditionalGeneration(build_config(tokenizer))
        scale_weights(model)
        base = cls(model.float(), tokenizer)
        rescale_convolutions(base.towers[1])
        return base

    @property
    def towers(self) -> tuple[nn.Module, nn.Module]:
        return self.parts.model.visual, self.parts.model.audio_tower

    @property
    def placeholders(self) -> tuple[int, int]:
        return self.parts.config.video_token_id, self.parts.config.audio_token_id

    def layout(self, seconds: int) -> Layout:
        """The layout with the TMRoPE positions of the model."""
        # 1. token ids
        grids, (video, audio) = seconds // TOKEN_SECONDS, self.placeholders
        grid = [video] * CELLS + [audio] * TOKEN_SECONDS
        ids = torch.tensor([*self.tokenizer(PREFIX).input_ids, *grid * grids, *self.tokenizer(SUFFIX).input_ids])
        # 2. positions
        side = 2 * int(CELLS**0.5)  # patches; a cell has 2 x 2 of them
        positions, _ = self.parts.model.get_rope_index(
            torch.LongTensor(ids[None]),
            video_grid_thw=torch.LongTensor([[grids, side, side]]),
            use_audio_in_video=True,
            audio_seqlens=torch.LongTensor([4 * seconds]),
            second_per_grids=torch.tensor([float(TOKEN_SECONDS)]),
        )
        return layout_of(ids, positions[:, 0], self.placeholders)

    def look(self, frames: Sequence[Tensor]) -> Tensor:
        patches, grid = self.geometry.patches(torch.cat(list(frames)))
        features = self.towers[0](patches, grid_thw=torch.tensor([grid])).pooler_output
        return features.view(1, len(frames), -1, CELLS, features.shape[-1])

    def listen(self, mels: Sequence[Tensor]) -> Tensor:
        lengths = torch.tensor([mel.shape[1] for mel in mels])
        features = self.towers[1](torch.cat(list(mels), dim=1), feature_lens=lengths).last_hidden_state
        return features.view(len(mels), -1, features.shape[-1])

    def save_preprocessor(self, folder: Path) -> None:
        extractor = build_feature_extractor()
        for key, value in IMAGE_PROCESSOR.items():
            setattr(extractor, key, value)
        extractor.save_pretrained(folder)
