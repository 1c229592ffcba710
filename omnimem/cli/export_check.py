"""Compares two models by their logits on a short synthetic stream."""

from collections.abc import Iterator
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from omnimem.backbones import Backbone, Encoded, Turn
from omnimem.config.exported import Exported
from omnimem.media import Segment
from omnimem.streaming.attach import attach
from omnimem.streaming.feeder import Feeder

SEGMENTS = 8
CELLS = 4  # visual tokens along a side of the frame
QUESTION = "What was seen and heard?"


@final
class ExportCheck:
    """Video and audio noise, encoded by the model as it then is, and a question; the same for every model."""

    def __init__(self, backbone: Backbone, exported: Exported) -> None:
        self.backbone, self.exported = backbone, exported
        self.tokens = sum(segment.count for segment in self._encoded())

    @property
    def slots(self) -> int:
        """Slots per layer that evict: the tuned size, or a quarter of the stream's tokens if that is less."""
        return min(self.exported.memory.slots_per_layer, self.tokens // 4)

    @torch.no_grad()
    def logits(self, slots: int | None) -> Float[Tensor, "tokens vocabulary"]:
        """Float32 logits of the question's tokens after four chunks under the exported policy; None: full memory."""
        tracks, backbone = self.exported.stream.source().tracks, self.backbone
        feeder = Feeder(backbone, self.exported.stream)
        with attach(backbone.text_model) as attached:
            stream = feeder.stream(attached, self.exported.policies(slots))
            for chunk in backbone.chunks(self._encoded(), tracks=tracks, chunk_tokens=self.tokens // 4):
                stream.feed(chunk)
            asked = feeder.prompt([[Turn(text=QUESTION)]], tracks)
            return backbone.head(stream.ask(asked).hidden)[0].float().cpu()

    def _encoded(self) -> Iterator[Encoded]:
        return self.backbone.encode(self._noise(), fps=self.exported.stream.fps)

    def _noise(self) -> Iterator[Segment]:
        geometry, stream = self.backbone.geometry, self.exported.stream
        seconds, frames, mel_frames = geometry.segment(stream.fps)
        generator, side = torch.Generator().manual_seed(0), CELLS * geometry.cell
        for number in range(SEGMENTS):
            pixels = torch.randint(0, 256, (frames, 3, side, side), generator=generator, dtype=torch.uint8)
            mel = torch.randn(geometry.mel.mels, mel_frames, generator=generator)
            yield Segment(
                start=number * seconds,
                seconds=seconds,
                frames=pixels if stream.tracks != "audio" else None,
                mel=mel if stream.tracks != "video" else None,
            )


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference of logits, in units of max(1, largest |logit|)."""
    return float((a - b).abs().max()) / max(1.0, float(a.abs().max()))
