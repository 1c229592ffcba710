"""What a look at every file of a manifest or benchmark finds: tracks, lengths, times; the data report."""

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Literal, final, get_args

from tqdm import tqdm

from omnimem.config import strict
from omnimem.config.check import validated
from omnimem.config.source import COMMAND_LINE, Source, override
from omnimem.data import Failure, Sample
from omnimem.media import MediaError, MediaInfo, probe, read_audio, read_frames
from omnimem.tasks import BenchmarkOptions, Defect, Gap

Tracks = Literal["both", "video", "audio"]


TRACKS: tuple[Tracks, ...] = get_args(Tracks)


SLACK = 1.0  # seconds by which containers may disagree about the same length


DECODED_FPS = 0.5  # frames a second that --decode looks at


SHORTER = 0.8  # of the least length that a benchmark's video has: below it the download broke off


@final
@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a look at the files of one sample found."""

    sample: Sample
    seconds: float = 0.0  # of the stream, between start and end; 0 where the file does not say
    video: bool = False
    audio: bool = False
    failures: tuple[Failure, ...] = ()
    notes: tuple[str, ...] = ()


def inspect(sample: Sample, *, tracks: Tracks = "both", decode: bool = False) -> Finding:
    """Probes the files of a sample; with `decode` reads them through, which alone finds a truncated file."""
    failures: list[Failure] = []
    infos: dict[str, MediaInfo] = {}
    for key, path in (("video", sample.video), ("audio", sample.audio)):
        if path is not None:
            try:
                infos[key] = probe(path)
            except MediaError as error:
                failures.append(_failure(sample, key, error.reason, str(error)))
    if failures:
        return Finding(sample=sample, failures=tuple(failures))
    picture, sound = infos.get("video"), infos.get("audio", infos.get("video"))
    video, audio = picture is not None and picture.has_video, sound is not None and sound.has_audio
    lengths = (picture.video_seconds if picture and video else 0.0, sound.audio_seconds if sound and audio else 0.0)
    failures += _missing_tracks(sample, tracks, video, audio)
    failures += _impossible_times(sample, max(lengths))
    if decode and not failures:
        failures += _decoded(sample, tracks)
    stop = max(lengths) if sample.end is None else min(sample.end, max(lengths))
    return Finding(
        sample=sample,
        seconds=max(0.0, stop - sample.start),
        video=video,
        audio=audio,
        failures=tuple(failures),
        notes=tuple(_doubts(sample, *lengths)),
    )


def _failure(sample: Sample, key: str, reason: str, what: str) -> Failure:
    return Failure(id=sample.id, reason=reason, message=f"{sample.origin} {key}: {what}")


def _missing_tracks(sample: Sample, tracks: Tracks, video: bool, audio: bool) -> Iterator[Failure]:
    """As streams read them: a sample that names no video is heard only, unless pictures alone are asked for."""
    if not video and (tracks == "video" or (tracks == "both" and sample.video is not None)):
        what = f"{sample.video} has no video track" if sample.video else "no video is given"
        yield _failure(sample, "video", "no_video", f"{what}; give another file, or use --tracks audio")
    if not audio and tracks != "video":
        what = f"{sample.audio or sample.video} has no audio track"
        yield _failure(sample, "audio", "no_audio", f"{what}; give an audio file, or use --tracks video")


def _impossible_times(sample: Sample, seconds: float) -> Iterator[Failure]:
    """Times beyond the end of the file; a container that does not declare its length cannot contradict them."""
    if seconds <= 0:
        return
    if sample.start >= seconds:
        yield _failure(sample, "start", "empty", f"{sample.start} s is after the end of the file ({seconds:.1f} s)")
    if sample.end is not None and sample.end > seconds + SLACK:
        what = f"{sample.end} s is after the end of the file ({seconds:.1f} s); lower it, or make it null"
        yield _failure(sample, "end", "too_short", what)
    for question in sample.questions:
        if question.at is not None and question.at > seconds + SLACK:
            what = f"question {question.index} is asked at {question.at} s, after the end of the file ({seconds:.1f} s)"
            yield _failure(sample, "messages", "too_short", f"{what}; make `at` null to ask after the end")


def _doubts(sample: Sample, video_seconds: float, audio_seconds: float) -> Iterator[str]:
    """What is no failure, but should be known."""
    if max(video_seconds, audio_seconds) <= 0:
        yield f"{sample.origin}: the file does not declare its length"
    apart = abs(video_seconds - audio_seconds)
    if min(video_seconds, audio_seconds) > 0 and apart > max(SLACK, 0.02 * max(video_seconds, audio_seconds)):
        yield f"{sample.origin}: {video_seconds:.1f} s of video but {audio_seconds:.1f} s of audio"


def _decoded(sample: Sample, tracks: Tracks) -> Iterator[Failure]:
    if sample.video is not None and tracks != "audio":
        try:
            for _ in read_frames(sample.video, fps=DECODED_FPS, start=sample.start, end=sample.end):
                pass
        except MediaError as error:
            yield _failure(sample, "video", error.reason, str(error))
    source = sample.audio or sample.video
    if source is not None and tracks != "video":
        try:
            read_audio(source, start=sample.start, end=sample.end)
        except MediaError as error:
            yield _failure(sample, "audio", error.reason, str(error))


@final
@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What a data set holds: rows, hours, modalities, failures; a failed row is in no other number."""

    name: str
    findings: tuple[Finding, ...]
    rejected: tuple[Failure, ...] = ()  # rows that did not become samples
    remarks: tuple[str, ...] = ()

    @property
    def good(self) -> tuple[Finding, ...]:
        """The samples that can be used."""
        return tuple(finding for finding in self.findings if not finding.failures)

    @property
    def failures(self) -> tuple[Failure, ...]:
        """Everything that is wrong, several a row where several are."""
        return (*self.rejected, *(failure for finding in self.findings for failure in finding.failures))

    @property
    def failed_share(self) -> float:
        """Share of rows with at least one failure."""
        lost = len({failure.id for failure in self.failures})
        return lost / max(1, len(self.good) + lost)

    def text(self) -> str:
        """The report as a table of a dozen lines."""
        lost = len({failure.id for failure in self.failures})
        lengths = [finding.seconds for finding in self.good if finding.seconds > 0]
        spread = ""
        if lengths:
            spread = f" (shortest {min(lengths):.1f} s, median {median(lengths):.1f} s, longest {max(lengths):.1f} s)"
        rows = {
            "rows": f"{len(self.good) + lost:,} ({len(self.good):,} usable, {lost:,} failed)",
            "questions": _listed(Counter(dict(self._questions()))),
            "hours": f"{sum(lengths) / 3600:.2f}{spread}",
            "modalities": _listed(Counter(self._modalities())),
            "failures": _listed(Counter(failure.reason for failure in self.failures)),
        }
        notes = [*self.remarks, *(note for finding in self.good for note in finding.notes)]
        return "\n".join(
            [self.name, *(f"  {key:<11}{value}" for key, value in rows.items()), *(f"  note: {note}" for note in notes)]
        )

    def _questions(self) -> Iterator[tuple[str, int]]:
        asked = [question for finding in self.good for question in finding.sample.questions]
        yield "all", len(asked)
        yield "without an answer", sum(question.answer is None for question in asked)
        yield from Counter(question.kind for question in asked if question.kind).items()

    def _modalities(self) -> Iterator[str]:
        for finding in self.good:
            match finding.video, finding.audio:
                case True, True:
                    yield "video and audio file" if finding.sample.audio else "video with its own audio"
                case True, False:
                    yield "video only"
                case _:
                    yield "audio only"


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in counts.items() if number) or "none"


def report(name: str, samples: Iterable[Sample], *, tracks: Tracks = "both", decode: bool = False) -> DataReport:
    """The report on samples, with a progress bar."""
    looked_at = tqdm(samples, desc=name, unit="sample", leave=False, disable=None)
    return DataReport(name=name, findings=tuple(inspect(sample, tracks=tracks, decode=decode) for sample in looked_at))


def shared_files(manifests: dict[str, list[Sample]]) -> Iterator[str]:
    """Files that two manifests have in common: a test split that was trained on shows here."""
    files = {
        name: {path.resolve() for sample in samples for path in (sample.video, sample.audio) if path}
        for name, samples in manifests.items()
    }
    for first, second in combinations(files, 2):
        if common := files[first] & files[second]:
            yield f"{first} and {second} have {len(common)} files in common, for instance {min(common)}"


@strict
@final
@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The benchmark that the command line describes."""

    benchmark: BenchmarkOptions


@final
@dataclass(frozen=True, kw_only=True)
class BenchmarkReport:
    """What of a benchmark is there: its files as a data report, its counts, categories and defects."""

    files: DataReport
    samples: tuple[Sample, ...]
    gaps: tuple[Gap, ...]
    defects: tuple[Defect, ...]
    miscounted: str | None  # how the counts differ from the published ones

    @property
    def problems(self) -> list[str]:
        """Everything that keeps a run from being comparable, a line each."""
        lines = [failure.message for failure in self.files.failures]
        lines += [f"missing: {gap.what}; {gap.how}" for gap in self.gaps]
        return [*lines, *([self.miscounted] if self.miscounted else [])]

    def text(self) -> str:
        """The report; each defect is told."""
        items = [question.item for sample in self.samples for question in sample.questions]
        axes: dict[str, Counter[str]] = {}
        for item in items:
            for axis, labels in item.categories.items():
                axes.setdefault(axis, Counter()).update(labels)
        lines = [f"  {axis}: {_listed(Counter(dict(counts.most_common())))}" for axis, counts in axes.items()]
        lines += [f"  defect: {defect.rule} {defect.where}: {defect.what}" for defect in self.defects]
        return "\n".join([self.files.text(), *lines])


def chosen(name: str, root: Path, settings: Sequence[str]) -> BenchmarkOptions:
    """The benchmark by name and folder, with `key=value` settings; raises ConfigError."""
    start = Source(file=COMMAND_LINE, data={"benchmark": {"name": name, "root": str(root)}})
    source = override(start, [f"benchmark.{setting}" for setting in settings])
    found, problems = validated(Chosen, source.data)
    if found is None:
        raise source.error(problems)
    return found.benchmark


def benchmark_report(
    benchmark: BenchmarkOptions, *, tracks: Tracks = "both", decode: bool = False, subset: bool = False
) -> BenchmarkReport:
    """The report on a benchmark whose annotations are there; each file is looked at once.

    Raises ManifestError when the annotations are wrong.
    """
    samples = benchmark.samples()
    files: dict[tuple[Path | None, Path | None], list[Sample]] = {}
    for sample in samples:
        files.setdefault((sample.video, sample.audio), []).append(sample)
    whole = {group[0].id: _whole(group) for group in files.values()}
    made = report(f"{benchmark.label}: {benchmark.root}", whole.values(), tracks=tracks, decode=decode)
    asked = dict(zip(whole, files.values(), strict=True))
    return BenchmarkReport(
        files=replace(made, findings=tuple(_lengths(finding, asked[finding.sample.id]) for finding in made.findings)),
        samples=tuple(samples),
        gaps=tuple(benchmark.gaps()),
        defects=tuple(benchmark.defects()),
        miscounted=None if subset else _miscounted(benchmark, samples, len(files)),
    )


def _whole(samples: Sequence[Sample]) -> Sample:
    """A file with all questions about it, whenever they are asked."""
    messages = tuple(replace(message, at=None) for sample in samples for message in sample.messages)
    items = tuple(item for sample in samples for item in sample.items)
    return replace(samples[0], start=0.0, end=None, messages=messages, items=items)


def _lengths(finding: Finding, samples: Sequence[Sample]) -> Finding:
    """A finding with what its length says: a file far too short is a failure, a question after its end is known."""
    if finding.failures or finding.seconds <= 0:
        return finding
    sample, seconds = finding.sample, finding.seconds
    least, most = sample.meta.get("seconds", (0.0, float("inf")))
    if seconds < SHORTER * least:
        what = f"{sample.video} lasts {seconds:.1f} s, but {least:.0f} s at least were expected; get it again"
        return replace(finding, failures=(_failure(sample, "video", "too_short", what),))
    notes = [*finding.notes]
    if not least <= seconds <= most:
        notes.append(f"{sample.id} lasts {seconds:.1f} s; expected were {least:.0f} to {most:.0f} s")
    late = [
        question.item.id
        for each in samples
        for question in each.questions
        if (question.at or each.end or 0.0) > seconds + SLACK
    ]
    notes += [f"{name} is asked after the end of its video ({seconds:.1f} s): it sees all of it" for name in late]
    return replace(finding, notes=tuple(notes))


def _miscounted(benchmark: BenchmarkOptions, samples: Sequence[Sample], videos: int) -> str | None:
    published, questions = benchmark.published, sum(len(sample.questions) for sample in samples)
    if published is None or (published.videos, published.questions) == (videos, questions):
        return None
    return (
        f"{benchmark.annotations[0]}: {videos:,} videos and {questions:,} questions, but {published.videos:,} and "
        f"{published.questions:,} are published; download the annotations again, or give --subset"
    )


def add_policy(parser: argparse.ArgumentParser) -> None:
    """The options that checking and converting share."""
    parser.add_argument("--tracks", choices=TRACKS, default="both", help="what a run will use (default: %(default)s)")
    parser.add_argument("--decode", action="store_true", help="read every file through; finds truncated ones")
    parser.add_argument("--max-failures", type=float, default=0.0, help="share that may fail (default: %(default)s)")
    parser.add_argument("--allow-absolute-paths", action="store_true", help="media outside the manifest's folder")
