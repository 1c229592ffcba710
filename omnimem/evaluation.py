"""One arm over one benchmark: every stream read once, all its questions asked on forks, one line a question."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, final

import torch

from omnimem.attach import Seam
from omnimem.backbones import Turn
from omnimem.benchmarks import Benchmark, BenchmarkOptions
from omnimem.data import Failure, Failures, Sample
from omnimem.feeding import Feeder, Opened, play, together
from omnimem.media import MediaError
from omnimem.policy import Policy
from omnimem.run import append_line, write_json
from omnimem.stream import Stream
from omnimem.tokens import EVICTABLE, Chunk

Tracks = Literal["both", "video", "audio"]


class EvaluationError(ValueError):
    """An evaluation that cannot go on; the message says why and how to repair it."""


@final
@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What is evaluated, and how answers are written."""

    after_training: bool = True
    benchmarks: tuple[BenchmarkOptions, ...] = ()
    batch_size: int = 1  # streams of one layout that share a pass
    max_new_tokens: int = 16
    limit: int | None = None  # streams per benchmark; None: all
    probes: bool = True  # also the blind, vision-only and audio-only arms
    max_failures: float = 0.01  # share of streams that may be unreadable before the evaluation stops

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit = {self.limit} must be at least 1; leave it out for all streams")
        labels = Counter(benchmark.label for benchmark in self.benchmarks)
        for label in labels:
            if labels[label] > 1:
                raise ValueError(f"benchmarks: {label} is named {labels[label]} times; keep one, or change its options")


@final
@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of answering; `tracks` None reads no stream at all (blind)."""

    name: str
    policy: Policy
    tracks: Tracks | None = "both"


@final
@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Runs arms with one model; the text model is attached by the caller."""

    seam: Seam
    feeder: Feeder
    options: EvaluateOptions

    def run(
        self,
        arm: Arm,
        benchmark: Benchmark,
        folder: Path,
        progress: Callable[[Iterable[Sample], int], Iterable[Sample]] = lambda samples, total: samples,
    ) -> dict[str, Any]:
        """Answer every question that `folder` has no line for yet; the benchmark's entry of the arm's summary.

        Raises TooManyFailures when more streams than `max_failures` are unreadable.
        """
        samples = benchmark.samples()[: self.options.limit]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{benchmark.label}.jsonl"
        done = _answered(path)
        failures = Failures(samples=len(samples), max_failures=self.options.max_failures)
        waiting = [sample for sample in samples if any(_id(sample, q.index) not in done for q in sample.questions)]
        opened, notes = self._opened(progress(waiting, len(waiting)), arm, failures)
        for batch in together(opened, self.options.batch_size):
            for line in self._answers(arm, benchmark, batch, trace=folder / "trace.json"):
                if line["id"] not in done:
                    append_line(path, line)
        write_json(folder / f"{benchmark.label}.failures.json", [vars(failure) for failure in notes])
        return summarise(list(_answered(path, {s.id for s in samples}).values()), failed=notes)

    def _opened(
        self, samples: Iterable[Sample], arm: Arm, failures: Failures
    ) -> tuple[Iterator[Opened], list[Failure]]:
        """Samples as they are decoded; one that cannot be is noted with its reason."""
        notes: list[Failure] = []

        def opening() -> Iterator[Opened]:
            nonlocal failures
            for sample in samples:
                try:
                    yield self._open(sample, arm)
                except MediaError as error:
                    failure = Failure(id=sample.id, reason=error.reason, message=str(error))
                    notes.append(failure)
                    failures = failures.add(failure)

        return opening(), notes

    def _open(self, sample: Sample, arm: Arm) -> Opened:
        if arm.tracks is None:
            return self.feeder.unseen(sample)
        options = replace(self.feeder.options, tracks=arm.tracks)
        feeder = Feeder(self.feeder.backbone, options, self.feeder.cache, encoder=self.feeder.encoder)
        return feeder.open(sample)

    @torch.no_grad()
    def _answers(
        self, arm: Arm, benchmark: Benchmark, batch: Sequence[Opened], trace: Path
    ) -> Iterator[dict[str, Any]]:
        """One line a question of the batch."""
        stream = self.feeder.stream(self.seam, arm.policy, batch=len(batch))
        watch = None if trace.exists() or arm.tracks is None else _Trace(batch[0], self.seam.shape.layers)
        tracks = None if arm.tracks is None else batch[0].tracks
        chunks = self._watched(self.feeder.chunks(batch), stream, watch)
        for due in play(stream, chunks, batch[0].moments):
            started = time.perf_counter()
            numbers = [opened.asked(due) for opened in batch]
            turns = [
                [Turn(text=opened.sample.questions[number].text) for number in row]
                for opened, row in zip(batch, numbers, strict=True)
            ]
            answers = stream.answer(
                self.feeder.prompt(turns, tracks),
                self.feeder.backbone.head,
                stop=self.feeder.backbone.stop,
                max_new_tokens=self.options.max_new_tokens,
            )
            each = (time.perf_counter() - started) / sum(map(len, numbers))
            for opened, row, asked in zip(batch, answers, numbers, strict=True):
                for number, ids in zip(asked, row, strict=True):
                    text = str(self.feeder.backbone.tokenizer.decode(ids, skip_special_tokens=True))
                    yield self._line(benchmark, opened, number, text, stream, each)
        if watch is not None:
            write_json(trace, watch.json(stream))

    @staticmethod
    def _watched(chunks: Iterable[Chunk], stream: Stream, watch: "_Trace | None") -> Iterator[Chunk]:
        """The chunks, the memory noted after each has been read."""
        for number, chunk in enumerate(chunks):
            if watch is not None and number > 1:
                watch.note(stream)
            if watch is not None:
                watch.chunk_ends += [chunk.seconds] if number else []
            yield chunk

    def _line(
        self, benchmark: Benchmark, opened: Opened, number: int, text: str, stream: Stream, seconds: float
    ) -> dict[str, Any]:
        question = opened.sample.questions[number]
        verdict = benchmark.judge(question, text)
        layers = self.seam.shape.layers
        _, audio, visual = stream.usage.tokens_in
        counts = stream.memory.counts()
        return {
            "id": _id(opened.sample, number),
            "video": opened.sample.id,
            "question": question.text,
            "prompt_sha256": _sha(self.feeder.prompt_text(opened.sample, question.text)),
            "answer": question.answer or "",
            "prediction": text,
            "correct": verdict.correct,
            "parsed": verdict.answer is not None,
            "counted": verdict.counted,
            "bare": verdict.bare,
            "kind": question.kind,
            "tokens_in": {"audio": audio, "visual": visual},
            "kept": {kind.name.lower(): sum(layer[kind] for layer in counts) / layers for kind in EVICTABLE},
            "peak_entries": stream.usage.peak_entries / layers,
            "entries": stream.memory.entries / layers,
            "bytes": stream.usage.bytes,
            "frames": opened.heard.frames,
            "audio_seconds": round(opened.heard.audio_seconds, 3),
            "seconds": round(seconds, 5),
        }


@final
class _Trace:
    """What each layer holds of each segment of one stream after each chunk; tokens counted by modality."""

    def __init__(self, opened: Opened, layers: int) -> None:
        self.opened, self.layers = opened, layers
        self.chunk_ends: list[float] = []
        self.kept: dict[str, list[list[list[int]]]] = {kind.name.lower(): [] for kind in EVICTABLE}

    def note(self, stream: Stream) -> None:
        """Count what is left of every segment."""
        edges = torch.tensor(self._edges(stream))
        for kind in EVICTABLE:
            rows = []
            for layer in stream.memory.layers:
                mine = layer.order[0][layer.modality[0] == kind].cpu()
                bins = torch.bucketize(mine, edges, right=True) - 1
                rows.append(torch.bincount(bins, minlength=len(edges) - 1).tolist()[: len(edges) - 1])
            self.kept[kind.name.lower()].append(rows)

    def _edges(self, stream: Stream) -> list[int]:
        """Arrival number of the first token of each segment; what came before is the opening."""
        opening = stream.usage.tokens_in[0]
        edges = [opening]
        for segment in self.opened.segments:
            edges.append(edges[-1] + segment.count)
        return edges

    def json(self, stream: Stream) -> dict[str, Any]:
        """The table of `eval/<arm>/trace.json`."""
        self.note(stream)
        segments = self.opened.segments
        arrived = {
            "audio": [0 if segment.audio is None else segment.audio.shape[1] for segment in segments],
            "visual": [0 if segment.visual is None else segment.visual.shape[1] for segment in segments],
        }
        return {
            "video": self.opened.sample.id,
            "seconds": segments[-1].start + segments[-1].seconds,
            "bin_seconds": segments[0].seconds,
            "chunk_ends": self.chunk_ends,
            "arrived": arrived,
            "kept": self.kept,
        }


def summarise(lines: Sequence[Mapping[str, Any]], *, failed: Sequence[Failure] = ()) -> dict[str, Any]:
    """Accuracies and costs of an arm on a benchmark: `official` over counted answers, `strict` over all questions."""
    kinds = sorted({str(line["kind"]) for line in lines})
    inputs = hashlib.sha256("".join(sorted(str(line["prompt_sha256"]) for line in lines)).encode()).hexdigest()
    streams = {str(line["video"]): line for line in lines}
    return {
        **_accuracy(lines),
        "kinds": {kind: _accuracy([line for line in lines if str(line["kind"]) == kind]) for kind in kinds},
        "peak_entries": _mean(lines, "peak_entries"),
        "answer_entries": _mean(lines, "entries"),
        "bytes": _mean(lines, "bytes"),
        "input": {
            "frames": sum(int(line["frames"]) for line in streams.values()),
            "audio_seconds": round(sum(float(line["audio_seconds"]) for line in streams.values()), 3),
            "prompt_sha256": inputs,
        },
        "failed": dict(Counter(failure.reason for failure in failed)),
    }


def _accuracy(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    right, parsed = sum(bool(line["correct"]) for line in lines), sum(bool(line["parsed"]) for line in lines)
    count, counted = len(lines), sum(bool(line.get("counted", line["parsed"])) for line in lines)
    return {
        "n": count,
        "official": right / counted if counted else 0.0,
        "strict": right / count if count else 0.0,
        "no_answer": (count - parsed) / count if count else 0.0,
        "format": sum(bool(line.get("bare", line["parsed"])) for line in lines) / count if count else 0.0,
    }


def _mean(lines: Sequence[Mapping[str, Any]], key: str) -> float:
    return fmean(float(line[key]) for line in lines) if lines else 0.0


def _id(sample: Sample, number: int) -> str:
    return f"{sample.id}#{number}"


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _answered(path: Path, videos: set[str] | None = None) -> dict[str, dict[str, Any]]:
    """The lines written so far by question; a last line cut off by a crash is dropped from the file."""
    if not path.is_file():
        return {}
    kept: dict[str, dict[str, Any]] = {}
    text = path.read_text()
    whole, _, rest = text.rpartition("\n")
    if rest:
        path.write_text(whole + "\n" if whole else "")
    for line in whole.splitlines():
        record = json.loads(line)
        if videos is None or record["video"] in videos:
            kept[record["id"]] = record
    return kept
