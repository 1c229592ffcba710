"""From a sample to a stream: decode, encode (or take the encoders' outputs from a cache), cut, pack the questions."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from omnimem.attach import Seam
from omnimem.backbones import Backbone, Encoded, LayoutError, Turn, collate
from omnimem.backbones.base import Tracks
from omnimem.data import Sample
from omnimem.media import FileSource, LiveSource, MediaError, Source
from omnimem.policy import Policy
from omnimem.stream import PADDING, Prompt, Stream, StreamOptions
from omnimem.tokens import Chunk

IGNORED = -100
QUESTION_ROOM = 1024  # positions kept free for a question and its answer


@final
@dataclass(frozen=True, kw_only=True)
class Heard:
    """What was really seen and heard of a sample."""

    frames: int
    audio_seconds: float


@final
@dataclass(frozen=True, kw_only=True)
class Opened:
    """A sample whose segments are encoded; `tracks` says which it has."""

    sample: Sample
    segments: Sequence[Encoded]
    tracks: Tracks | None  # None: nothing of the stream is read
    heard: Heard

    @property
    def times(self) -> tuple[float | None, ...]:
        """When each question is asked, in seconds of the stream; None: after its end."""
        return tuple(None if q.at is None else q.at - self.sample.start for q in self.sample.questions)

    @property
    def moments(self) -> tuple[float | None, ...]:
        """The distinct times at which something is asked, in order; None, after the end, is the last."""
        during = sorted({time for time in self.times if time is not None})
        return (*during, None) if None in self.times else tuple(during)

    @property
    def tokens(self) -> int:
        """Audio and visual tokens of the stream."""
        return sum(segment.count for segment in self.segments)

    def asked(self, due: Sequence[float | None]) -> list[int]:
        """Numbers of the questions that are asked at these moments."""
        return [number for number, time in enumerate(self.times) if time in due]

    @property
    def layout(self) -> tuple[object, ...]:
        """What samples must share to pass together."""
        return (tuple(segment.layout for segment in self.segments), self.tracks, self.sample.system, self.moments)


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

    def open(self, sample: Sample) -> Opened:
        """Decode and encode a whole sample.

        Raises MediaError when a track that the options ask for is missing, or a file is unreadable or truncated.
        """
        tracks = tracks_of(sample, self.options.tracks)
        path = self._cached(sample, tracks)
        if path is not None and path.is_file():
            return _restored(sample, path, tracks, self.backbone.device)
        source = self._source(sample, tracks)
        segments = list(self.backbone.encode(source, fps=self.options.fps))
        if not segments:
            raise MediaError(sample.video or sample.audio or Path(sample.id), "empty", "holds no frame and no sound")
        opened = Opened(
            sample=sample,
            segments=segments,
            tracks=tracks,
            heard=Heard(frames=source.frames_seen, audio_seconds=source.audio_seconds_heard),
        )
        if path is not None:
            _store(opened, path)
        return opened

    def unseen(self, sample: Sample) -> Opened:
        """The sample without its stream: what a blind arm gets."""
        return Opened(sample=sample, segments=[], tracks=None, heard=Heard(frames=0, audio_seconds=0.0))

    def prompt_text(self, sample: Sample, question: str) -> str:
        """The whole prompt as text, the stream left out: its sha256 says whether two arms were asked the same."""
        return self.backbone.framed(question, system=sample.system)

    def _source(self, sample: Sample, tracks: Tracks) -> FileSource:
        options = self.options.source(tracks)
        return FileSource(
            sample.video or sample.audio or "",
            sample.audio,
            options=options,
            geometry=self.backbone.geometry,
            start=sample.start or 0.0,
            end=sample.end,
        )

    def stream(self, seam: Seam, policy: Policy, *, batch: int = 1, **settings: Any) -> Stream:
        """An empty stream; with `positions: compact` it stays within the positions the model was trained on."""
        compact = self.options.positions == "compact"
        last = self.backbone.trained_positions - QUESTION_ROOM if compact else None
        return Stream(seam, policy, batch=batch, last_position=last, **settings)

    def chunks(self, batch: Sequence[Opened], chunk_tokens: int | None = None) -> Iterator[Chunk]:
        """The opening and the chunks of samples of one layout, cut where questions are asked.

        `chunk_tokens` stands in for that of the options; what the encoders made is the same at any size.
        """
        first = batch[0]
        return self.backbone.chunks(
            collate([opened.segments for opened in batch]),
            tracks=first.tracks,
            chunk_tokens=chunk_tokens or self.options.chunk_tokens,
            batch=len(batch),
            cuts=[moment for moment in first.moments if moment is not None],
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

    def _cached(self, sample: Sample, tracks: Tracks) -> Path | None:
        if self.cache is None:
            return None
        setting = f"{self.encoder} {self.options.source(tracks)} {sample.start} {sample.end}"
        digest = hashlib.sha256(setting.encode())
        for path in (sample.video, sample.audio):
            if path is not None:
                if not path.is_file():
                    raise MediaError(path, "missing", "is not there; restore it or mend the manifest")
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return self.cache / f"{digest.hexdigest()}.safetensors"


def play(stream: Stream, chunks: Iterable[Chunk], moments: Sequence[float | None]) -> Iterator[list[float | None]]:
    """Feed the chunks, and yield the moments that have come whenever it is time to ask.

    A question at a moment sees the chunks that were over by then, and nothing later; None comes after the end.
    """
    waiting = list(moments)
    for chunk in chunks:
        due = [moment for moment in waiting if moment is not None and chunk.seconds > moment]
        if due:
            yield list(due)
            waiting = waiting[len(due) :]
        stream.feed(chunk)
    if waiting:
        yield waiting


def together(opened: Iterable[Opened], size: int) -> Iterator[list[Opened]]:
    """Samples in batches of at most `size` that share a layout, in order of first arrival."""
    waiting: dict[tuple[object, ...], list[Opened]] = {}
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


def fingerprint(backbone: Backbone) -> str:
    """sha256 of the encoders' weights and of the geometry they read."""
    digest = hashlib.sha256(f"{backbone.geometry}".encode())
    for tensor in backbone.encoder_weights():
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _store(opened: Opened, path: Path) -> None:
    """One file a sample, renamed into place when whole."""
    tensors, table = {}, []
    for number, segment in enumerate(opened.segments):
        for name, part in (("visual", segment.visual), ("audio", segment.audio)):
            if part is not None:
                tensors[f"{number}.{name}"] = part.contiguous()
        table.append([segment.grid, segment.start, segment.seconds, segment.seconds_per_grid])
    heard = [opened.heard.frames, opened.heard.audio_seconds]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{torch.initial_seed()}.{id(opened)}.part")
    save_file(tensors, part, metadata={"segments": json.dumps(table), "heard": json.dumps(heard)})
    part.replace(path)


def _restored(sample: Sample, path: Path, tracks: Tracks, device: torch.device) -> Opened:
    """The sample as `open` made it, on the device where it would be made."""
    with safe_open(path, framework="pt") as file:
        metadata, names = file.metadata(), set(file.keys())
        segments = []
        for number, (grid, start, seconds, spacing) in enumerate(json.loads(metadata["segments"])):
            parts = [
                file.get_tensor(f"{number}.{name}").to(device) if f"{number}.{name}" in names else None
                for name in ("visual", "audio")
            ]
            segments.append(
                Encoded(
                    visual=parts[0],
                    audio=parts[1],
                    grid=(grid[0], grid[1], grid[2]),
                    start=start,
                    seconds=seconds,
                    seconds_per_grid=spacing,
                )
            )
        frames, audio_seconds = json.loads(metadata["heard"])
    return Opened(
        sample=sample, segments=segments, tracks=tracks, heard=Heard(frames=frames, audio_seconds=audio_seconds)
    )
