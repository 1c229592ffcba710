"""video-SALMONN 2+ 3B, 7B and 72B: Qwen2.5-VL with the audio branch of whisper_qformer.py, and positions of its own.

Prompt: {opening}<|vision_start|>[the visual tokens of a grid, then the audio of its time]*<|vision_end|>{question}; for
audio alone the audio tokens between the same markers.

Positions from the start of the span, as time, height, width: a cell of grid i at floor(r s i), its row, its column,
with s seconds per grid and r audio tokens per second (2; the release writes the 2); the k-th audio token at k, 0, k
beside frames and at k, k, 0 alone. Text continues after the largest time of frames and audio; after frames alone, after
the largest position.
"""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel
from transformers.core_model_loading import WeightRenaming

from omnimem.backbones.base import Layout, Tracks
from omnimem.backbones.qwen import QwenFamily, SpanLayout
from omnimem.backbones.qwen2_5_vl import Qwen25VL
from omnimem.backbones.whisper_qformer import AudioBranch, WithAudioBranch, with_audio

CLASSES = with_audio(
    "VideoSalmonn2PlusQwen25",
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
    Qwen2_5_VLForConditionalGeneration,
    WeightRenaming(r"^visual", "model.visual"),
    WeightRenaming(r"^audio\.", "model.audio."),
    WeightRenaming(r"^model(?!\.(language_model|visual|audio))", "model.language_model"),
)


@final
class VideoSalmonn2PlusQwen25(WithAudioBranch, Qwen25VL):
    """A loaded model of this family."""

    name = "video-SALMONN 2+ (Qwen2.5-VL)"
    classes = {"qwen2_5_vl": CLASSES}  # noqa: RUF012
    towers = (*Qwen25VL.towers, (AudioBranch,))
    projecting = (*Qwen25VL.projecting, ("audio_proj",))
    compacts = False  # the width of audio moves with the time, so kept tokens cannot move up in time alone

    def laid_out(self, opening: str, tracks: Tracks | None, batch: int, group: int) -> Layout:
        return PairedLayout(self.embedded(opening, batch), rate=self.audio_tokens_per_second, tracks=tracks)


@final
class PairedLayout(SpanLayout):
    """Grids and audio, whose width or height counts with the time."""

    last = -1  # time of the latest grid

    def seen(self, times: Sequence[int], rows: int, columns: int) -> None:
        self.last = times[-1]

    def heard(self, times: Tensor) -> Tensor:
        still = torch.zeros_like(times)
        return torch.stack([times, still, times] if self.tracks == "both" else [times, times, still])

    @property
    def next_position(self) -> int | None:
        return self.base + max(self.last, self.audio_tokens - 1) + 1 if self.tracks == "both" else None


@final
class VideoSalmonn2PlusQwen25Family(QwenFamily):
    """video-SALMONN 2+ 3B, 7B and 72B."""

    name = VideoSalmonn2PlusQwen25.name
    sizes = "3B, 7B and 72B (video_salmonn2_plus_7b.yaml)"
    trees = ("model", "model.language_model")
    backbone = VideoSalmonn2PlusQwen25
    with_audio = True
