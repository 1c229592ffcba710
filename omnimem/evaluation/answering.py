"""Streams through one arm, each once, and the answers to all questions about it."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, final

import torch

from omnimem.backbones import Turn
from omnimem.data import Failure, Failures, Question, Sample
from omnimem.evaluation.cost import Clock, FirstToken, PeakMemory
from omnimem.evaluation.options import Arm, EvaluateOptions
from omnimem.evaluation.results import Results
from omnimem.evaluation.sharding import Share
from omnimem.evaluation.stream_reader import StreamReader
from omnimem.evaluation.summary import summarise
from omnimem.evaluation.trace import Trace
from omnimem.media import FileSource, MediaError, Segment
from omnimem.media.prefetch import Decoders
from omnimem.policies.capabilities import needs_oracle
from omnimem.run import write_json
from omnimem.streaming.attach import StreamedAttention
from omnimem.streaming.feeder import Feeder, feed_until_due, tracks_of
from omnimem.streaming.stream import Stream
from omnimem.tasks import Benchmark
from omnimem.tokens import EVICTABLE, Chunk

TOGETHER = 64  # questions of a stream that are read in one pass
LATE = 1.0  # seconds that a question may be asked after the end: time stamps are whole seconds, files are not
ALONE = Share()

Progress = Callable[[Iterable[Sample], int], Iterable[Sample]]


@final
@dataclass(frozen=True, kw_only=True)
class _Job:
    """A sample of a block; `failure` says why it cannot be read."""

    block: int
    sample: Sample
    failure: MediaError | None = None


@final
@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Runs arms with one model; the text model is attached by the caller."""

    attached: StreamedAttention
    feeder: Feeder
    options: EvaluateOptions

    def run(
        self, arm: Arm, benchmark: Benchmark, folder: Path, progress: Progress = lambda samples, total: samples
    ) -> dict[str, Any]:
        """Answer every question that `folder` has no answer to yet; the benchmark's entry of the arm's summary.

        Raises TooManyFailures when more streams than `max_failures` are unreadable.
        """
        self.answer(arm, benchmark, folder, progress=progress)
        return self.conclude(benchmark, folder)

    def answer(
        self,
        arm: Arm,
        benchmark: Benchmark,
        folder: Path,
        *,
        share: Share = ALONE,
        first: int = 0,
        traced: bool = True,
        progress: Progress = lambda samples, total: samples,
    ) -> int:
        """Answer this process's share of the questions; how many items of work the benchmark is.

        An item is `batch_size` streams that follow each other in the benchmark: those pass together, so that what a
        stream passes with does not hang on who does it, nor on what was done before an interruption. They are numbered
        from `first`. `traced` writes down what is kept of the very first stream.
        """
        samples = self._samples(benchmark)
        results = Results(folder, benchmark.label, samples, share)
        done, size = results.answered(), self.options.batch_size
        blocks = list(enumerate(samples[start : start + size] for start in range(0, len(samples), size)))
        waiting = [(number, block) for number, block in blocks if not _all_in(block, done)]
        mine = (sample for number, block in waiting if share.takes(first + number) for sample in block)
        numbers = {sample.id: number for number, block in waiting for sample in block}
        total = -(-sum(len(block) for _, block in waiting) // share.count)
        failures = Failures(samples=len(samples), max_failures=self.options.max_failures)
        feeder = self._feeder(arm)
        with Decoders(self.options.decoders) as decoders:
            jobs = (self._job(numbers[sample.id], sample, arm, feeder) for sample in progress(mine, total))
            for number, block in groupby(decoders.read(jobs), key=lambda pair: pair[0].block):
                trace = folder / "trace.json" if traced and number == 0 else None
                for intakes in self._batches(block, arm, feeder):
                    lines = self._lines(arm, benchmark, intakes, trace)
                    results.append([line for line in lines if line["id"] not in done])
                    for failure in _failures(lines):
                        failures = failures.add(failure)
        return len(blocks)

    def conclude(self, benchmark: Benchmark, folder: Path) -> dict[str, Any]:
        """The benchmark's entry of the arm's summary, once everything is answered and nobody writes any more.

        Raises TooManyFailures.
        """
        samples = benchmark.samples()
        lines = Results(folder, benchmark.label, samples, ALONE).fold()
        failures = Failures(samples=len({line["stream"] for line in lines}), max_failures=self.options.max_failures)
        for failure in _failures(lines):
            failures = failures.add(failure)
        return {"rules": benchmark.rules, **summarise(lines, defects=benchmark.defects())}

    def missing(self, benchmark: Benchmark, folder: Path) -> int:
        """How many questions nobody has tried to answer yet."""
        return len(Results(folder, benchmark.label, self._samples(benchmark), ALONE).untried())

    def _samples(self, benchmark: Benchmark) -> list[Sample]:
        return benchmark.samples()[: self.options.limit]

    def _feeder(self, arm: Arm) -> Feeder:
        """The feeder, for the tracks that the arm reads."""
        if arm.tracks in (None, self.feeder.options.tracks):
            return self.feeder
        options = replace(self.feeder.options, tracks=arm.tracks)
        return Feeder(self.feeder.backbone, options, self.feeder.cache)

    def _job(self, block: int, sample: Sample, arm: Arm, feeder: Feeder) -> tuple[_Job, FileSource | None]:
        """A sample, with its file where that is to be decoded."""
        try:
            source = None if arm.tracks is None or feeder.stored(sample) else feeder.source(sample)
        except MediaError as error:
            return _Job(block=block, sample=sample, failure=error), None
        return _Job(block=block, sample=sample), source

    def _batches(
        self, block: Iterable[tuple[_Job, Iterable[Segment] | None]], arm: Arm, feeder: Feeder
    ) -> Iterator[list[StreamReader] | tuple[Sample, MediaError]]:
        """The streams of a block that pass together, or one that cannot be read, with the reason."""
        waiting: dict[tuple[object, ...], list[StreamReader]] = {}
        for job, segments in block:
            try:
                if job.failure is not None:
                    raise job.failure
                intake = _intake(job.sample, segments, arm, feeder)
                if self.options.batch_size > 1:
                    waiting.setdefault(intake.gather(), []).append(intake)
            except MediaError as error:
                yield job.sample, error
                continue
            if self.options.batch_size == 1:
                yield [intake]
        yield from waiting.values()

    def _lines(
        self,
        arm: Arm,
        benchmark: Benchmark,
        batch: list[StreamReader] | tuple[Sample, MediaError],
        trace: Path | None,
    ) -> list[dict[str, Any]]:
        """A line a question; a stream that turns out to be unreadable on the way costs all its questions."""
        if isinstance(batch, tuple):
            return self._failed(*batch)
        try:
            return list(self._answers(arm, benchmark, batch, trace))
        except MediaError as error:
            return [line for intake in batch for line in self._failed(intake.sample, error)]

    def _failed(self, sample: Sample, error: MediaError) -> list[dict[str, Any]]:
        return [
            {
                **self._question(sample, question),
                "failed": error.reason,
                "message": str(error),
                "prediction": None,
                **dict.fromkeys(("correct", "parsed", "counted", "bare"), False),
            }
            for question in sample.questions
        ]

    def _question(self, sample: Sample, question: Question) -> dict[str, Any]:
        """What was asked, whoever answers."""
        return {
            "id": question.item.id,
            "video": sample.cluster or sample.id,
            "stream": sample.id,
            "question": question.text,
            "prompt_sha256": _sha(self.feeder.prompt_text(sample, question.text)),
            "answer": question.answer or "",
            "options": len(question.item.options),
            "kind": question.kind,
            "categories": {axis: list(labels) for axis, labels in question.item.categories.items()},
            "at": question.at,
        }

    @torch.no_grad()
    def _answers(
        self, arm: Arm, benchmark: Benchmark, batch: Sequence[StreamReader], trace: Path | None
    ) -> Iterator[dict[str, Any]]:
        """One line a question of the batch."""
        clock, peak, first = Clock(sum(intake.gathering for intake in batch)), PeakMemory(), batch[0]
        policy = arm.policy
        if needs_oracle(policy):
            policy = self.feeder.with_oracle(policy, [intake.whole() for intake in batch])
        stream = self.feeder.stream(self.attached, policy, batch=len(batch))
        watch = _Watch(stream, Trace(first) if trace and arm.tracks and not trace.exists() else None)
        chunks = watch.chunks(clock.chunks(self.feeder.chunks(batch)))
        for due in feed_until_due(stream, chunks, first.sample.moments):
            for rows in _in_passes([intake.sample.asked(due) for intake in batch]):
                facts = self._facts(stream, watch.seconds) | {"media": clock.media, "reading": clock.reading}
                with clock.answer():
                    texts, seconds = self._ask(stream, batch, rows)
                for intake, asked, answers in zip(batch, rows, texts, strict=True):
                    for number, text in zip(asked, answers, strict=True):
                        question = intake.sample.questions[number]
                        yield {
                            **self._question(intake.sample, question),
                            **_judged(benchmark, question, text),
                            **_measured(facts, intake, len(batch), seconds),
                            **_late(question, intake, due, watch.seconds, over=arm.tracks is not None),
                            "peak_memory": peak.bytes,
                        }
        if watch.trace is not None and trace is not None:
            write_json(trace, watch.trace.json(stream, watch.seconds))

    def _ask(
        self, stream: Stream, batch: Sequence[StreamReader], rows: Sequence[Sequence[int]]
    ) -> tuple[list[list[str]], dict[str, float]]:
        """Answers by stream to the questions of these numbers, and what they took."""
        turns = [
            [Turn(text=intake.sample.questions[number].text) for number in asked]
            for intake, asked in zip(batch, rows, strict=True)
        ]
        head = FirstToken(self.feeder.backbone.head)
        began = Clock()
        answers = stream.answer(
            self.feeder.prompt(turns, batch[0].tracks),
            head,
            stop=self.feeder.backbone.stop,
            max_new_tokens=self.options.max_new_tokens,
        )
        taken = {"first_token": head.seconds or 0.0, "answer": began.reading / sum(map(len, rows))}
        tokenizer = self.feeder.backbone.tokenizer
        return [[str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in row] for row in answers], taken

    def _facts(self, stream: Stream, seconds: float) -> dict[str, Any]:
        """What the memory took when a question was asked."""
        layers, counts = self.attached.shape.layers, stream.memory.counts()
        _, audio, visual = stream.usage.tokens_in
        return {
            "stream_seconds": round(seconds, 3),
            "tokens_in": {"audio": audio, "visual": visual},
            "kept": {kind.name.lower(): sum(layer[kind] for layer in counts) / layers for kind in EVICTABLE},
            "peak_entries": stream.usage.peak_entries / layers,
            "entries": stream.memory.entries / layers,
            "bytes": stream.usage.bytes,
        }


@final
class _Watch:
    """Sees the chunks pass: how far the stream has been read, and what is kept after each."""

    def __init__(self, stream: Stream, trace: Trace | None) -> None:
        self._stream, self.trace = stream, trace
        self.seconds = 0.0  # of the stream that has been read

    def chunks(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """The chunks; each has been read when the next one is asked for."""
        for number, chunk in enumerate(chunks):
            yield chunk
            self.seconds = chunk.seconds
            if self.trace is not None and number:
                self.trace.note(self._stream, chunk.seconds)


def _intake(sample: Sample, segments: Iterable[Segment] | None, arm: Arm, feeder: Feeder) -> StreamReader:
    if arm.tracks is None:
        return StreamReader(sample, None, [])
    return StreamReader(sample, tracks_of(sample, feeder.options.tracks), feeder.read(sample, segments))


def _in_passes(asked: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """The questions of each stream, so many that one pass can read them."""
    for first in range(0, max(map(len, asked)), TOGETHER):
        yield [numbers[first : first + TOGETHER] for numbers in asked]


def _judged(benchmark: Benchmark, question: Question, text: str) -> dict[str, Any]:
    verdict = benchmark.judge(question, text)
    return {
        "prediction": text,
        "correct": verdict.correct,
        "parsed": verdict.answer is not None,
        "counted": verdict.counted,
        "bare": verdict.bare,
    }


def _measured(facts: dict[str, Any], intake: StreamReader, streams: int, seconds: dict[str, float]) -> dict[str, Any]:
    """Facts of the pass as they are of one stream."""
    heard = intake.heard(facts["stream_seconds"])
    shared = {key: facts[key] / streams for key in ("media", "reading")}
    return {
        **{key: value for key, value in facts.items() if key not in shared},
        "frames": heard.frames,
        "audio_seconds": round(heard.audio_seconds, 3),
        "seconds": {key: round(value, 5) for key, value in (shared | seconds).items()},
    }


def _late(
    question: Question, intake: StreamReader, due: Sequence[float | None], seconds: float, *, over: bool
) -> dict[str, str]:
    """A defect: the question's time lies after the end of the stream. Probes that read nothing cannot tell."""
    time = None if question.at is None else question.at - intake.sample.start
    if not over or time is None or time not in due or time <= seconds + LATE:
        return {}
    return {"late": f"asked at {time:g} s of a stream that ends at {seconds:.1f} s; asked there"}


def _all_in(block: Sequence[Sample], done: set[str]) -> bool:
    return all(question.item.id in done for sample in block for question in sample.questions)


def _failures(lines: Iterable[dict[str, Any]]) -> list[Failure]:
    """The streams that failed, each once."""
    found = {line["stream"]: line for line in lines if line.get("failed")}
    return [Failure(id=stream, reason=line["failed"], message=line["message"]) for stream, line in found.items()]


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
