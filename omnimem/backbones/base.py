"""What the stream needs of a model family: how media become chunks, and how questions become tokens."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from omnimem.media import Geometry, Segment
from omnimem.tokens import Chunk

Tracks = Literal["both", "video", "audio"]


@final
@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which checkpoint, and in which precision."""

    path: str  # a local folder or a hub id
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    system: str | None = None  # None: the chat template's own system text


@final
@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One segment after the frozen encoders: what may be cached, and all that a chunk is built from."""

    visual: Float[Tensor, "batch visual_tokens width"] | None
    audio: Float[Tensor, "batch audio_tokens width"] | None
    grid: tuple[int, int, int]  # of the visual tokens: time, rows, columns; zeros without video
    start: float  # seconds
    seconds: float
    seconds_per_grid: float

    @property
    def layout(self) -> tuple[object, ...]:
        """What segments must share to pass together."""
        audio = 0 if self.audio is None else self.audio.shape[1]
        return (self.grid, audio, self.start, self.seconds, self.seconds_per_grid)

    @property
    def count(self) -> int:
        """Audio and visual tokens of the segment."""
        return sum(part.shape[1] for part in (self.visual, self.audio) if part is not None)


def collate(streams: Sequence[Sequence[Encoded]]) -> list[Encoded]:
    """Streams of one layout as one batch, segment by segment.

    Raises ValueError when the layouts differ (length, size of the grid, tracks).
    """
    layouts = [[segment.layout for segment in stream] for stream in streams]
    for number, layout in enumerate(layouts):
        if layout != layouts[0]:
            raise ValueError(
                f"streams 0 and {number} of a batch differ in layout ({len(layouts[0])} and {len(layout)} segments); "
                "batch streams of equal length and frame size, or set the batch size to 1"
            )
    batch = []
    for row in zip(*streams, strict=True):
        first = row[0]
        visual = None if first.visual is None else torch.cat([s.visual for s in row if s.visual is not None])
        audio = None if first.audio is None else torch.cat([s.audio for s in row if s.audio is not None])
        batch.append(
            Encoded(
                visual=visual,
                audio=audio,
                grid=first.grid,
                start=first.start,
                seconds=first.seconds,
                seconds_per_grid=first.seconds_per_grid,
            )
        )
    return batch


@final
@dataclass(frozen=True, kw_only=True)
class Question:
    """A question as the chat template frames it, with the answer to learn from, if any."""

    text: str
    answer: str | None = None


class Backbone(ABC):
    """A checkpoint of one family: tokenizer, encoders, text model and head."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    geometry: Geometry
    folder: Path | None  # where the checkpoint's files lie, when they lie on this machine

    @property
    @abstractmethod
    def text_model(self) -> PreTrainedModel:
        """The decoder that a stream runs through."""

    @property
    @abstractmethod
    def head(self) -> nn.Module:
        """Hidden states to logits."""

    @property
    @abstractmethod
    def stop(self) -> tuple[int, ...]:
        """Token ids that end an answer."""

    @property
    @abstractmethod
    def trained_positions(self) -> int:
        """Positions below this were seen in training."""

    @abstractmethod
    def encode(self, segments: Iterable[Segment], *, fps: float, together: int = 32) -> Iterator[Encoded]:
        """Segments through the frozen encoders, `together` at a time."""

    @abstractmethod
    def chunks(
        self,
        segments: Iterable[Encoded],
        *,
        tracks: Tracks,
        chunk_tokens: int,
        batch: int = 1,
        cuts: Sequence[float] = (),
    ) -> Iterator[Chunk]:
        """The prompt's opening, then the stream in chunks of at most `chunk_tokens`; a chunk also ends at each cut."""

    @abstractmethod
    def question(self, question: Question, *, tracks: Tracks | None) -> tuple[list[int], list[int], list[int]]:
        """(ids, offsets, labels) of a question that closes `tracks` (None: nothing was streamed), then is asked."""
