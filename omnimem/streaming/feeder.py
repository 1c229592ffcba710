"""From a sample to a stream: decode, encode (or take the encoders' outputs from a cache), cut, pack the questions."""

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, final, runtime_checkable

import torch
from torch import Tensor

from omnimem.backbones import Backbone, Encoded, LayoutError, Turn, collate
from omnimem.backbones.base import Tracks
from omnimem.data import Sample
from omnimem.media import FileSource, LiveSource, MediaError, Segment, Source
from omnimem.policies.base import Policy, StreamOutline
from omnimem.streaming.attach import StreamedAttention
from omnimem.streaming.encoder_cache import (
    FORMAT,
    EncodedSegment,
    MediaStats,
    fingerprint,
    restore_segments,
    store_segments,
)
from omnimem.streaming.options import StreamOptions
from omnimem.streaming.prompt_pass import PADDING, Prompt
from omnimem.streaming.stream import Stream
from omnimem.tokens import Chunk, Modality

IGNORED = -100
QUESTION_ROOM = 1024  # positions kept free for a question and its answer


@runtime_checkable
class Readable(Protocol):
    """What chunks are cut from: the encoded segments of a sample, as a list or as they come."""

    @property
    def sample(self) -> Sample: ...

    @property
    def segments(self) -> Iterable[Encoded]: ...

    @property
    def tracks(self) -> Tracks | None:
        """None: nothing of the stream is read."""
        ...


@final
@dataclass(frozen=True, kw_only=True)
class EncodedSample:
    """A sample whose segments are encoded; `tracks` says which it has."""

    sample: Sample
    segments: Sequence[Encoded]
    tracks: Tracks | None  # None: nothing of the stream is read
    heard: MediaStats

    @property
    def moments(self) -> tuple[float | None, ...]:
        """The distinct times at which something is asked, in order; None, after the end, is the last."""
        return self.sample.moments

    @property
    def tokens(self) -> int:
        """Audio and visual tokens of the stream."""
        return sum(segment.count for segment in self.segments)

    def asked(self, due: Sequence[float | None]) -> list[int]:
        """Numbers of the questions that are asked at these moments."""
        return self.sample.asked(due)

    @property
    def layout(self) -> tuple[object, ...]:
        """What samples must share to pass together."""
        return layout(self.sample, self.tracks, self.segments)


def layout(sample: Sample, tracks: Tracks | None, segments: Iterable[Encoded]) -> tuple[object, ...]:
    """What samples must share to pass together."""
    return (tuple(segment.layout for segment in segments), tracks, sample.system, sample.moments)


@final
class Feeder:
    """Turns samples into chunks and prompts for one backbone and one way of reading."""

    def __init__(
        self, backbone: Backbone, options: StreamOptions, cache: Path | None = None, *, encoder: str | None = None
    ) -> None:
        """With a cache folder, what the frozen encoders made of a file is kept there under its sha256.

        `encoder` is the fingerprint of the encoders, for another feeder over the same ones. Raises LayoutError when
        no frame grid ends with an audio block at this rate.
        """
        self.backbone, self.options, self.cache = backbone, options, cache
        try:
            backbone.geometry.segment(options.fps)
        except ValueError as error:
            raise LayoutError(f"stream.{error}") from error
        self.encoder = encoder or (fingerprint(backbone) if cache is not None else "")

    def open(self, sample: Sample) -> EncodedSample:
        """Decode and encode a whole sample.

        Raises MediaError when a track that the options ask for is missing, or a file is unreadable or truncated.
        """
        parts = list(self.read(sample))
        segments = [part.encoded for part in parts]
        tracks = tracks_of(sample, self.options.tracks)
        return EncodedSample(sample=sample, segments=segments, tracks=tracks, heard=parts[-1].heard)

    def read(self, sample: Sample, decoded: Iterable[Segment] | None = None) -> Iterator[EncodedSegment]:
        """The segments of a sample as they come: from the cache, or decoded and encoded on the way.

        `decoded` are the segments of `source(sample)` where something else reads it. Raises MediaError as `open`.
        """
        path = self._cached(sample)
        if path is not None and path.is_file():
            yield from restore_segments(path, self.backbone.device)
            return
        parts = self._encoded(sample, self.source(sample) if decoded is None else decoded)
        if path is not None:
            parts = list(parts)
            store_segments(parts, path)
        yield from parts

    def _encoded(self, sample: Sample, segments: Iterable[Segment]) -> Iterator[EncodedSegment]:
        mel, total = self.backbone.geometry.mel, MediaStats()
        heard: deque[MediaStats] = deque()

        def counted() -> Iterator[Segment]:
            nonlocal total
            for segment in segments:
                frames = 0 if segment.frames is None else segment.frames.shape[0]
                seconds = 0.0 if segment.mel is None else segment.mel.shape[1] * mel.hop / mel.rate
                total = MediaStats(frames=total.frames + frames, audio_seconds=total.audio_seconds + seconds)
                heard.append(total)
                yield segment

        for encoded in self.backbone.encode(counted(), fps=self.options.fps):
            yield EncodedSegment(encoded=encoded, heard=heard.popleft())
        if total == MediaStats():
            raise MediaError(sample.video or sample.audio or Path(sample.id), "empty", "holds no frame and no sound")

    def stored(self, sample: Sample) -> bool:
        """Whether the cache has what the encoders made of a sample, so that nothing of it need be decoded."""
        path = self._cached(sample)
        return path is not None and path.is_file()

    def unseen(self, sample: Sample) -> EncodedSample:
        """The sample without its stream: what a blind arm gets."""
        return EncodedSample(sample=sample, segments=[], tracks=None, heard=MediaStats())

    def prompt_text(self, sample: Sample, question: str) -> str:
        """The whole prompt as text, the stream left out: its sha256 says whether two arms were asked the same."""
        return self.backbone.framed(question, system=sample.system)

    def source(self, sample: Sample) -> FileSource:
        """The file of a sample, as far as it is asked about.

        Where questions are asked on the way, nothing that is heard later may change what they are answered from, and
        after the last of them nothing is read. Raises MediaError as `tracks_of`.
        """
        return FileSource(
            sample.video or sample.audio or "",
            sample.audio,
            options=self.options.source(tracks_of(sample, self.options.tracks)),
            geometry=self.backbone.geometry,
            start=sample.start,
            end=self._end(sample),
            causal=any(time is not None for time in sample.times),
        )

    def _end(self, sample: Sample) -> float | None:
        """Seconds of the file after which nothing of it is needed; None: its end."""
        during = [time for time in sample.times if time is not None]
        if not during or None in sample.times:
            return sample.end
        step = self.backbone.geometry.segment(self.options.fps)[0]
        last = sample.start + (math.floor(max(during) / step) + 1) * step
        return last if sample.end is None else min(last, sample.end)

    def stream(self, attached: StreamedAttention, policy: Policy, *, batch: int = 1, **settings: Any) -> Stream:
        """An empty stream; with `positions: compact` it stays within the positions the model was trained on."""
        compact = self.options.positions == "compact"
        last = self.backbone.trained_positions - QUESTION_ROOM if compact else None
        device = self.backbone.device
        probes = [torch.tensor(self.backbone.probe(probe.text), device=device) for probe in policy.probes]
        return Stream(attached, policy, batch=batch, last_position=last, probes=probes, **settings)

    def with_oracle(self, policy: Policy, batch: Sequence[Readable]) -> Policy:
        """The policy, told what the streams will hold where it asks to know; their segments must pass twice then."""
        return policy.with_oracle([self.outline(readable) for readable in batch]) if policy.needs_oracle else policy

    def outline(self, readable: Readable) -> StreamOutline:
        """What a stream will hold: its tokens and their places, and which of them its `meta.needles` are.

        A needle is [second] of sound, or [second, y, x] of a picture, from its top left corner 0, 0 to 1, 1.
        """
        segments, sample = list(readable.segments), readable.sample
        chunks = self.backbone.chunks(
            iter(segments), tracks=readable.tracks, chunk_tokens=self.options.chunk_tokens, system=sample.system
        )
        kinds, positions = zip(*((chunk.modality[0], chunk.positions[0]) for chunk in chunks), strict=True)
        outline = StreamOutline(modality=torch.cat(kinds).cpu(), positions=torch.cat(positions, dim=1).cpu())
        needles = sample.meta.get("needles", ())
        return replace(outline, needles=tuple(_token_at(outline, segments, needle) for needle in needles))

    def chunks(self, batch: Sequence[Readable], chunk_tokens: int | None = None) -> Iterator[Chunk]:
        """The opening and the chunks of samples of one layout, cut where questions are asked.

        `chunk_tokens` stands in for that of the options; what the encoders made is the same at any size.
        """
        first = batch[0]
        return self.backbone.chunks(
            collate([readable.segments for readable in batch]),
            tracks=first.tracks,
            chunk_tokens=chunk_tokens or self.options.chunk_tokens,
            batch=len(batch),
            cuts=[moment for moment in first.sample.moments if moment is not None],
            system=first.sample.system,
        )

    def watch(self, source: Source | Path | str, *, cuts: Sequence[float] = ()) -> Iterator[Chunk]:
        """The opening and the chunks of a file or a live stream, each decoded and encoded when it is asked for.

        A chunk also ends at each of the `cuts`, in seconds, so that a question then sees nothing later.
        Raises MediaError as `open`.
        """
        if not isinstance(source, Source):
            source = FileSource(source, options=self.options.source(), geometry=self.backbone.geometry)
        together = 1 if isinstance(source, LiveSource) else 32  # segments of a live stream do not wait for others
        return self.backbone.chunks(
            self.backbone.encode(source, fps=self.options.fps, together=together),
            tracks=source.options.tracks,
            chunk_tokens=self.options.chunk_tokens,
            cuts=cuts,
        )

    def answers(
        self,
        stream: Stream,
        questions: Sequence[str],
        *,
        max_new_tokens: int = 16,
        head: Callable[[Tensor], Tensor] | None = None,
    ) -> list[str]:
        """Greedy answers to questions about one stream as it stands; it does not remember having been asked.

        `head` stands in for the backbone's own: it sees every token come.
        """
        rows = stream.answer(
            self.prompt([[Turn(text=question) for question in questions]], self.options.tracks),
            head or self.backbone.head,
            stop=self.backbone.stop,
            max_new_tokens=max_new_tokens,
        )
        return [str(self.backbone.tokenizer.decode(ids, skip_special_tokens=True)) for ids in rows[0]]

    def prompt(self, rows: Sequence[Sequence[Turn]], tracks: Tracks | None) -> Prompt:
        """The questions of each stream packed into one row; shorter rows are padded."""
        packed = [self._row(turns, tracks) for turns in rows]
        width = max(row.shape[1] for row in packed)
        fill = torch.tensor([[self.backbone.stop[0]], [PADDING], [0], [IGNORED]])
        padded = [torch.cat([row, fill.expand(4, width - row.shape[1])], dim=1) for row in packed]
        ids, segments, offsets, labels = torch.stack(padded, dim=1).to(self.backbone.device)
        return Prompt(ids=ids, segments=segments, offsets=offsets, labels=labels)

    def _row(self, turns: Iterable[Turn], tracks: Tracks | None) -> Tensor:
        """ids, segments, offsets and labels of one row, stacked."""
        columns: list[tuple[int, int, int, int]] = []
        for number, turn in enumerate(turns):
            ids, offsets, labels = self.backbone.turn(turn, tracks=tracks)
            columns += [(i, number, o, label) for i, o, label in zip(ids, offsets, labels, strict=True)]
        return torch.tensor(columns, dtype=torch.long).reshape(-1, 4).T

    def _cached(self, sample: Sample) -> Path | None:
        if self.cache is None:
            return None
        source = self.source(sample)
        span = f"{source.start} {source.end}{' causal' if source.causal else ''}"
        digest = hashlib.sha256(f"{FORMAT} {self.encoder} {source.options} {span}".encode())
        for path in (sample.video, sample.audio):
            if path is not None:
                if not path.is_file():
                    raise MediaError(path, "missing", "is not there; restore it or mend the manifest")
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return self.cache / f"{digest.hexdigest()}.safetensors"


def _token_at(outline: StreamOutline, segments: Sequence[Encoded], needle: Sequence[float]) -> int:
    """Arrival number of the token that shows or sounds a needle."""
    at, *place = needle
    if not place:
        sound = (outline.modality == Modality.AUDIO).nonzero()[:, 0]
        return int(sound[min(len(sound) - 1, int(at * len(sound) / sum(segment.seconds for segment in segments)))])
    visual = (outline.modality == Modality.VISUAL).nonzero()[:, 0]
    time, *space = outline.positions[:, visual]
    mine = time == time.unique()[int(at / segments[0].seconds_per_grid)]
    for axis, part in zip(space, place, strict=True):
        mine &= axis == axis.min() + int(part * int(axis.max() - axis.min() + 1))
    return int(visual[mine][0])


def feed_until_due(
    stream: Stream, chunks: Iterable[Chunk], moments: Sequence[float | None]
) -> Iterator[list[float | None]]:
    """Feed the chunks, and yield the moments that have come whenever it is time to ask.

    A question at a moment sees the chunks that were over by then, and nothing later; None comes after the end, and so
    does a moment that the stream does not reach. After the last moment nothing is read.
    """
    waiting = list(moments)
    for chunk in chunks:
        due = [moment for moment in waiting if moment is not None and chunk.seconds > moment]
        if due:
            yield list(due)
            waiting = waiting[len(due) :]
        if not waiting:
            return
        stream.feed(chunk)
    if waiting:
        yield waiting


def batch_by_layout(opened: Iterable[EncodedSample], size: int) -> Iterator[list[EncodedSample]]:
    """Samples in batches of at most `size` that share a layout, in order of first arrival."""
    waiting: dict[tuple[object, ...], list[EncodedSample]] = {}
    for one in opened:
        batch = waiting.setdefault(one.layout, [])
        batch.append(one)
        if len(batch) == size:
            yield waiting.pop(one.layout)
    yield from waiting.values()


def tracks_of(sample: Sample, asked: Tracks) -> Tracks:
    """The tracks to read: those asked for, or the only one that the manifest names.

    Raises MediaError when an audio-only sample is asked for its pictures.
    """
    if sample.video is not None:
        return asked
    if asked == "video":
        raise MediaError(sample.audio or Path(sample.id), "no_video", "has sound only, but stream.tracks is video")
    return "audio"
