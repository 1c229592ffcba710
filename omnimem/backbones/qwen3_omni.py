"""Qwen3-Omni thinker (30B-A3B): frames and audio merged token by token in order of time, with deepstack features.

Prompt: {opening}<|vision_start|><|audio_start|>[a frame grid, then audio up to the next one]*<|audio_end|>
<|vision_end|>{question}; a stream with one track has only its own markers. Every marker has a position of its own.

Positions: a grid at `position_id_per_seconds` times its time, rows and columns from the start of the stream; the k-th
audio token at k, so one second has as many positions as audio tokens (13). Rates of frames with other than whole
positions are refused.

Audio: the encoder attends within `n_window_infer` mel frames, so a segment is as long (8 s).
"""

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from transformers import Qwen3OmniMoeThinkerConfig, Qwen3OmniMoeThinkerForConditionalGeneration
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import (
    Qwen3OmniMoeAudioEncoder,
    Qwen3OmniMoeThinkerTextModel,
    Qwen3OmniMoeVisionEncoder,
)

from omnimem.backbones.base import Encoded, Layout, LayoutError, Part, Tracks
from omnimem.backbones.family import Table
from omnimem.backbones.files import CheckpointError
from omnimem.backbones.qwen import HALVES, Qwen, QwenFamily, SpanLayout
from omnimem.errors import counted
from omnimem.media import LogMel, Segment

CLASSES = (Qwen3OmniMoeThinkerConfig, Qwen3OmniMoeThinkerForConditionalGeneration)
PER_BLOCK = 13  # audio tokens of 2 x n_window mel frames, as transformers counts them


@final
class Qwen3Omni(Qwen):
    """A loaded thinker; `model` is the unmodified transformers class."""

    name = "Qwen3-Omni"
    classes = {"qwen3_omni_moe": CLASSES, "qwen3_omni_moe_thinker": CLASSES}  # noqa: RUF012
    decoder = (Qwen3OmniMoeThinkerTextModel,)
    towers = ((Qwen3OmniMoeVisionEncoder,), (Qwen3OmniMoeAudioEncoder,))
    projecting, stacked = (("merger",), ("proj1", "act", "proj2")), "merger_list"
    preprocessed = ("feature_size", "hop_length", "n_fft", "image_mean", "image_std")
    defaults = {**HALVES, "feature_size": 128, "hop_length": 160, "n_fft": 400}  # noqa: RUF012
    begin = {  # noqa: RUF012
        "both": "<|vision_start|><|audio_start|>",
        "video": "<|vision_start|>",
        "audio": "<|audio_start|>",
    }
    end = {"both": "<|audio_end|><|vision_end|>", "video": "<|vision_end|>", "audio": "<|audio_end|>"}  # noqa: RUF012

    @classmethod
    def hearing(cls, config: Any, table: Table) -> dict[str, Any]:
        """Mel settings and the window of the encoder's attention, checked against its configuration."""
        audio = config.audio_config
        mel = LogMel(mels=table["feature_size"], hop=table["hop_length"], n_fft=table["n_fft"])
        rate = PER_BLOCK * mel.rate / (mel.hop * 2 * audio.n_window)
        if mel.mels != audio.num_mel_bins or audio.n_window_infer % (2 * audio.n_window):
            raise CheckpointError(
                f"{counted(mel.mels, 'mel bin')} and windows of {counted(audio.n_window_infer, 'mel frame')} do not "
                f"fit the audio encoder ({counted(audio.num_mel_bins, 'bin')}, blocks of "
                f"{counted(2 * audio.n_window, 'frame')}); fix preprocessor_config.json"
            )
        if config.position_id_per_seconds != rate:
            raise CheckpointError(
                f"position_id_per_seconds = {config.position_id_per_seconds}, but the audio encoder gives {rate:g} "
                "tokens per second; copy config.json again from the model's page"
            )
        return {"mel": mel, "segment_seconds": audio.n_window_infer * mel.hop / mel.rate}

    def audio_tokens(self, mel_frames: int) -> int:
        block = 2 * self.parts.config.audio_config.n_window
        left = mel_frames % block
        for _ in range(3):  # three convolutions halve what is left
            left = (left - 1) // 2 + 1
        return mel_frames // block * PER_BLOCK + left

    def listen(self, block: Sequence[Segment]) -> list[Tensor | None]:
        """Audio tokens [1, tokens, width] of each segment, which fills whole windows unless it is the last one."""
        heard = []
        for segment in block:
            if segment.mel is None or not segment.mel.shape[1]:
                heard.append(None)
                continue
            mel = segment.mel[None].to(device=self.device, dtype=self.parts.dtype)
            mask = torch.ones(1, mel.shape[2], dtype=torch.long, device=self.device)
            tokens = self.parts.get_audio_features(mel, feature_attention_mask=mask).last_hidden_state
            heard.append(tokens[None])
        return heard

    def laid_out(self, opening: str, tracks: Tracks | None, batch: int, group: int) -> Layout:
        rate = float(self.parts.config.position_id_per_seconds)
        return MergedLayout(self.embedded(opening, batch), rate=rate, tracks=tracks)


@final
class MergedLayout(SpanLayout):
    """Every grid at its time, which is a whole position, then the audio up to the next grid."""

    last, extent = -1, 0  # time of the latest grid; rows or columns of a grid, whichever is more

    def seen(self, times: Sequence[int], rows: int, columns: int) -> None:
        self.last, self.extent = times[-1], max(rows, columns)

    @property
    def next_position(self) -> int | None:
        """Of text that follows: after the last piece that get_rope_index appends, which may not be the largest."""
        if self.tracks != "both":
            return None
        if self.audio_tokens > self.last:
            return self.base + self.audio_tokens
        return self.base + max(self.last, self.extent - 1) + 1

    def push(self, segment: Encoded) -> list[Part]:
        step = self.rate * segment.seconds_per_grid
        if step != int(step):
            raise LayoutError(
                f"stream.fps: a frame grid takes {counted(step, 'position')}; give a rate with whole ones, as 1 or 2"
            )
        return super().push(segment)


@final
class Qwen3OmniFamily(QwenFamily):
    """Qwen3-Omni-30B-A3B: the thinker, with or without the talker beside it."""

    name = Qwen3Omni.name
    sizes = "the thinker of 30B-A3B (qwen3_omni_30b.yaml)"
    trees = ("thinker.model", "model", "model.language_model", "thinker.model.language_model")
    backbone = Qwen3Omni
