"""From a sample to a stream: decode and encode (or read the encoder outputs from a cache), cut, pack the questions."""

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, final, runtime_checkable

import torch
from torch import Tensor

from omnimem.backbones import Backbone, Encoded, LayoutError, Turn, collate
from omnimem.backbones.projectors import Track
from omnimem.data import Sample
from omnimem.media import Decoded, FileSource, FrameList, LiveSource, MediaError, Segment, Source, Video, probe
from omnimem.media.decode import TICK
from omnimem.policies.base import Policy, PolicyError, StreamOutline
from omnimem.rows import judge, tracks_of
from omnimem.streaming.attach import StreamedAttention
from omnimem.streaming.encoder_cache import (
    ENTRIES,
    EncodedSegment,
    EncoderCache,
    MediaStats,
    TrackSegment,
    in_order,
    joined,
    lacking,
)
from omnimem.streaming.options import StreamOptions
from omnimem.streaming.prompt_pass import Prompt, pack
from omnimem.streaming.stream import Stream
from omnimem.streaming.trained_range import TrainedRange
from omnimem.tokens import Chunk, Modality, Tracks

QUESTION_ROOM = 1024  # positions reserved for a question and its answer


@runtime_checkable
class Readable(Protocol):
    """A sample with encoded segments to cut chunks from, as a list or while they are decoded."""

    @property
    def sample(self) -> Sample: ...

    @property
    def segments(self) -> Iterable[Encoded]: ...

    @property
    def tracks(self) -> Tracks | None:
        """The tracks that are read; None: no stream."""
        ...


@final
@dataclass(frozen=True, kw_only=True)
class EncodedSample:
    """A sample with all its encoded segments."""

    sample: Sample
    segments: Sequence[Encoded]
    tracks: Tracks | None  # None: no stream
    heard: MediaStats

    @property
    def tokens(self) -> int:
        """Audio and visual tokens of the stream."""
        return sum(segment.count for segment in self.segments if segment.at is None)

    @property
    def layout(self) -> tuple[object, ...]:
        """The properties that samples of one batch must share."""
        return layout(self.sample, self.tracks, self.segments)

    @property
    def id(self) -> str:
        """The sample's id."""
        return self.sample.id

    @property
    def moments(self) -> tuple[float | None, ...]:
        """The distinct times of the questions; None: after the end."""
        return self.sample.moments

    def turns(self, due: Sequence[float | None]) -> list[Turn]:
        """The questions at these times with an answer to train on."""
        questions = self.sample.questions
        return [
            Turn(text=questions[number].text, answer=questions[number].answer)
            for number in self.sample.asked(due)
            if questions[number].loss and questions[number].answer is not None
        ]


def layout(sample: Sample, tracks: Tracks | None, segments: Iterable[Encoded]) -> tuple[object, ...]:
    """The properties that samples of one batch must share."""
    return (tuple(segment.layout for segment in segments), tracks, sample.system, sample.prefix, sample.moments)


@final
class Feeder:
    """Turns samples into chunks and prompts for one backbone and one set of stream options."""

    def __init__(
        self,
        backbone: Backbone,
        options: StreamOptions,
        cache: Path | EncoderCache | None = None,
        trained: TrainedRange | None = None,
    ) -> None:
        """`cache` is a folder for the outputs of the frozen encoders, or the cache of a feeder over the same encoders.

        `trained` notes streams beyond the trained positions; it may be shared with another feeder of the same model.
        Raises LayoutError as `require_supported`.
        """
        self.backbone, self.options = backbone, options
        require_supported(backbone, options)
        self.trained = trained or TrainedRange(backbone.trained_positions)
        self.decoding_seconds = 0.0  # spent so far in waiting for decoded segments
        self.cache = EncoderCache.of(backbone, cache) if isinstance(cache, Path) else cache

    # ------------------------------------------------------------------------------------ decoding and encoding

    def source(self, sample: Sample, tracks: Tracks | None = None) -> FileSource:
        """The file of a sample, up to the last question; `tracks`: those to decode (None: all that are read).

        Where questions are asked during the stream, audio after a question must not change its answer, and nothing is
        read after the last one. Raises MediaError as `tracks_of`.
        """
        read = tracks_of(sample, self.options.tracks)
        return FileSource(
            sample.video or sample.audio or "",
            sample.audio,
            options=self.options.source(tracks or read),
            geometry=self.backbone.geometry,
            start=sample.start,
            end=self._end(sample),
            asks=[time for time in sample.times if time is not None],
        )

    def undecoded(self, sample: Sample) -> FileSource | None:
        """The file of a sample with the tracks whose encoder outputs the cache lacks; None: it holds all of them."""
        source = self.source(sample)
        held = () if self.cache is None else {t for t, path in self.cache.paths(source).items() if path.is_file()}
        tracks = lacking(source, held)
        return None if tracks is None else self.source(sample, tracks).watched()

    def _end(self, sample: Sample) -> float | None:
        """Seconds of the file that are read; None: to its end."""
        during = [time for time in sample.times if time is not None]
        if not during or None in sample.times:
            return sample.end
        step = self.backbone.geometry.segment(self.options.fps)[0]
        last = sample.start + (math.floor(max(during) / step) + 1) * step
        return last if sample.end is None else min(last, sample.end)

    def open(self, sample: Sample, decoded: Decoded | None = None) -> EncodedSample:
        """Decode and encode a whole sample; `decoded` as in `read`.

        Raises MediaError when a track that the options ask for is missing, or a file is unreadable or truncated.
        """
        parts = list(self.read(sample, decoded))
        segments = [part.encoded for part in parts]
        tracks = tracks_of(sample, self.options.tracks)
        return EncodedSample(sample=sample, segments=segments, tracks=tracks, heard=parts[-1].heard)

    def read(self, sample: Sample, decoded: Decoded | None = None) -> Iterator[EncodedSegment]:
        """The segments of a sample one after the other: from the cache, or decoded and encoded on demand.

        `decoded` is `undecoded(sample)`, if it is decoded elsewhere. Raises MediaError as `open`.
        """
        tokens = 0
        for segment in joined(self._parts(sample, decoded)):
            tokens += segment.encoded.count
            yield segment
        _require(tokens, sample.shown)

    def _parts(self, sample: Sample, decoded: Decoded | None) -> Iterator[Collection[TrackSegment]]:
        """The tracks of each segment: from the cache, and those that it lacks decoded and encoded."""
        # 1. what the cache holds
        source, held, paths = self.source(sample), dict[Track, Iterable[TrackSegment]](), dict[Track, Path]()
        if self.cache is not None:
            paths = self.cache.paths(source.watched())
            loaded = ((track, self.cache.load(path, self.backbone.device, track)) for track, path in paths.items())
            held |= {track: entry for track, entry in loaded if entry is not None}
        tracks = lacking(source, held)
        if tracks is None:
            return in_order(held.values())
        # 2. the other tracks; `decoded` may be older than an entry
        if decoded is None or decoded.options.tracks not in (tracks, source.options.tracks):
            decoded = self.source(sample, tracks)
        made = self._encoded(decoded)
        if self.cache is None:
            return made
        segments = [part for parts in made for part in parts]
        for track in ENTRIES[tracks]:
            held[track] = of_track = [part for part in segments if part.track == track]
            if source.unchanged and decoded.unchanged:
                self.cache.store(paths[track], of_track)
            else:
                self.cache.not_stored("changed", f"{sample.shown} changed while it was read")
        return in_order(held.values())

    def _encoded(self, segments: Iterable[Segment]) -> Iterator[list[TrackSegment]]:
        """Encode segments; the tracks of each, as streams of one track have them."""
        alone: deque[dict[Track, tuple[float, MediaStats]]] = deque()

        def noted() -> Iterator[Segment]:
            for segment in self._timed(segments):
                alone.append(self._alone(segment))
                yield segment

        for encoded in self.backbone.encode(noted(), fps=self.options.fps):
            found = alone.popleft()
            yield [TrackSegment.of(track, encoded, *facts) for track, facts in found.items()]

    def _alone(self, segment: Segment) -> dict[Track, tuple[float, MediaStats]]:
        """The length of a segment with each of its tracks alone, and the media in it."""
        mel, found = self.backbone.geometry.mel, dict[Track, tuple[float, MediaStats]]()
        if segment.frames is not None:
            frames = segment.frames.shape[0]
            found["visual"] = segment.filled(frames / self.options.fps), MediaStats(frames=frames)
        if segment.mel is not None:
            heard = segment.audio_seconds if segment.padded else segment.mel.shape[1] * mel.hop / mel.rate
            found["audio"] = segment.filled(segment.audio_seconds), MediaStats(audio_seconds=heard)
        return found

    def _timed(self, segments: Iterable[Segment]) -> Iterator[Segment]:
        rest = iter(segments)
        while True:
            started = time.perf_counter()
            segment = next(rest, None)
            self.decoding_seconds += time.perf_counter() - started
            if segment is None:
                return
            yield segment

    def unseen(self, sample: Sample) -> EncodedSample:
        """The sample without its stream, for an arm that sees the question alone."""
        return EncodedSample(sample=sample, segments=[], tracks=None, heard=MediaStats())

    # --------------------------------------------------------------------------------- streams and their chunks

    def stream(self, attached: StreamedAttention, policy: Policy, *, batch: int = 1, **settings: Any) -> Stream:
        """An empty stream; with `positions: compact` it stays within the trained positions of the model."""
        if policy.traits.reindex and not self.backbone.compacts:
            raise PolicyError(
                f"policy {policy.name} moves kept tokens up in time, which {_IMMOBILE}; set reindex: false"
            )
        last = last_position(self.options.positions, self.backbone.trained_positions)
        device = self.backbone.device
        probes = [torch.tensor(self.backbone.probe(probe.text), device=device) for probe in policy.traits.probes]
        return Stream(
            attached, policy, batch=batch, last_position=last, probes=probes, trained=self.trained, **settings
        )

    def with_oracle(self, policy: Policy, batch: Sequence[Readable]) -> Policy:
        """The policy with the content of the streams, where it needs that; their segments are then read twice."""
        if not policy.traits.needs_oracle:
            return policy
        return policy.with_oracle([self.outline(readable) for readable in batch])

    def outline(self, readable: Readable) -> StreamOutline:
        """Modality and place of all tokens of a stream, and the tokens of its `meta.needles`.

        A needle is [second] for audio, or [second, y, x] for a frame, y and x from 0 (top, left) to 1.
        """
        segments, sample = [each for each in readable.segments if each.at is None], readable.sample
        chunks = self.backbone.chunks(
            iter(segments),
            tracks=readable.tracks,
            chunk_tokens=self.options.chunk_tokens,
            inside=self.options.cut == "tokens",
            system=sample.system,
            prefix=sample.prefix,
            group=self._group_of(readable),
        )
        kinds, places = zip(*((chunk.modality[0], chunk.places[0]) for chunk in chunks), strict=True)
        outline = StreamOutline(modality=torch.cat(kinds).cpu(), place=torch.cat(places, dim=1).cpu())
        needles = sample.meta.get("needles", ())
        return replace(outline, needles=tuple(_token_at(outline, segments, needle) for needle in needles))

    def chunks(
        self, batch: Sequence[Readable], chunk_tokens: int | None = None, *, rests: bool = False
    ) -> Iterator[Chunk]:
        """The opening and the chunks of samples of one layout, cut where questions are asked.

        `chunk_tokens` overrides that of the options; encoder outputs do not depend on it. With `rests`, the rests
        before the questions too, for `feed_until_due`, which feeds them to forks.
        """
        first = batch[0]
        return self.backbone.chunks(
            (each for each in collate([readable.segments for readable in batch]) if rests or each.at is None),
            tracks=first.tracks,
            chunk_tokens=chunk_tokens or self.options.chunk_tokens,
            inside=self.options.cut == "tokens",
            batch=len(batch),
            cuts=[moment for moment in first.sample.moments if moment is not None],
            system=first.sample.system,
            prefix=first.sample.prefix,
            group=self._group_of(first),
        )

    def _group_of(self, readable: Readable) -> int:
        """Frame grids that share a timestamp: counted, or from the length that the file declares."""
        if self.options.timestamps is None or readable.tracks in (None, "audio"):
            return 1
        if isinstance(readable.segments, Sequence):
            return self._group(sum(segment.grid[0] for segment in readable.segments if segment.at is None))
        sample = readable.sample
        return self._group(self._grids(judge(sample, self.options.tracks).video_seconds, sample.start, sample.end))

    def _group(self, grids: int) -> int:
        """ceil(grids / timestamps), 1 if there are fewer grids than timestamps (release)."""
        return max(1, math.ceil(grids / (self.options.timestamps or grids or 1)))

    def _grids(self, seconds: float, start: float, end: float | None) -> int:
        """Frame grids of a file of this length."""
        last = seconds if end is None else min(seconds, end)
        return math.ceil(math.ceil((last - start) * self.options.fps - TICK) / self.backbone.geometry.temporal_patch)

    def watch(
        self,
        source: Source | Video | str,
        *,
        cuts: Sequence[float] = (),
        split: bool = False,
        seen: Callable[[Segment], None] | None = None,
    ) -> Iterator[Chunk]:
        """The opening and the chunks of a file or a live stream, each decoded and encoded on demand.

        `split` as in `Backbone.chunks`; `seen` is called with every decoded segment.

        A chunk also ends at each of the `cuts`, in seconds, so that a question at that time sees nothing later. A
        source with `asks` yields the rests before these times too, which `feed_until_due` feeds to forks.
        Raises MediaError as `open`.
        """
        if not isinstance(source, Source):
            video = source if isinstance(source, FrameList) else Path(source)
            source = self.source(Sample(id=str(source), video=video, audio=None, messages=()))
        group = 1
        if self.options.timestamps is not None:
            if not isinstance(source, FileSource):
                raise LayoutError("stream.timestamps: a live stream has no total; set it to null, one per frame grid")
            group = self._group(self._grids(probe(source.path).video_seconds, source.start, source.end))
        per_pass = 1 if isinstance(source, LiveSource) else 32  # segments of a live stream do not wait for others
        path = source.path if isinstance(source, FileSource) else Path("-")
        return self.backbone.chunks(
            _not_empty(self.backbone.encode(_shown(source, seen), fps=self.options.fps, per_pass=per_pass), path),
            tracks=source.options.tracks,
            chunk_tokens=self.options.chunk_tokens,
            inside=self.options.cut == "tokens",
            cuts=cuts,
            group=group,
            split=split,
        )

    # ------------------------------------------------------------------------------------------------ questions

    def answers(
        self,
        stream: Stream,
        questions: Sequence[str],
        *,
        max_new_tokens: int = 16,
        head: Callable[[Tensor], Tensor] | None = None,
    ) -> list[str]:
        """Greedy answers to questions about one stream; the stream does not change.

        `head` replaces the backbone's own; it is called for every new token.
        """
        rows = stream.answer(
            self.prompt([[Turn(text=question) for question in questions]], stream.tracks),
            head or self.backbone.head,
            stop=self.backbone.stop,
            max_new_tokens=max_new_tokens,
        )
        return [str(self.backbone.tokenizer.decode(ids, skip_special_tokens=True)) for ids in rows[0]]

    def prompt(self, rows: Sequence[Sequence[Turn]], tracks: Tracks | None) -> Prompt:
        """The questions of each stream packed into one row; shorter rows are padded."""
        asked = [[self.backbone.turn(turn, tracks=tracks) for turn in turns] for turns in rows]
        return pack(asked, fill=self.backbone.stop[0], device=self.backbone.device)


def _not_empty(segments: Iterable[Encoded], path: Video | str) -> Iterator[Encoded]:
    """The segments; raises MediaError at their end when they hold no token."""
    tokens = 0
    for segment in segments:
        tokens += segment.count
        yield segment
    _require(tokens, path)


def _require(tokens: int, path: Video | str) -> None:
    """Raises MediaError for a stream without a token."""
    if not tokens:
        what = "holds no frame, and too little audio for one token; choose a longer clip"
        raise MediaError(path, "empty", what)


def _shown(segments: Iterable[Segment], seen: Callable[[Segment], None] | None) -> Iterable[Segment]:
    """The segments, each after a call of `seen`."""
    for segment in segments:
        if seen is not None:
            seen(segment)
        yield segment


_IMMOBILE = "this model cannot (rows and columns of its positions move with the time)"


def require_supported(backbone: Backbone, options: StreamOptions) -> None:
    """Raises LayoutError when the model cannot read a stream as the options ask."""
    try:
        backbone.geometry.segment(options.fps)
    except ValueError as error:
        raise LayoutError(f"stream.{error}") from error
    if options.source().tracks not in backbone.senses:
        can = " or ".join(backbone.senses)
        raise LayoutError(f"stream.tracks = {options.tracks}: the model has no audio encoder; set stream.tracks: {can}")
    if options.positions == "compact" and not backbone.compacts:
        raise LayoutError(f"stream.positions = compact moves kept tokens up in time, which {_IMMOBILE}; set original")
    last_position(options.positions, backbone.trained_positions)
    if options.timestamps is not None and not backbone.stamped:
        raise LayoutError("stream.timestamps: the layout of this model has no timestamps; set it to null")


def last_position(positions: Literal["original", "compact"], trained: int) -> int | None:
    """The position below which a stream stays; None: no limit. Raises LayoutError for a model of too few positions."""
    if positions == "original":
        return None
    if trained <= QUESTION_ROOM:
        raise LayoutError(
            f"stream.positions = compact leaves {QUESTION_ROOM:,} positions to questions, and the model was trained on "
            f"{trained:,} in all; set stream.positions: original"
        )
    return trained - QUESTION_ROOM


def _token_at(outline: StreamOutline, segments: Sequence[Encoded], needle: Sequence[float]) -> int:
    """Arrival number of the token that holds a needle."""
    at, *place = needle
    if not place:
        audio = (outline.modality == Modality.AUDIO).nonzero()[:, 0]
        return int(audio[min(len(audio) - 1, int(at * len(audio) / sum(segment.seconds for segment in segments)))])
    visual = (outline.modality == Modality.VISUAL).nonzero()[:, 0]
    time, *space = outline.place[:3, visual]
    found = time == time.unique()[int(at / segments[0].seconds_per_grid)]
    for axis, part in zip(space, place, strict=True):
        found &= axis == axis.min() + int(part * int(axis.max() - axis.min() + 1))
    return int(visual[found][0])


@final
@dataclass(frozen=True, kw_only=True)
class Due:
    """Questions that are to be asked now, and the stream that they read."""

    stream: Stream  # the stream itself, or a fork that also read the rest before a moment
    moments: list[float | None]
    seconds: float  # of the stream that it has read


def feed_until_due(stream: Stream, chunks: Iterable[Chunk], moments: Sequence[float | None]) -> Iterator[Due]:
    """Feed the chunks to the stream, and yield the due moments whenever it is time to ask.

    A question at a moment sees everything before it and nothing later: the chunks that end by then, and where it is
    within a segment, the rest, which is fed to a fork alone. The fork reads the rest as the last chunk: it attends to
    [memory ; rest], then evicts until the budget holds. None, and a moment that the stream does not reach, is due after
    the end. After the last moment nothing is read.
    """
    waiting, seconds, fork = list(moments), 0.0, None
    for chunk in chunks:
        # 1. a rest, for the fork of its question
        if chunk.at is not None:
            if chunk.at in waiting:
                fork = fork or stream.fork()
                fork.feed(chunk)
                if chunk.more:
                    continue
                waiting.remove(chunk.at)
                yield Due(stream=fork, moments=[chunk.at], seconds=chunk.seconds)
                if not torch.is_grad_enabled():
                    fork.forget()
                fork = None
            continue
        # 2. moments before the chunk ends
        due = [moment for moment in waiting if moment is not None and chunk.seconds > moment]
        if due:
            waiting = waiting[len(due) :]
            yield Due(stream=stream, moments=list(due), seconds=seconds)
        if not waiting:
            return
        # 3. the chunk, and moments at its end, which need not wait for the next one
        stream.feed(chunk)
        seconds = chunk.seconds
        due = [moment for moment in waiting if moment == seconds and not chunk.more]
        if due:
            waiting = waiting[len(due) :]
            yield Due(stream=stream, moments=list(due), seconds=seconds)
            if not waiting:
                return
    if waiting:
        yield Due(stream=stream, moments=waiting, seconds=seconds)


def batch_by_layout(encoded: Iterable[EncodedSample], size: int) -> Iterator[list[EncodedSample]]:
    """Samples in batches of at most `size` that share a layout, in order of first arrival."""
    waiting: dict[tuple[object, ...], list[EncodedSample]] = {}
    for sample in encoded:
        batch = waiting.setdefault(sample.layout, [])
        batch.append(sample)
        if len(batch) == size:
            yield waiting.pop(sample.layout)
    yield from waiting.values()
