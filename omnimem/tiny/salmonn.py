"""The tiny video-SALMONN 2+ (Qwen3-VL): configuration, tokenizer, layout and towers.

Its visual tokens name shapes alone. Colours are in the deepstack features, which are read from the first layer of the
vision encoder and added to the visual tokens after the first decoder layer.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from omnimem.backbones.base import Encoded
from omnimem.backbones.prompt_text import PromptText
from omnimem.backbones.qwen import END, HALVES, VIDEO, template_of
from omnimem.backbones.qwen3_vl import StampedLayout
from omnimem.backbones.video_salmonn2_plus import CLASSES, VideoSalmonn2Plus
from omnimem.recall.worlds import CELLS, TOKEN_SECONDS
from omnimem.tiny.base import Layout, TinyBase, layout_of, rescale_convolutions, scale_weights, tokenizer_of

SPECIAL: dict[str, str] = {
    **{"endoftext": "<|endoftext|>", "im_start": "<|im_start|>", "im_end": "<|im_end|>"},
    **{"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"},
    **{"image": "<|image_pad|>", "video": "<|video_pad|>", "audio": "<|audio_pad|>"},
}
WINDOW = 8  # seconds of audio that the encoder reads at a time
WIDTH = 96
SHARPNESS = 1.5  # initial weight of the norms of queries and keys; 1 allows logits up to 4.9, too few for 900 keys


def build_config(tokenizer: PreTrainedTokenizerFast) -> Any:
    """Configuration with 4 x 4 visual tokens per 2 s of 112-px frames, and one audio token per second."""
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL.items()}
    text = {
        **{"vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "head_dim": 24},
        **{"num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2},
        "rope_parameters": {
            **{"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 4, 4], "mrope_interleaved": True}
        },
        **{"max_position_embeddings": 32768, "tie_word_embeddings": False},
        **{"pad_token_id": ids["endoftext"], "eos_token_id": ids["im_end"]},
    }
    vision = {
        **{"depth": 2, "hidden_size": 48, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": WIDTH},
        **{"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 64},
        "deepstack_visual_indexes": [0],
    }
    audio = {
        **{"num_mel_bins": 64, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 96, "d_model": 48},
        **{"max_source_positions": 2 * WINDOW, "hop_length": 4000, "n_fft": 4096},  # four mel frames per second
        **{"second_per_window": 1.0, "second_stride": 1.0},
        "qformer_config": {
            **{"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 96}
        },
    }
    return CLASSES["qwen3_vl"][0].from_dict(
        {
            **{"text_config": text, "vision_config": vision, "audio_config": audio, "tie_word_embeddings": False},
            **{"image_token_id": ids["image"], "video_token_id": ids["video"], "audio_token_id": ids["audio"]},
            **{"vision_start_token_id": ids["vision_start"], "vision_end_token_id": ids["vision_end"]},
        }
    )


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: video-text-to-text
---
# A tiny video-SALMONN 2+ for audio-visual recall

{weights:,} weights in float32, the architecture of video-SALMONN 2+ (Qwen3-VL with Whisper's encoder and a Q-Former:
vision 2 x 48, audio 2 x 48, text 6 x 96 with 4 query and 2 key-value heads), trained from scratch with full memory on
the worlds of `omnimem/recall/worlds.py`. It answers three kinds of questions in one word: `what colour was the star ?`,
`what word did the robot say ?`, `what word was heard during the star ?`. It has no other knowledge.

Frames of 112 x 112 pixels at 1 per second become 16 visual tokens every 2 s, each grid after its time as text; audio
becomes 1 token per second, in windows of 8 s. A stream of 64 s has 576 audio and visual tokens. Visual tokens name
shapes; colours are in the deepstack features alone, which come from the first layer of the vision encoder. For tests
and demonstrations of fixed-size memory only.

Recipe: `python train/pretrain_tiny.py --base tiny_salmonn --seed {seed} --out DIR`; its log is `log.jsonl` in this
folder.

Accuracy with full memory on 64 new streams of each length, straight from the renderer and through H.264 + AAC files:

| stream | source | visual | auditory | cross-modal |
|---|---|---|---|---|
{rows}

Licence: Apache-2.0, weights included. Trained without weights of other models and without recorded media.
"""


@final
class SalmonnBase(TinyBase):
    """The tiny video-SALMONN 2+."""

    levels = (("shape",), ("colour",))
    before_question = "\n"
    card = CARD

    @classmethod
    def create(cls, seed: int) -> "SalmonnBase":
        # 1. weights of variance 1 / fan-in
        tokenizer = tokenizer_of(SPECIAL, template_of(VIDEO), ["seconds"])
        torch.manual_seed(seed)
        model = CLASSES["qwen3_vl"][1](build_config(tokenizer))
        scale_weights(model)
        # 2. parts that the smaller base does not have
        for name, parameter in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                nn.init.constant_(parameter, SHARPNESS)
        nn.init.normal_(model.get_parameter("model.audio.q_tokens"))
        base = cls(model.float(), tokenizer)
        rescale_convolutions(base.towers[1])
        return base

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(model, tokenizer)
        self.geometry = VideoSalmonn2Plus.geometry_of(model.config, HALVES)
        self._backbone = VideoSalmonn2Plus(model, tokenizer, self.geometry)

    @property
    def towers(self) -> tuple[nn.Module, nn.Module]:
        return self.parts.model.visual, self.parts.model.audio

    @property
    def placeholders(self) -> tuple[int, int]:
        return self.parts.config.video_token_id, self.parts.config.audio_token_id

    def layout(self, seconds: int) -> Layout:
        """The layout that streams have, with one timestamp per grid: token ids pass through it as embeddings."""
        # 1. a stream of placeholders
        text, (video, audio) = PromptText(self.tokenizer), self.placeholders
        grids, side = seconds // TOKEN_SECONDS, int(CELLS**0.5)

        def embed(words: str) -> Tensor:
            return torch.tensor([text.ids(words)], dtype=torch.float32)[..., None]

        stream = Encoded(
            visual=torch.full((1, grids * CELLS, 1), float(video)),
            audio=torch.full((1, seconds, 1), float(audio)),
            grid=(grids, side, side),
            start=0.0,
            seconds=float(seconds),
            seconds_per_grid=float(TOKEN_SECONDS),
        )
        # 2. its parts, and the end marker before the question
        opening, _ = self._backbone.rendered(None)
        made = StampedLayout(embed, opening, group=1, audio_per_second=1.0, temporal_patch=2)
        parts = [made.opening(), *made.push(stream)]
        positions = torch.cat([part.positions for part in parts], dim=1)
        end = embed(END)
        after = int(positions.max()) + 1 + torch.arange(end.shape[1])
        ids = torch.cat([*(part.embeddings for part in parts), end], dim=1)[0, :, 0].long()
        return layout_of(ids, torch.cat([positions, after.expand(3, -1)], dim=1), self.placeholders)

    def look(self, frames: Sequence[Tensor]) -> Tensor:
        patches, grid = self.geometry.patches(torch.cat(list(frames)))
        seen = self.towers[0](patches, grid_thw=torch.tensor([grid]))
        features = torch.stack([seen.pooler_output, *seen.deepstack_features])
        return features.view(len(self.levels), len(frames), -1, CELLS, features.shape[-1])

    def listen(self, mels: Sequence[Tensor]) -> Tensor:
        windows = torch.cat(list(mels), dim=1).unflatten(1, (-1, 4 * WINDOW)).transpose(0, 1)
        features = self.parts.model.audio.tokens(windows)
        return features.reshape(len(mels), -1, features.shape[-1])

    def save_preprocessor(self, folder: Path) -> None:
        table = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_processor_type": "Qwen2VLImageProcessorFast"}
        text = json.dumps(table | {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}, indent=2)
        (folder / "preprocessor_config.json").write_text(text + "\n", encoding="utf-8")
