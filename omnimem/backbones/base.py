"""What the stream needs of a model family: how media become chunks, and how questions become tokens."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from omnimem.errors import UserError
from omnimem.media import Geometry, Segment
from omnimem.tokens import Chunk

Tracks = Literal["both", "video", "audio"]


class LayoutError(UserError):
    """A stream that cannot be cut as asked; the message says why and how to repair it."""


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


def collate(streams: Sequence[Iterable[Encoded]]) -> Iterator[Encoded]:
    """Streams of one layout as one batch, segment by segment, as they come.

    Raises LayoutError when the layouts differ (length, size of the grid, tracks).
    """
    if len(streams) == 1:
        yield from streams[0]
        return
    for row in zip_longest(*streams):
        layouts = [None if segment is None else segment.layout for segment in row]
        if len(set(layouts)) != 1:
            odd = next(number for number, layout in enumerate(layouts) if layout != layouts[0])
            raise LayoutError(
                f"streams 0 and {odd} of a batch differ in layout ({layouts[0]} against {layouts[odd]}); batch streams "
                "of equal length and frame size, or set the batch size to 1"
            )
        yield _joined(row)


def _joined(row: Sequence[Encoded]) -> Encoded:
    visual = [segment.visual for segment in row if segment.visual is not None]
    audio = [segment.audio for segment in row if segment.audio is not None]
    return replace(row[0], visual=torch.cat(visual) if visual else None, audio=torch.cat(audio) if audio else None)


@final
@dataclass(frozen=True, kw_only=True)
class Turn:
    """A question as the chat template will frame it, with the answer to learn from, if any."""

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
    def device(self) -> torch.device:
        """Where the text model lies."""
        return self.text_model.device

    @abstractmethod
    def encoder_weights(self) -> Iterator[Tensor]:
        """Weights of the frozen encoders, in a fixed order."""

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
        tracks: Tracks | None,
        chunk_tokens: int,
        batch: int = 1,
        cuts: Sequence[float] = (),
        system: str | None = None,
    ) -> Iterator[Chunk]:
        """The prompt's opening, then the stream in chunks of at most `chunk_tokens`.

        A chunk also ends with the last segment that is over at a cut, so that a question then sees nothing later.
        """

    @abstractmethod
    def framed(self, question: str, *, system: str | None = None) -> str:
        """The prompt as text, without the stream."""

    @abstractmethod
    def probe(self, text: str | None) -> list[int]:
        """Token ids of a text that is asked in place of questions; None: what the template puts after a question."""

    @abstractmethod
    def turn(self, turn: Turn, *, tracks: Tracks | None) -> tuple[list[int], list[int], list[int]]:
        """(ids, offsets, labels) of a question that closes `tracks` (None: nothing was streamed), then is asked."""
