"""A loaded model: encoding media, laying them out as tokens, cutting them into chunks, and tokenizing questions."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import tee, zip_longest
from pathlib import Path
from typing import Any, Literal, final

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from omnimem.backbones.projectors import Projector, Track, adapter_is_on
from omnimem.errors import UserError, counted
from omnimem.media import Geometry, Segment
from omnimem.tokens import Chunk, ChunkFacts, DeepStack, Modality, Tracks

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
    # of the projections of the decoder layers: NF4 with double quantization by bitsandbytes, on a GPU alone
    quantization: Literal["4bit"] | None = None
    processor: str | None = None  # folder or hub id with tokenizer and processors, if they are not at `path`


@final
@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One segment after the frozen encoders: the unit of the encoder cache, and the input of a layout.

    Both widths are that of the text model, but of tracks in `before`.
    """

    visual: Float[Tensor, "batch visual_tokens visual_width"] | None
    audio: Float[Tensor, "batch audio_tokens audio_width"] | None
    grid: tuple[int, int, int]  # time, rows and columns of the visual tokens; zeros without video
    start: float  # seconds
    seconds: float
    seconds_per_grid: float
    at: float | None = None  # a rest, as `Segment.at`
    # what the first decoder layers add at the visual tokens (Qwen3-VL), one tensor per layer
    deepstack: tuple[Float[Tensor, "batch visual_tokens visual_width"], ...] = ()
    repeated: int = 0  # frames of the last grid that repeat the one before, where timestamps depend on it
    # tracks whose tensors are the input of a projector that is trained, one row per token; `visual` has deepstack too
    before: tuple[Track, ...] = ()

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


def _joined(row: Sequence[Encoded]) -> Encoded:
    visual = [segment.visual for segment in row if segment.visual is not None]
    audio = [segment.audio for segment in row if segment.audio is not None]
    return replace(
        row[0],
        visual=torch.cat(visual) if visual else None,
        audio=torch.cat(audio) if audio else None,
        deepstack=tuple(torch.cat(levels) for levels in zip(*(segment.deepstack for segment in row), strict=True)),
    )


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


@final
@dataclass(frozen=True, kw_only=True)
class Part:
    """Consecutive tokens that are never in different chunks."""

    embeddings: Float[Tensor, "batch tokens width"]
    positions: Int[Tensor, "axes tokens"]
    modality: Int8[Tensor, " tokens"]
    place: Int[Tensor, "places tokens"]
    deepstack: tuple[Float[Tensor, "batch visual_tokens width"], ...] = ()
    next_position: int | None = None  # of text right after it, as in `Chunk`

    @property
    def count(self) -> int:
        """Number of tokens."""
        return self.embeddings.shape[1]

    def between(self, first: int, last: int) -> "Part":
        """Some of the tokens, with their own deepstack features, which are in order of the frames."""
        visual = self.modality == Modality.VISUAL
        before, inside = int(visual[:first].sum()), int(visual[first:last].sum())
        return Part(
            embeddings=self.embeddings[:, first:last],
            positions=self.positions[:, first:last],
            modality=self.modality[first:last],
            place=self.place[:, first:last],
            deepstack=tuple(level[:, before : before + inside] for level in self.deepstack) if inside else (),
            next_position=self.next_position,
        )


def raster(grid: tuple[int, int, int], first: int = 0) -> Int[Tensor, "3 tokens"]:
    """Frame (from `first`), row and column of the tokens of a grid, row by row."""
    time, rows, columns = grid
    return torch.stack(
        [
            torch.arange(first, first + time).repeat_interleave(rows * columns),
            torch.arange(rows).repeat_interleave(columns).repeat(time),
            torch.arange(columns).repeat(rows * time),
        ]
    )


class Layout(ABC):
    """Order, positions and places of the tokens of a stream, segment by segment.

    A copy (`copy.copy`) goes on alone, so that the rest before a question leaves nothing in the stream.
    """

    @abstractmethod
    def opening(self) -> Part:
        """The text before the stream."""

    @abstractmethod
    def push(self, segment: Encoded) -> list[Part]:
        """The tokens that are complete with this segment, in order."""

    @property
    def holds(self) -> bool:
        """Whether tokens of what was pushed are held back."""
        return False

    def finish(self) -> list[Part]:
        """The tokens that are held back, as if the stream ended now."""
        return []


class Backbone(ABC):
    """A checkpoint of one family: tokenizer, encoders, text model and head."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    geometry: Geometry
    folder: Path | None  # the checkpoint's local folder; None where it has none
    senses: tuple[Tracks, ...] = ("both", "video", "audio")  # the tracks that the model can read
    compacts: bool = True  # kept tokens may move up in time alone (`positions: compact`)
    mergeable: bool = True  # an adapter can be merged into the weights and saved
    stamped: bool = False  # frames have timestamps in the text, which may stand before groups of frames

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
    def encoder_settings(self) -> list[Any]:
        """Configurations of the encoders, on which their outputs depend beside the weights (key of the cache)."""
        config = getattr(self.model, "config", None)
        found = (getattr(config, name, None) for name in ("vision_config", "audio_config"))
        return [each for each in found if each is not None]

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
    def audio_tokens(self, mel_frames: int) -> int:
        """Number of audio tokens of the first `mel_frames` of a stream, whole segments before the last."""

    @abstractmethod
    def encode(self, segments: Iterable[Segment], *, fps: float, per_pass: int = 32) -> Iterator[Encoded]:
        """Encode segments with the frozen encoders, `per_pass` of them in one pass.

        Tracks whose projector is trained (`unprojected`) are left as its input.
        """

    @property
    def projectors(self) -> Mapping[Track, Projector]:
        """The modules between encoders and text model that an adapter may train (`tuning.lora.modules_to_save`)."""
        return {}

    @property
    def unprojected(self) -> tuple[Track, ...]:
        """The tracks whose projector an adapter has a copy of."""
        return tuple(track for track, each in self.projectors.items() if each.trained(self.model))

    def projected(self, encoded: Encoded, *, original: bool = False) -> Encoded:
        """A segment as the text model reads it: what `encode` left as input of a projector, after it.

        The projector is the adapter's while the adapter is on, in the graph; with `original`, or while it is off, that
        of the base model. Raises ValueError for a segment that was encoded before the adapter was loaded.
        """
        if self.device.type == "meta":
            return encoded
        lacking = [t for t in self.unprojected if getattr(encoded, t) is not None and t not in encoded.before]
        if lacking:
            raise ValueError(
                f"the {lacking[0]} tokens of a segment were made by the base model's projector, before an adapter with "
                "modules_to_save was loaded; encode it again"
            )
        if not encoded.before:
            return encoded
        original = original or not adapter_is_on(self.text_model)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not original):
            return self._through_projectors(encoded, original=original)

    def _through_projectors(self, encoded: Encoded, *, original: bool) -> Encoded:
        """`projected` of a family with `projectors`."""
        raise NotImplementedError(f"{type(self).__name__} has projectors and does not apply them")

    def embed(self, ids: Sequence[int]) -> Float[Tensor, "1 tokens width"]:
        """Embeddings of text; of width 0 where the model has no weights (meta device)."""
        if self.device.type == "meta":
            return torch.zeros(1, len(ids), 0)
        with torch.no_grad():
            return self.text_model.get_input_embeddings()(torch.tensor([ids], dtype=torch.long, device=self.device))

    @abstractmethod
    def layout(self, *, tracks: Tracks | None, batch: int, system: str | None, prefix: str, group: int) -> Layout:
        """The layout of a new stream after the text `prefix` of the user's turn.

        `group` is the number of frame grids that share a timestamp.
        """

    def chunks(
        self,
        segments: Iterable[Encoded],
        *,
        tracks: Tracks | None,
        chunk_tokens: int,
        batch: int = 1,
        cuts: Sequence[float] = (),
        system: str | None = None,
        prefix: str = "",
        group: int = 1,
        split: bool = False,
        inside: bool = False,
    ) -> Iterator[Chunk]:
        """The opening of the prompt, then the stream in chunks of at most `chunk_tokens` tokens.

        A chunk ends at the last part that fits or, with `inside`, after exactly `chunk_tokens` tokens of the whole
        prompt, be it within a frame (release). `split`: the parts of these chunks, each as soon as it is complete;
        `Chunk.joined` joins them.

        A chunk also ends with the last segment that is complete at a cut (seconds), so that a question asked at that
        time sees nothing later. A rest (`Encoded.at`), and what the layout holds back at a cut, become chunks of their
        own, which are not part of the stream. Raises LayoutError when tokens that belong together are more than
        `chunk_tokens`.

        While an adapter with projectors of its own is on, each chunk comes with itself as the base model's projectors
        make it (`Chunk.untuned`), for a selection by the base model.
        """
        settings: dict[str, Any] = {
            **{"tracks": tracks, "chunk_tokens": chunk_tokens, "batch": batch, "cuts": cuts, "system": system},
            **{"prefix": prefix, "group": group, "split": split, "inside": inside},
        }
        if not self.unprojected or not adapter_is_on(self.text_model):
            yield from self._chunks(segments, **settings)
            return
        tuned, untuned = tee(segments)
        pairs = zip(self._chunks(tuned, **settings), self._chunks(untuned, original=True, **settings), strict=True)
        for chunk, base in pairs:
            yield replace(chunk, untuned=base)

    def _chunks(
        self,
        segments: Iterable[Encoded],
        *,
        tracks: Tracks | None,
        chunk_tokens: int,
        batch: int,
        cuts: Sequence[float],
        system: str | None,
        prefix: str,
        group: int,
        split: bool,
        inside: bool,
        original: bool = False,
    ) -> Iterator[Chunk]:
        """`chunks`, with the projectors of the adapter or with `original` those of the base model."""
        # 1. the opening
        layout = self.layout(tracks=tracks, batch=batch, system=system, prefix=prefix, group=group)
        opening = layout.opening()
        yield replace(_chunk([opening], 0.0), tracks=tracks)
        # 2. the segments, and before each what precedes the questions up to it
        chunker = _Chunker(chunk_tokens, inside, opening.count % chunk_tokens, split=split)
        waiting = sorted(set(cuts))
        for segment in segments:
            if segment.at is None and not segment.count:  # audio of less than one token
                continue
            segment = self.projected(segment, original=original)
            end = segment.start + segment.seconds
            passed = [cut for cut in waiting if cut <= segment.start or (segment.at is None and cut < end)]
            if segment.at is not None or any(segment.start <= cut for cut in passed):
                yield from chunker.flush(more=layout.holds)
            for cut in passed:
                yield from _rest(copy(layout), None, cut, _Chunker(chunk_tokens, inside))
            waiting = [cut for cut in waiting if cut not in passed and cut != segment.at]
            if segment.at is not None:
                yield from _rest(copy(layout), segment, segment.at, _Chunker(chunk_tokens, inside))
            else:
                yield from chunker.add(layout.push(segment), end, f"a segment of {segment.seconds:g} s")
        # 3. what the layout held back until the end
        yield from chunker.add(layout.finish(), chunker.seconds, "the end of the stream")
        yield from chunker.flush()

    @abstractmethod
    def framed(self, question: str, *, system: str | None = None, prefix: str = "") -> str:
        """The prompt as text, without the stream."""

    @abstractmethod
    def probe(self, text: str | None) -> list[int]:
        """Token ids of a text used in place of a question; None: the part of the template after a question."""

    @abstractmethod
    def turn(self, turn: Turn, *, tracks: Tracks | None) -> tuple[list[int], list[int], list[int]]:
        """(ids, offsets, labels) of the end markers of `tracks` (None: nothing was streamed) and the question."""


class _Chunker:
    """Joins parts to chunks of at most `chunk_tokens` tokens; with `inside` parts are cut where a chunk is full.

    The first `before` tokens of the first chunk are already out. `split`: each part is a chunk.
    """

    def __init__(self, chunk_tokens: int, inside: bool = False, before: int = 0, *, split: bool = False) -> None:
        self.chunk_tokens, self.inside, self.split, self.seconds = chunk_tokens, inside, split, 0.0
        self._before = before if inside else 0
        self._held: list[Part] = []

    @property
    def room(self) -> int:
        """Tokens that the chunk can still take."""
        return self.chunk_tokens - self._before - sum(held.count for held in self._held)

    def add(self, parts: Sequence[Part], seconds: float, what: str) -> Iterator[Chunk]:
        """Add parts that need the stream up to `seconds`; yields the chunks that they complete."""
        for number, part in enumerate(parts):
            while self.inside and part.count > self.room:
                if fits := self.room:
                    self._held.append(part.between(0, fits))
                    self.seconds = seconds
                yield from self.flush(more=fits > 0 or number > 0)
                part = part.between(fits, part.count)
            if part.count > self.chunk_tokens:
                inside = "" if len(parts) == 1 else f"a part of {len(parts)} of "
                raise LayoutError(
                    f"{inside}{what} has {counted(part.count, 'token')}, more than "
                    f"stream.chunk_tokens = {self.chunk_tokens}; "
                    "raise stream.chunk_tokens, or lower stream.max_pixels or stream.fps"
                )
            if part.count > self.room:
                yield from self.flush(more=number > 0)
            self._held.append(part)
            self.seconds = seconds
            if self.split:
                yield from self.flush(more=number + 1 < len(parts))

    def flush(self, *, more: bool = False) -> Iterator[Chunk]:
        """The held parts as a chunk, if there are any; `more` up to the same time follow."""
        if self._held:
            held, self._held, self._before = self._held, [], 0
            yield replace(_chunk(held, self.seconds), more=more)


def _rest(layout: Layout, segment: Encoded | None, at: float, chunker: "_Chunker") -> Iterator[Chunk]:
    """The chunks between the stream and the end of a file that is cut at a question."""
    pushed = [] if segment is None or not segment.count else layout.push(segment)
    seconds = at if segment is None else segment.start + segment.seconds
    parts = [*pushed, *layout.finish()]
    chunks = [*chunker.add(parts, seconds, f"the rest before {at:g} s"), *chunker.flush()]
    yield from (replace(chunk, at=at, more=chunk is not chunks[-1]) for chunk in chunks)


def _chunk(parts: Sequence[Part], seconds: float) -> Chunk:
    """Parts of one stream, or of several with one layout, as a chunk."""
    batch, device = parts[0].embeddings.shape[0], parts[0].embeddings.device
    kinds = torch.cat([part.modality for part in parts])
    positions, place = (torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("positions", "place"))
    facts = ChunkFacts.of(positions[None], kinds[None], place[None])
    modality = kinds.to(device).expand(batch, -1)
    levels = zip(*(part.deepstack for part in parts if part.deepstack), strict=True)
    features = tuple(torch.cat(level, dim=1).flatten(0, 1) for level in levels)
    return Chunk(
        embeddings=torch.cat([part.embeddings for part in parts], dim=1),
        positions=positions.to(device).expand(batch, -1, -1),
        modality=modality,
        place=place.to(device).expand(batch, -1, -1),
        facts=facts._replace(ends=facts.ends * batch, times=facts.times * batch),
        deepstack=DeepStack(mask=modality == Modality.VISUAL, features=features) if features else None,
        seconds=seconds,
        next_position=parts[-1].next_position,
    )
