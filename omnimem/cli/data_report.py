"""The data report: tracks, lengths and times of every file of a manifest or a benchmark."""

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import final, get_args

from tqdm import tqdm

from omnimem.config import strict
from omnimem.config.check import validated
from omnimem.config.source import COMMAND_LINE, Source, override
from omnimem.data import Failure, ManifestError, Sample
from omnimem.errors import capped, counted
from omnimem.media import FrameList, MediaError, TracksOption, Video, read_audio, read_frames
from omnimem.rows import SLACK, judge
from omnimem.tasks import BenchmarkOptions, Defect, Gap
from omnimem.tokens import Tracks

TRACKS: tuple[TracksOption, ...] = get_args(TracksOption)
DECODED_FPS = 0.5  # frames per second that --decode reads
SHORTER = 0.8  # of the expected length of a benchmark's video: below it the download is incomplete


@final
@dataclass(frozen=True, kw_only=True)
class Finding:
    """Tracks, length and failures of one sample's files."""

    sample: Sample
    seconds: float = 0.0  # of the stream, between start and end; 0 if the file declares no length
    video: bool = False
    audio: bool = False
    failures: tuple[Failure, ...] = ()
    notes: tuple[str, ...] = ()


def inspect_sample(sample: Sample, *, tracks: TracksOption = "both", decode: bool = False) -> Finding:
    """Probe the files of a sample; `decode` reads them to the end, the only way to find a truncated file."""
    # 1. judge tracks and times
    judged = judge(sample, tracks)
    failures = [_failure(sample, each.key, each.reason, f"{each.path}: {each.what}") for each in judged.problems]
    lengths = (judged.video_seconds, judged.audio_seconds)
    # 2. decode
    if decode and not failures:
        failures += _decoded(sample, judged.tracks)
    stop = max(lengths) if sample.end is None else min(sample.end, max(lengths))
    return Finding(
        sample=sample,
        seconds=max(0.0, stop - sample.start),
        video=judged.video and judged.tracks != "audio",
        audio=judged.audio and judged.tracks != "video",
        failures=tuple(failures),
        notes=tuple(_doubts(sample, *lengths)) if not failures else (),
    )


def _failure(sample: Sample, key: str, reason: str, what: str) -> Failure:
    return Failure(id=sample.id, reason=reason, message=f"{sample.origin} {key}: {what}")


def _doubts(sample: Sample, video_seconds: float, audio_seconds: float) -> Iterator[str]:
    """Notes: no failures, but unusual."""
    if max(video_seconds, audio_seconds) <= 0 and sample.has_stream:
        yield f"{sample.origin}: the file does not declare its length"
    apart = abs(video_seconds - audio_seconds)
    if min(video_seconds, audio_seconds) > 0 and apart > max(SLACK, 0.02 * max(video_seconds, audio_seconds)):
        yield f"{sample.origin}: {video_seconds:.1f} s of video but {audio_seconds:.1f} s of audio"


def _decoded(sample: Sample, tracks: Tracks) -> Iterator[Failure]:
    if sample.video is not None and tracks != "audio":
        fps = sample.video.fps if isinstance(sample.video, FrameList) else DECODED_FPS  # every file of a list
        try:
            for _ in read_frames(sample.video, fps=fps, start=sample.start, end=sample.end):
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
    """Rows, hours, modalities and failures of a data set; a failed row is not part of the other numbers."""

    name: str
    findings: tuple[Finding, ...]
    rejected: tuple[Failure, ...] = ()  # rows that did not become samples
    remarks: tuple[str, ...] = ()

    @property
    def good(self) -> tuple[Finding, ...]:
        """The usable samples."""
        return tuple(finding for finding in self.findings if not finding.failures)

    @property
    def failures(self) -> tuple[Failure, ...]:
        """All failures; a row may have several."""
        return (*self.rejected, *(failure for finding in self.findings for failure in finding.failures))

    @property
    def failed_share(self) -> float:
        """Share of rows with at least one failure."""
        lost = len({failure.id for failure in self.failures})
        return lost / max(1, len(self.good) + lost)

    def text(self) -> str:
        """The report as a short table."""
        lost = len({failure.id for failure in self.failures})
        lengths = [finding.seconds for finding in self.good if finding.seconds > 0]
        spread = ""
        if lengths:
            spread = f" (shortest {min(lengths):.1f} s, median {median(lengths):.1f} s, longest {max(lengths):.1f} s)"
        rows = {
            "rows": f"{len(self.good) + lost:,} ({len(self.good):,} usable, {lost:,} failed)",
            "questions": _listed(Counter(dict(self._questions()))),
            "hours": f"{sum(lengths) / 3600:.{2 if sum(lengths) >= 360 else 4}f}{spread}",
            "modalities": _listed(Counter(self._modalities())),
            "failures": _listed(Counter(failure.reason for failure in self.failures)),
        }
        notes = [*self.remarks, *(note for finding in self.good for note in finding.notes)]
        return "\n".join(
            [
                self.name,
                *(f"  {key:<11}{value}" for key, value in rows.items()),
                *capped([f"  note: {n}" for n in notes]),
            ]
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
                    yield "frames only" if isinstance(finding.sample.video, FrameList) else "video only"
                case False, False:
                    yield "text only"
                case _:
                    yield "audio only"


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in counts.items() if number) or "none"


def manifest_report(
    name: str, samples: Iterable[Sample], *, tracks: TracksOption = "both", decode: bool = False
) -> DataReport:
    """The report on samples, with a progress bar."""
    bar = tqdm(samples, desc=name, unit="sample", leave=False, disable=None)
    return DataReport(name=name, findings=tuple(inspect_sample(each, tracks=tracks, decode=decode) for each in bar))


def unlearned(samples: Sequence[Sample]) -> Iterator[str]:
    """A note about samples without an answer to train on, and what they are for; `omnimem finetune` refuses them."""
    silent = [sample for sample in samples if not sample.is_learned]
    if silent:
        scored = all(question.answer is not None for sample in silent for question in sample.questions)
        use = "an evaluation, " if scored else ""
        yield (
            f"{counted(len(silent), 'row')} without an answer to train on (first: {silent[0].id}): omnimem finetune "
            f"refuses them; they do for {use}omnimem calibrate and omnimem show-memory. To train on them add an "
            f"assistant message after the question{', or remove its loss: false' if scored else ''}"
        )


def shared_files(manifests: dict[str, list[Sample]]) -> Iterator[str]:
    """Files that two manifests have in common: finds test data among the training data."""
    files = {
        name: {path.resolve() for sample in samples for path in sample.files} for name, samples in manifests.items()
    }
    for first, second in combinations(files, 2):
        if common := files[first] & files[second]:
            yield f"{first} and {second} have {counted(len(common), 'file')} in common, for instance {min(common)}"


@strict
@final
@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """Schema of the command line's benchmark."""

    benchmark: BenchmarkOptions


@final
@dataclass(frozen=True, kw_only=True)
class BenchmarkReport:
    """Files, counts, categories and defects of a benchmark's folder."""

    files: DataReport
    samples: tuple[Sample, ...]
    gaps: tuple[Gap, ...]
    defects: tuple[Defect, ...]
    miscounted: str | None  # the difference between its counts and the published ones

    @property
    def problems(self) -> list[str]:
        """Everything that makes results incomparable, one line per problem."""
        lines = [failure.message for failure in self.files.failures]
        lines += [f"missing: {gap.what}; {gap.how}" for gap in self.gaps]
        return [*lines, *([self.miscounted] if self.miscounted else [])]

    def text(self) -> str:
        """The report with all defects."""
        items = [question.item for sample in self.samples for question in sample.questions]
        axes: dict[str, Counter[str]] = {}
        for item in items:
            for axis, labels in item.categories.items():
                axes.setdefault(axis, Counter()).update(labels)
        lines = [f"  {axis}: {_listed(Counter(dict(counts.most_common())))}" for axis, counts in axes.items()]
        lines += [f"  defect: {defect.rule} {defect.where}: {defect.what}" for defect in self.defects]
        return "\n".join([self.files.text(), *lines])


def benchmark_from(name: str, root: Path, settings: Sequence[str]) -> BenchmarkOptions:
    """The benchmark by name and folder, with `key=value` settings; raises ConfigError."""
    start = Source(file=COMMAND_LINE, data={"benchmark": {"name": name, "root": str(root)}})
    source = override(start, [f"benchmark.{setting}" for setting in settings])
    found, problems = validated(BenchmarkSettings, source.data)
    if found is None:
        raise source.error(problems)
    return found.benchmark


def benchmark_report(
    benchmark: BenchmarkOptions, *, tracks: TracksOption = "both", decode: bool = False, subset: bool = False
) -> BenchmarkReport:
    """The report on a benchmark whose annotations exist; each file is inspected once.

    Raises ManifestError if the annotations are wrong.
    """
    samples = benchmark.samples()
    files: dict[tuple[Video | None, Path | None], list[Sample]] = {}
    for sample in samples:
        files.setdefault((sample.video, sample.audio), []).append(sample)
    name = f"{benchmark.label}: {benchmark.root}"
    if benchmark.published is None:  # rows of the user's own, judged as those of a manifest
        files_report = manifest_report(name, samples, tracks=tracks, decode=decode)
        findings = files_report.findings
    else:
        whole = {group[0].id: _whole(group) for group in files.values()}
        files_report = manifest_report(name, whole.values(), tracks=tracks, decode=decode)
        cuts = dict(zip(whole, files.values(), strict=True))
        findings = tuple(_with_lengths(finding, cuts[finding.sample.id]) for finding in files_report.findings)
    return BenchmarkReport(
        files=replace(files_report, findings=findings),
        samples=tuple(samples),
        gaps=tuple(benchmark.gaps()),
        defects=tuple(benchmark.defects()),
        miscounted=None if subset else _miscounted(benchmark, samples, len(files)),
    )


def _whole(samples: Sequence[Sample]) -> Sample:
    """A whole file with all its questions, without their times."""
    messages = tuple(replace(message, at=None) for sample in samples for message in sample.messages)
    items = tuple(item for sample in samples for item in sample.items)
    return replace(samples[0], start=0.0, end=None, messages=messages, items=items)


def _with_lengths(finding: Finding, samples: Sequence[Sample]) -> Finding:
    """A much too short file is a failure; another length, and questions after the end, are notes."""
    if finding.failures or finding.seconds <= 0:
        return finding
    sample, seconds = finding.sample, finding.seconds
    least, most = sample.meta.get("seconds", (0.0, float("inf")))
    if seconds < SHORTER * least:
        what = f"{sample.video} lasts {seconds:.1f} s, but at least {least:.0f} s were expected; download it again"
        return replace(finding, failures=(_failure(sample, "video", "too_short", what),))
    notes = [*finding.notes]
    if not least <= seconds <= most:
        notes.append(f"{sample.id} lasts {seconds:.1f} s; expected {least:.0f} to {most:.0f} s")
    late = [
        (question.item.id, "it sees all of it" if each.start < seconds else f"from {each.start:g} s on it sees nothing")
        for each in samples
        for question in each.questions
        if (question.at or each.end or 0.0) > seconds + SLACK
    ]
    notes += [f"{name} is asked after the end of its video ({seconds:.1f} s): {what}" for name, what in late]
    return replace(finding, notes=tuple(notes))


def _miscounted(benchmark: BenchmarkOptions, samples: Sequence[Sample], videos: int) -> str | None:
    published, questions = benchmark.published, sum(len(sample.questions) for sample in samples)
    if published is None or (published.videos, published.questions) == (videos, questions):
        return None
    found = f"{counted(videos, 'video')} and {counted(questions, 'question')}"
    return (
        f"{benchmark.annotations[0]}: {found}, but {published.videos:,} and "
        f"{published.questions:,} are published; download the annotations again, or give --subset"
    )


def require_annotations(benchmark: BenchmarkOptions) -> None:
    """Raises ManifestError if an annotation file is missing: there are no questions then."""
    if not all(path.is_file() for path in benchmark.annotations):
        raise ManifestError([f"missing: {gap.what}; {gap.how}" for gap in benchmark.gaps()])


def add_benchmark_options(parser: argparse.ArgumentParser, *, name: str, required: bool) -> None:
    """The options that choose a benchmark; `name` is the help of --benchmark."""
    parser.add_argument("--benchmark", required=required, metavar="NAME", help=name)
    parser.add_argument("--root", required=required, type=Path, metavar="DIR", help="the folder of the benchmark")
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="an option of the benchmark"
    )


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """The options that check and convert share."""
    parser.add_argument(
        "--tracks", choices=TRACKS, default="both", help="tracks that a run uses (default: %(default)s)"
    )
    parser.add_argument("--decode", action="store_true", help="decode every file; finds truncated ones")
    parser.add_argument("--max-failures", type=float, default=0.0, help="share that may fail (default: %(default)s)")
    parser.add_argument("--allow-absolute-paths", action="store_true", help="media outside the manifest's folder")
