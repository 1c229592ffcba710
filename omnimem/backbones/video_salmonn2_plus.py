"""video-SALMONN 2+ 4B and 8B (and with experts): Qwen3-VL with the audio branch of whisper_qformer.py.

Stream: as in qwen3_vl.py, with the audio of a group of grids after its frames; audio alone has no markers.
"""

from typing import final

from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLMoeModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from omnimem.backbones.qwen import Classes, QwenFamily
from omnimem.backbones.qwen3_vl import Qwen3VL
from omnimem.backbones.whisper_qformer import AudioBranch, WithAudioBranch, with_audio

CLASSES: dict[str, Classes] = {
    "qwen3_vl": with_audio("VideoSalmonn2Plus", Qwen3VLConfig, Qwen3VLModel, Qwen3VLForConditionalGeneration),
    "qwen3_vl_moe": with_audio(
        "VideoSalmonn2PlusMoe",
        Qwen3VLMoeConfig,
        Qwen3VLMoeModel,
        Qwen3VLMoeForConditionalGeneration,
        *(get_checkpoint_conversion_mapping("qwen3_vl_moe") or ()),
    ),
}


@final
class VideoSalmonn2Plus(WithAudioBranch, Qwen3VL):
    """A loaded model of this family."""

    name = "video-SALMONN 2+ (Qwen3-VL)"
    classes = CLASSES
    towers = (*Qwen3VL.towers, (AudioBranch,))
    projecting = (*Qwen3VL.projecting, ("audio_proj",))


@final
class VideoSalmonn2PlusFamily(QwenFamily):
    """video-SALMONN 2+ 4B, 8B and its variant with experts."""

    name = VideoSalmonn2Plus.name
    sizes = "4B, 8B and with experts (video_salmonn2_plus_8b.yaml), and the bundled models/tiny_salmonn"
    trees = ("model.language_model",)
    backbone = VideoSalmonn2Plus
    with_audio = True
