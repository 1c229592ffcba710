"""The interface of a model family: encoding media, cutting them into chunks, and tokenizing questions."""

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
from omnimem.tokens import Chunk, Tracks

IGNORED = -100  # label of a token that predicts nothing to learn


class LayoutError(UserError):
    """A stream that cannot be cut into chunks as configured; the message says why and how to fix it."""


@final
@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The checkpoint and its precision."""

    path: str  # a local folder or a hub id
    # of the weights; under DeepSpeed that of train.bf16 or fp16
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    system: str | None = None  # None: the chat template's own system text
    adapter: str | None = None  # folder of an exported adapter that training starts from


@final
@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One segment after the frozen encoders: the unit of the encoder cache, and the input of a chunk."""

    visual: Float[Tensor, "batch visual_tokens width"] | None
    audio: Float[Tensor, "batch audio_tokens width"] | None
    grid: tuple[int, int, int]  # time, rows and columns of the visual tokens; zeros without video
    start: float  # seconds
    seconds: float
    seconds_per_grid: float
    at: float | None = None  # a rest, as `Segment.at`

    @property
    def layout(self) -> tuple[object, ...]:
        """The properties that segments of one batch must share."""
        audio = 0 if self.audio is None else self.audio.shape[1]
        return (self.grid, audio, self.start, self.seconds, self.seconds_per_grid, self.at)

    @property
    def count(self) -> int:
        """Audio and visual tokens of the segment."""
        return sum(part.shape[1] for part in (self.visual, self.audio) if part is not None)


def collate(streams: Sequence[Iterable[Encoded]]) -> Iterator[Encoded]:
    """Join streams of one layout into a batch, lazily, segment by segment.

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
                f"streams 0 and {odd} of a batch differ in layout ({layouts[0]} and {layouts[odd]}); batch streams "
                "of equal length and frame size, or set the batch size to 1"
            )
        yield _joined(row)


def grouped(segments: Iterable[Encoded], *, chunk_tokens: int, cuts: Sequence[float]) -> Iterator[list[Encoded]]:
    """Segments joined up to `chunk_tokens` tokens, never across a cut (seconds); a rest (`Encoded.at`) stays alone.

    Raises LayoutError when a single segment is larger than `chunk_tokens`.
    """
    pending: list[Encoded] = []
    for segment in segments:
        if segment.count > chunk_tokens:
            raise LayoutError(
                f"a segment of {segment.seconds:g} s has {segment.count} tokens, more than stream.chunk_tokens = "
                f"{chunk_tokens}; raise stream.chunk_tokens, or lower stream.max_pixels or stream.fps"
            )
        if not segment.count:  # audio of less than one token
            continue
        if segment.at is not None:
            if pending:
                yield pending
                pending = []
            yield [segment]
            continue
        full = sum(held.count for held in pending) + segment.count > chunk_tokens
        cut_here = any(segment.start <= cut < segment.start + segment.seconds for cut in cuts)
        if pending and (full or cut_here):
            yield pending
            pending = []
        pending.append(segment)
    if pending:
        yield pending


def _joined(row: Sequence[Encoded]) -> Encoded:
    visual = [segment.visual for segment in row if segment.visual is not None]
    audio = [segment.audio for segment in row if segment.audio is not None]
    return replace(row[0], visual=torch.cat(visual) if visual else None, audio=torch.cat(audio) if audio else None)


@final
@dataclass(frozen=True, kw_only=True)
class Turn:
    """A question, and the answer to learn from, if any.

    `ids` replaces the text by ready token ids, which are read as they are. `given` is the beginning of the answer: the
    model reads it, and is not trained on it.
    """

    text: str = ""
    answer: str | None = None
    ids: tuple[int, ...] | None = None
    given: str = ""


def labelled(asked: Sequence[int], answer: Sequence[int]) -> tuple[list[int], list[int]]:
    """(ids, labels) of a question and the answer after it: a label is at the token that predicts it, else -100."""
    ids = [*asked, *answer]
    if not answer:
        return ids, [IGNORED] * len(ids)
    return ids, [IGNORED] * (len(asked) - 1) + [*answer, IGNORED]


class Backbone(ABC):
    """A checkpoint of one family: tokenizer, encoders, text model and head."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    geometry: Geometry
    folder: Path | None  # the checkpoint's local folder; None where it has none

    @property
    @abstractmethod
    def text_model(self) -> PreTrainedModel:
        """The decoder that processes a stream."""

    @property
    def device(self) -> torch.device:
        """Device of the text model."""
        return self.text_model.device

    @abstractmethod
    def encoder_weights(self) -> Iterator[Tensor]:
        """Weights of the frozen encoders, in a fixed order."""

    @property
    @abstractmethod
    def head(self) -> nn.Module:
        """The language-model head: hidden states to logits."""

    @property
    @abstractmethod
    def stop(self) -> tuple[int, ...]:
        """Token ids that end an answer."""

    @property
    @abstractmethod
    def trained_positions(self) -> int:
        """Number of positions that the model was trained on."""

    @abstractmethod
    def encode(self, segments: Iterable[Segment], *, fps: float, per_pass: int = 32) -> Iterator[Encoded]:
        """Encode segments with the frozen encoders, `per_pass` of them in one pass."""

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
        """The opening of the prompt, then the stream in chunks of at most `chunk_tokens` tokens.

        A chunk also ends with the last segment that is complete at a cut (seconds), so that a question asked at that
        time sees nothing later. A rest (`Encoded.at`) becomes a chunk of its own, which is not part of the stream.
        """

    @abstractmethod
    def framed(self, question: str, *, system: str | None = None) -> str:
        """The prompt as text, without the stream."""

    @abstractmethod
    def probe(self, text: str | None) -> list[int]:
        """Token ids of a text used in place of a question; None: the part of the template after a question."""

    @abstractmethod
    def turn(self, turn: Turn, *, tracks: Tracks | None) -> tuple[list[int], list[int], list[int]]:
        """(ids, offsets, labels) of the end markers of `tracks` (None: nothing was streamed) and the question."""
