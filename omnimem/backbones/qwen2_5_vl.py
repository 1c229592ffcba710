"""Qwen2.5-VL: frames alone, in one span without timestamps.

Prompt: {opening}<|vision_start|>[visual tokens]<|vision_end|>{question}.

Positions: grid i at floor(`tokens_per_second` s i) after the start of the span, at s seconds per grid; rows and columns
from the start. Text continues after the largest, as the model was trained (and as transformers did up to 4.x: 5.23
continues after the rows and columns of one frame, at positions that later frames have too).
"""

from typing import final

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLTextModel,
)

from omnimem.backbones.base import Layout, Tracks
from omnimem.backbones.qwen import END, START, Qwen, QwenFamily, SpanLayout

CLIP = {  # of every published checkpoint
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}


class Qwen25VL(Qwen):
    """A loaded model of this family; `model` is the unmodified transformers class."""

    name = "Qwen2.5-VL"
    classes = {"qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration)}  # noqa: RUF012
    decoder = (Qwen2_5_VLTextModel,)
    towers = ((Qwen2_5_VisionTransformerPretrainedModel,),)
    defaults = CLIP
    senses = ("video",)
    begin = {"both": START, "video": START, "audio": START}  # noqa: RUF012
    end = {"both": END, "video": END, "audio": END}  # noqa: RUF012

    def laid_out(self, opening: str, tracks: Tracks | None, batch: int, group: int) -> Layout:
        rate = float(self.parts.config.vision_config.tokens_per_second)
        return SpanLayout(self.embedded(opening, batch), rate=rate, tracks=tracks)


@final
class Qwen25VLFamily(QwenFamily):
    """Qwen2.5-VL 3B to 72B."""

    name = Qwen25VL.name
    sizes = "3B, 7B, 32B and 72B, frames alone (qwen2_5_vl_7b.yaml)"
    trees = ("model", "model.language_model")
    backbone = Qwen25VL
    with_audio = False
