"""The judgement of a row against its files: which tracks are read, and whether its times are within the stream.

`omnimem check`, the preflight, training, evaluation and `omnimem ask` all use it, so they accept and refuse alike.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

from omnimem.data import Sample
from omnimem.media import MediaError, MediaInfo, TracksOption, probe
from omnimem.media.container import Reason
from omnimem.tokens import Tracks

SLACK = 1.0  # seconds by which containers may disagree about the same length


@final
@dataclass(frozen=True, kw_only=True)
class RowProblem:
    """Why a row cannot be used: the key of the row, and what a MediaError says."""

    key: str
    path: Path
    reason: Reason
    what: str

    @property
    def error(self) -> MediaError:
        """The problem as an error."""
        return MediaError(self.path, self.reason, self.what)


@final
@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Tracks that are present, their lengths from the origin (0 if unknown), the tracks to read, and all problems."""

    video: bool = False
    audio: bool = False
    video_seconds: float = 0.0
    audio_seconds: float = 0.0
    tracks: Tracks = "both"
    problems: tuple[RowProblem, ...] = ()

    @property
    def seconds(self) -> float:
        """Length of the longer track."""
        return max(self.video_seconds, self.audio_seconds)


def judge(sample: Sample, asked: TracksOption) -> Judgement:
    """Probe the files of a sample; if it has times, a length that no header declares is measured (`probe`)."""
    # 1. probe
    if not sample.has_stream:
        return Judgement()
    infos: dict[str, MediaInfo] = {}
    problems: list[RowProblem] = []
    timed = sample.start > 0 or sample.end is not None or any(question.at is not None for question in sample.questions)
    for key, path in (("video", sample.video), ("audio", sample.audio)):
        if path is not None:
            try:
                infos[key] = probe(path, measure=timed and not sample.published)
            except MediaError as error:
                what = str(error).removeprefix(f"{error.path}: ")
                problems.append(RowProblem(key=key, path=error.path, reason=error.reason, what=what))
    if problems:
        return Judgement(problems=tuple(problems))
    # 2. tracks and times
    visual, heard = infos.get("video"), infos.get("audio", infos.get("video"))
    video = visual is not None and visual.has_video and sample.tracks != "audio"
    audio = heard is not None and heard.has_audio and sample.tracks != "video"
    found = Judgement(
        video=video,
        audio=audio,
        video_seconds=visual.video_seconds if visual and video else 0.0,
        audio_seconds=heard.audio_seconds if heard and audio else 0.0,
        tracks=_present(video, audio) if asked == "both" else "both" if asked == "require_both" else asked,
    )
    # 3. problems
    problems += _missing_tracks(sample, asked, video, audio)
    problems += late_times(sample, found.seconds)
    return Judgement(**{**vars(found), "problems": tuple(problems)})


def tracks_of(sample: Sample, asked: TracksOption) -> Tracks:
    """The tracks of a sample that are read; raises the MediaError of the first problem of `judge`."""
    judged = judge(sample, asked)
    for problem in judged.problems:
        raise problem.error
    return judged.tracks


def _present(video: bool, audio: bool) -> Tracks:
    return "both" if video and audio else "video" if video else "audio"


def _missing_tracks(sample: Sample, asked: TracksOption, video: bool, audio: bool) -> Iterator[RowProblem]:
    """`both` reads what is present; but a file that is named and holds nothing to read is a mistake."""
    shown, heard = sample.shown, sample.audio or sample.shown
    alone = sample.tracks is not None or sample.video is None or sample.audio is None  # one file for both tracks
    if not video and (asked in ("video", "require_both") or (asked == "both" and not (alone and audio))):
        what = "has no video track" if sample.video is not None else "is audio only, no video is given"
        what = "is read without its video (tracks: audio of the row)" if sample.tracks == "audio" else what
        cure = "give another file, or use tracks: audio" + (" (or both)" if audio and alone else "")
        yield RowProblem(key="video", path=shown, reason="no_video", what=f"{what}; {cure}")
    if not audio and (asked in ("audio", "require_both") or (asked == "both" and not (alone and video))):
        cure = "give an audio file, or use tracks: video" + (" (or both)" if video and alone else "")
        what = "is read without audio (tracks: video of the row)" if sample.tracks == "video" else "has no audio track"
        yield RowProblem(key="audio", path=heard, reason="no_audio", what=f"{what}; {cure}")


def late_times(sample: Sample, seconds: float) -> Iterator[RowProblem]:
    """Times after the end of the files, if their length is known; those of a published benchmark are no problems."""
    if seconds <= 0 or sample.published:
        return
    path, length = sample.shown, f"after the end of the file ({seconds:.1f} s)"
    if sample.start >= seconds:
        what = f"start = {sample.start:g} s is {length}; lower it"
        yield RowProblem(key="start", path=path, reason="empty", what=what)
    if sample.end is not None and sample.end > seconds + SLACK:
        what = f"end = {sample.end:g} s is {length}; lower it, or make it null"
        yield RowProblem(key="end", path=path, reason="too_short", what=what)
    last = seconds if sample.end is None else min(seconds, sample.end)
    if last < seconds:
        length = f"after the end of the sample (end = {last:g} s)"
    for question in sample.questions:
        if question.at is not None and question.at > last + SLACK:
            what = f"question {question.index} is asked at {question.at:g} s, {length}"
            cure = "lower `at`, or make it null to ask after the end"
            yield RowProblem(key="messages", path=path, reason="too_short", what=f"{what}; {cure}")
