"""Reads each stream once through one arm and answers all questions about it."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, final

import torch

from omnimem.backbones import Turn
from omnimem.data import Failure, Failures, Question, Sample
from omnimem.errors import counted
from omnimem.evaluation import left_out
from omnimem.evaluation.cost import Clock, FirstToken, PeakMemory
from omnimem.evaluation.options import Arm, EvaluateOptions
from omnimem.evaluation.results import Results
from omnimem.evaluation.sharding import Shard
from omnimem.evaluation.stream_reader import StreamReader
from omnimem.evaluation.summary import summarise
from omnimem.evaluation.trace import Trace
from omnimem.media import Decoded, FileSource, MediaError
from omnimem.media.prefetch import Decoders
from omnimem.rows import tracks_of
from omnimem.run import write_json
from omnimem.streaming.attach import StreamedAttention
from omnimem.streaming.feeder import Due, Feeder, feed_until_due
from omnimem.streaming.stream import Stream
from omnimem.tasks import Benchmark
from omnimem.tokens import EVICTABLE, Chunk, Modality, Tracks

TOGETHER = 64  # questions of a stream per pass
LATE = 1.0  # seconds after the end that a question may be asked: time stamps are whole seconds, lengths are not
WHOLE = Shard()
UNANSWERED = (MediaError, *left_out.ERRORS)  # see `_reason`

_Batch = list[StreamReader] | tuple[Sample, tuple[str, str]]  # or a stream that cannot be read: reason and message
Progress = Callable[[Iterable[Sample], int], Iterable[Sample]]


@final
@dataclass(frozen=True, kw_only=True)
class _Job:
    """A sample of a block; `failure`: why it cannot be read."""

    block: int
    sample: Sample
    tracks: Tracks | None = None  # None: nothing is read
    failure: Exception | None = None


@final
@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Evaluates arms with one model, whose text model is attached by the caller."""

    attached: StreamedAttention
    feeder: Feeder
    options: EvaluateOptions

    def run(
        self, arm: Arm, benchmark: Benchmark, folder: Path, progress: Progress = lambda samples, total: samples
    ) -> dict[str, Any]:
        """Answer the questions without an answer in `folder`; the benchmark's entry of the arm's summary.

        Raises TooManyFailures if more streams than `max_failures` are unreadable.
        """
        self.answer(arm, benchmark, folder, progress=progress)
        return self.conclude(benchmark, folder)

    def answer(
        self,
        arm: Arm,
        benchmark: Benchmark,
        folder: Path,
        *,
        shard: Shard = WHOLE,
        first: int = 0,
        traced: bool = True,
        progress: Progress = lambda samples, total: samples,
    ) -> int:
        """Answer the questions of this process's shard; returns the number of work items of the benchmark.

        An item is `batch_size` consecutive streams of the benchmark, which are read in one batch: the batches depend
        neither on the shards nor on interruptions. Items are numbered from `first`. `traced` writes trace.json of the
        first stream.
        """
        # 1. find unanswered blocks
        samples = self._samples(benchmark)
        results = Results(folder, benchmark.label, samples, shard)
        done, size = results.answered(), self.options.batch_size
        blocks = list(enumerate(samples[start : start + size] for start in range(0, len(samples), size)))
        waiting = [
            (number, block)
            for number, block in blocks
            if any(question.item.id not in done for sample in block for question in sample.questions)
        ]
        # 2. take those of this shard
        mine = (sample for number, block in waiting if shard.takes(first + number) for sample in block)
        numbers = {sample.id: number for number, block in waiting for sample in block}
        total = -(-sum(len(block) for _, block in waiting) // shard.count)
        failures = self._none_failed(len(samples))
        feeder = self._feeder(arm)
        # 3. read and answer
        with Decoders(self.options.decoders) as decoders:
            jobs = (self._job(numbers[sample.id], sample, arm, feeder) for sample in progress(mine, total))
            for number, block in groupby(decoders.read(jobs), key=lambda pair: pair[0].block):
                trace = folder / "trace.json" if traced and number == 0 else None
                for readers in self._batches(block, arm, feeder):
                    lines = self._lines(arm, benchmark, readers, trace)
                    results.append([line for line in lines if line["id"] not in done])
                    failures = failures.add(*_failures(lines))
        return len(blocks)

    def conclude(self, benchmark: Benchmark, folder: Path) -> dict[str, Any]:
        """Fold the results; the benchmark's entry of the arm's summary. No process may still be writing.

        Raises TooManyFailures.
        """
        samples = benchmark.samples()
        lines = Results(folder, benchmark.label, samples, WHOLE).fold()
        self._none_failed(len({line["stream"] for line in lines})).add(*_failures(lines))
        summary = summarise(lines, defects=benchmark.defects())
        self.feeder.trained.note(summary["beyond_trained"]["reached"])  # of the streams that other processes read
        return {"rules": benchmark.rules, **summary}

    def missing(self, benchmark: Benchmark, folder: Path) -> int:
        """Number of questions that no process has tried to answer."""
        return len(Results(folder, benchmark.label, self._samples(benchmark), WHOLE).untried())

    def _none_failed(self, samples: int) -> Failures:
        return Failures(samples=samples, max_failures=self.options.max_failures, setting="evaluate.max_failures")

    def _samples(self, benchmark: Benchmark) -> list[Sample]:
        return benchmark.samples()[: self.options.limit]

    def _feeder(self, arm: Arm) -> Feeder:
        """The feeder for the arm's tracks."""
        if arm.tracks in (None, self.feeder.options.tracks):
            return self.feeder
        options = replace(self.feeder.options, tracks=arm.tracks)
        return Feeder(self.feeder.backbone, options, self.feeder.cache, self.feeder.trained)

    def _job(self, block: int, sample: Sample, arm: Arm, feeder: Feeder) -> tuple[_Job, FileSource | None]:
        """A sample, with its file if that must be decoded."""
        try:
            tracks = self._tracks(arm, sample)
            source = None if tracks is None else feeder.undecoded(sample)
        except UNANSWERED as error:
            return _Job(block=block, sample=sample, failure=error), None
        return _Job(block=block, sample=sample, tracks=tracks), source

    def _tracks(self, arm: Arm, sample: Sample) -> Tracks | None:
        """The tracks that an arm reads of a sample; None: none, because it is blind or the file lacks its track."""
        if arm.tracks is None:
            return None
        if self.feeder.options.tracks == "both" and arm.tracks in ("video", "audio"):
            present = tracks_of(sample, "both")
            if present not in ("both", arm.tracks):
                return None
        return tracks_of(sample, arm.tracks)

    def _batches(self, block: Iterable[tuple[_Job, Decoded | None]], arm: Arm, feeder: Feeder) -> Iterator[_Batch]:
        """The batches of a block, and the streams that cannot be read, each with reason and message."""
        waiting: dict[tuple[object, ...], list[StreamReader]] = {}
        for job, segments in block:
            try:
                if job.failure is not None:
                    raise job.failure
                parts = feeder.read(job.sample, segments) if job.tracks else []
                reader = StreamReader(job.sample, job.tracks, parts)
                if self.options.batch_size > 1:
                    waiting.setdefault(reader.gather(), []).append(reader)
                    continue
            except UNANSWERED as error:
                failure = _reason(error, arm)
            else:
                yield [reader]
                continue
            yield job.sample, failure
        yield from waiting.values()

    def _lines(self, arm: Arm, benchmark: Benchmark, batch: _Batch, trace: Path | None) -> list[dict[str, Any]]:
        """One line per question; if a stream becomes unreadable, all questions of its batch fail.

        Where the arm cannot go on with the batch (`left_out`), the questions that it has not answered are left out.
        """
        lines: list[dict[str, Any]] = []
        samples = [batch[0]] if isinstance(batch, tuple) else [reader.sample for reader in batch]
        try:
            if isinstance(batch, list):
                lines.extend(self._answers(arm, benchmark, batch, trace))
                return lines
            reason = batch[1]
        except UNANSWERED as error:
            reason = _reason(error, arm)
        if reason[0] not in left_out.LEFT_OUT:
            return [line for sample in samples for line in self._failed(sample, *reason)]
        left_out.release()
        done = {line["id"] for line in lines}
        rest = [line for sample in samples for line in self._failed(sample, *reason) if line["id"] not in done]
        print(
            f"{arm.name}: {counted(len(rest), 'question')} of {samples[0].id} left out: {', '.join(reason)}", flush=True
        )
        return lines + rest

    def _failed(self, sample: Sample, reason: str, message: str) -> list[dict[str, Any]]:
        return [
            {
                **self._question(sample, question),
                "failed": reason,
                "message": message,
                "prediction": None,
                **dict.fromkeys(("correct", "parsed", "counted", "bare"), False),
            }
            for question in sample.questions
        ]

    def _question(self, sample: Sample, question: Question) -> dict[str, Any]:
        """The fields of a question that do not depend on the arm."""
        prompt = self.feeder.backbone.framed(question.text, system=sample.system, prefix=sample.prefix)
        return {
            "id": question.item.id,
            "video": sample.cluster or sample.id,
            "stream": sample.id,
            "question": question.text,
            "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(),
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
        """One line per question of the batch."""
        # 1. open the stream
        clock, peak, first = Clock(sum(reader.gathering for reader in batch)), PeakMemory(), batch[0]
        policy = arm.policy
        if policy.traits.needs_oracle:
            policy = self.feeder.with_oracle(policy, [reader.whole() for reader in batch])
        stream = self.feeder.stream(self.attached, policy, batch=len(batch))
        progress = _ReadProgress(stream, Trace(first) if trace and first.tracks and not trace.exists() else None)
        chunks = progress.chunks(clock.chunks(self.feeder.chunks(batch, rests=True)))
        # 2. read up to each question, answer it on a fork
        for due in feed_until_due(stream, chunks, first.sample.moments):
            for rows in _in_passes([reader.sample.asked(due.moments) for reader in batch]):
                facts = self._facts(due) | {"media": clock.media, "reading": clock.reading}
                with clock.answer():
                    texts, seconds = self._ask(due.stream, batch, rows)
                for reader, asked, answers in zip(batch, rows, texts, strict=True):
                    for number, text in zip(asked, answers, strict=True):
                        question = reader.sample.questions[number]
                        yield {
                            **self._question(reader.sample, question),
                            **_judged(benchmark, question, text),
                            **_measured(facts, due, reader, len(batch), seconds),
                            **_late(question, reader, due, over=reader.tracks is not None),
                            "peak_memory": peak.bytes,
                        }
        # 3. write the trace
        if progress.trace is not None and trace is not None:
            write_json(trace, progress.trace.json(stream, progress.seconds))

    def _ask(
        self, stream: Stream, batch: Sequence[StreamReader], rows: Sequence[Sequence[int]]
    ) -> tuple[list[list[str]], dict[str, float]]:
        """Answers by stream to the questions of these numbers, and the time they took."""
        turns = [
            [Turn(text=reader.sample.questions[number].text) for number in asked]
            for reader, asked in zip(batch, rows, strict=True)
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

    def _facts(self, due: Due) -> dict[str, Any]:
        """Size of the memory when a question is asked."""
        stream = due.stream
        layers, counts = self.attached.shape.layers, stream.memory.counts()
        _, audio, visual = stream.usage.tokens_in
        return {
            "stream_seconds": round(due.seconds, 3),
            "tokens_in": {"audio": audio, "visual": visual},
            "kept": {kind.name.lower(): sum(layer[kind] for layer in counts) / layers for kind in EVICTABLE},
            "peak_entries": stream.usage.peak_entries / layers,
            "entries": stream.memory.entries / layers,
            "text_entries": sum(layer[Modality.TEXT] for layer in counts) / layers,
            "bytes": stream.usage.bytes,
            **_selector(stream, layers),
            **({"beyond_trained": stream.beyond} if stream.beyond else {}),
        }


def _reason(error: Exception, arm: Arm) -> tuple[str, str]:
    """(reason, message) of an error that costs the questions of a stream; any other error is raised again."""
    if isinstance(error, MediaError):
        return error.reason, str(error)
    reason = left_out.reason_of(error, arm.policy)
    if reason is None:
        raise error
    return reason


def _selector(stream: Stream, layers: int) -> dict[str, Any]:
    """Of the memory that chooses the tokens, where there is one; `bytes` contains these bytes."""
    if stream.selector is None:
        return {}
    return {"selector": {"entries": stream.selector.memory.entries / layers, "bytes": stream.usage.selector_bytes}}


@final
class _ReadProgress:
    """How far the stream has been read, and the trace after each chunk."""

    def __init__(self, stream: Stream, trace: Trace | None) -> None:
        self._stream, self.trace = stream, trace
        self.seconds = 0.0  # of the stream so far

    def chunks(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """The chunks; each has been read when the next one is requested."""
        for number, chunk in enumerate(chunks):
            yield chunk
            self.seconds = chunk.seconds
            if self.trace is not None:
                if chunk.at is None:  # a rest is no part of the stream
                    self.trace.arrive(chunk)
                if number:
                    self.trace.note(self._stream, chunk.seconds)


def _in_passes(asked: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """The questions of each stream, at most TOGETHER per pass."""
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


def _measured(
    facts: dict[str, Any], due: Due, reader: StreamReader, streams: int, seconds: dict[str, float]
) -> dict[str, Any]:
    """Measurements of a pass, for one of its streams."""
    heard = reader.heard(facts["stream_seconds"], due.moments[0])
    shared = {key: facts[key] / streams for key in ("media", "reading")}
    return {
        **{key: value for key, value in facts.items() if key not in shared},
        "tracks": reader.tracks or "none",
        "frames": heard.frames,
        "audio_seconds": round(heard.audio_seconds, 3),
        "seconds": {key: round(value, 5) for key, value in (shared | seconds).items()},
    }


def _late(question: Question, reader: StreamReader, due: Due, *, over: bool) -> dict[str, str]:
    """A defect if the question's time is after the end of the stream; unknown for probes that read nothing."""
    time = None if question.at is None else question.at - reader.sample.start
    if not over or time is None or time <= due.seconds + LATE:
        return {}
    return {"late": f"asked at {time:g} s of a stream that ends at {due.seconds:.1f} s; asked at its end"}


def _failures(lines: Iterable[dict[str, Any]]) -> list[Failure]:
    """The unreadable streams, each once."""
    found = {line["stream"]: line for line in lines if line.get("failed") and not left_out.is_left_out(line)}
    return [Failure(id=stream, reason=line["failed"], message=line["message"]) for stream, line in found.items()]
