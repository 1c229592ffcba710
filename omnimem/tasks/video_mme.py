"""Video-MME: three questions about each of 900 videos of 11 seconds to an hour, with or without subtitles.

Folder (huggingface.co/datasets/lmms-lab/Video-MME, its zip files unpacked): videomme/test-00000-of-00001.parquet,
data/<videoID>.mp4, subtitle/<videoID>.srt. Prompts and extraction: github.com/BradyFU/Video-MME (official),
lmms-eval 0.7.3 (lmms_eval), VLMEvalKit with exact matching (vlmevalkit).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, final, get_args

from omnimem.data import Item, Sample
from omnimem.tasks import rules
from omnimem.tasks.annotations import (
    AnnotationReader,
    Asked,
    Options,
    Row,
    first_file,
    grouped,
    labels_of,
    read_parquet,
    stream_of,
    strings_of,
    video_file,
)
from omnimem.tasks.base import AnnotatedBenchmark, Gap, Published
from omnimem.tasks.rules import LMMS_EVAL, RuleSet
from omnimem.textfile import read_text

Rules = Literal["official", "lmms_eval", "vlmevalkit"]
Duration = Literal["short", "medium", "long"]

SECONDS: Mapping[str, tuple[float, float]] = {"short": (0.0, 120.0), "medium": (240.0, 900.0), "long": (1800.0, 3600.0)}
AXES = ("duration", "domain", "sub_category", "task_type")
TABLES = ("videomme/test-00000-of-00001.parquet", "test-00000-of-00001.parquet", "videomme.parquet")
VIDEOS, SUBTITLES = ("data", "video", "videos"), ("subtitle", "subtitles")

TASK = (
    "Select the best answer to the following multiple-choice question based on the video{and_subtitles}. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)
CUE = re.compile(r"(\d+):(\d\d):(\d\d)[,.](\d+)\s*-->\s*(\d+):(\d\d):(\d\d)[,.](\d+)")
TAG = re.compile(r"<[^>]*>")


@final
@dataclass(frozen=True, kw_only=True)
class VideoMMEOptions(AnnotatedBenchmark):
    """Video-MME, all durations or some of them.

    Answer extraction: `video_mme` and `vlmevalkit` of omnimem/tasks/rules.py.
    """

    rule_sets: ClassVar[Mapping[str, RuleSet]] = {
        "official": RuleSet(read=rules.video_mme, denominator="answered"),
        "lmms_eval": LMMS_EVAL,
        "vlmevalkit": RuleSet(read=rules.vlmevalkit, denominator="all"),
    }
    name: Literal["video_mme"] = "video_mme"
    root: str = "data/Video-MME"
    durations: tuple[Duration, ...] = get_args(Duration)  # kinds of videos that are asked about
    subtitles: bool = False  # in the prompt, before the task
    subtitle_fps: float | None = None  # subtitles at the frames that are read; None: stream.fps (1 without a run)
    rules: Rules = "official"

    def __post_init__(self) -> None:
        if not self.durations or len(set(self.durations)) < len(self.durations):
            raise ValueError(f"durations = {list(self.durations)} must name short, medium or long, each at most once")
        if self.subtitle_fps is not None and self.subtitle_fps <= 0:
            raise ValueError(f"subtitle_fps = {self.subtitle_fps} must be above 0; leave it out for stream.fps")

    @property
    def label_parts(self) -> list[str]:
        """The name, the durations unless all are chosen, and the subtitles."""
        part = [] if len(self.durations) == len(SECONDS) else [each for each in SECONDS if each in self.durations]
        return [self.name, *part, *(["subtitles"] if self.subtitles else [])]

    @property
    def published(self) -> Published:
        return Published(videos=300 * len(self.durations), questions=900 * len(self.durations))

    @property
    def annotations(self) -> tuple[Path, ...]:
        root = Path(self.root)
        return (first_file(root / name for name in TABLES) or root / TABLES[0],)

    @property
    def sources(self) -> tuple[str, str]:
        hub = f"`hf download lmms-lab/Video-MME --repo-type dataset --local-dir {self.root}`"
        return f"get it with {hub}", f"unpack videos_chunked_*.zip into {self.root} ({hub} gets them)"

    def gaps(self) -> list[Gap]:
        """Missing annotations or videos, and missing subtitles."""
        found, folders = super().gaps(), [Path(self.root) / name for name in SUBTITLES]
        if self.subtitles and self.annotations[0].is_file() and not any(folder.is_dir() for folder in folders):
            found.append(
                Gap(what=f"{folders[0]}", how=f"unpack subtitle.zip into {self.root}, or leave out `subtitles`")
            )
        return found

    def read(self, reader: AnnotationReader) -> list[Sample]:
        """One sample per video of the chosen durations."""
        rows = read_parquet(self.annotations[0])
        for place, row in rows:
            reader.one_of(row, "duration", tuple(SECONDS), place)
        chosen = [placed for placed in rows if placed[1].get("duration") in self.durations]
        return [self._sample(group, reader) for group in grouped(chosen, "videoID")]

    def _sample(self, rows: list[tuple[str, Row]], reader: AnnotationReader) -> Sample:
        """The video of these rows, with their questions."""
        origin, first = rows[0]
        name = reader.text(first, "videoID", origin)
        before = self._before(name)
        return stream_of(
            name,
            video_file(Path(self.root), VIDEOS, name),
            [self._asked(row, place, before, reader) for place, row in rows],
            seconds=SECONDS.get(str(first.get("duration"))),
            origin=origin,
        )

    def _asked(self, row: Row, origin: str, before: str, reader: AnnotationReader) -> Asked:
        where, question = reader.text(row, "question_id", origin), reader.text(row, "question", origin)
        options = reader.options(strings_of(row.get("options")) or [], where)
        answer = reader.letter(row, "answer", origin)
        reader.check_answer(answer, options.texts, where)
        item = Item(id=where, question=question, options=options.texts, categories=labels_of(row, AXES))
        return Asked(item=item, prompt=before + self._prompt(question, options), answer=answer)

    def _prompt(self, question: str, options: Options) -> str:
        """The task and the question; `_before` gives the text before them."""
        asked = "\n".join([question, *options.lines])
        match self.rules:
            case "official":
                return f"{TASK.format(and_subtitles='')}\n{asked}\nThe best answer is:"
            case "lmms_eval":  # mentions subtitles even without them, as theirs does
                direct = "\nAnswer with the option's letter from the given choices directly."
                ending = "The best answer is:" if self.subtitles else direct
                return f"{TASK.format(and_subtitles=' and the subtitles')}\n{asked}\n{ending}"
            case "vlmevalkit":
                return f"{TASK.format(and_subtitles='')}\nQuestion: {asked}\nAnswer: "

    def _before(self, name: str) -> str:
        """Text before the task: subtitles at the frames that are read."""
        frames = "\nThese are the frames of a video. " if self.rules == "vlmevalkit" else ""
        if not self.subtitles:
            return frames
        path = first_file(Path(self.root) / folder / f"{name}.srt" for folder in SUBTITLES)
        shown = "\n".join(_shown(read_text(path), self.subtitle_fps or 1.0)) if path else ""
        if self.rules == "lmms_eval":
            return f"This video's subtitles are listed below: \n{shown or 'No subtitles available'}\n"
        return f"{frames}This video's subtitles are listed below:\n{shown}\n"


def _shown(srt: str, fps: float) -> Iterator[str]:
    """Texts of an srt file visible at any time k / fps, each once, without markup."""
    for block in re.split(r"\n\s*\n", srt.replace("\r\n", "\n").replace("\r", "\n")):
        found = CUE.search(block)
        if found is None:
            continue
        start, end = (_seconds(found.groups()[place : place + 4]) for place in (0, 4))
        frame = -(-start * fps // 1) / fps  # the first frame at or after the start
        text = " ".join(TAG.sub("", block[found.end() :]).split())
        if text and frame < end:
            yield text


def _seconds(clock: tuple[str, ...]) -> float:
    hours, minutes, seconds, thousandths = map(int, clock)
    return 3600 * hours + 60 * minutes + seconds + thousandths / 1000
