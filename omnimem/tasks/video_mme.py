"""Video-MME: three questions about each of 900 videos of 11 seconds to an hour, with or without subtitles.

Folder (huggingface.co/datasets/lmms-lab/Video-MME, its zip files unpacked): videomme/test-00000-of-00001.parquet,
data/<videoID>.mp4, subtitle/<videoID>.srt. Prompts and extraction: github.com/BradyFU/Video-MME (official),
lmms-eval 0.7.3 (lmms_eval), VLMEvalKit with exact matching (vlmevalkit).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final, get_args

from omnimem.data import Item, Question, Sample
from omnimem.tasks import rules
from omnimem.tasks.annotations import (
    AnnotationReader,
    Asked,
    Options,
    Row,
    first_file,
    grouped,
    labels_of,
    missing_videos,
    read_parquet,
    stream_of,
    strings_of,
    video_file,
)
from omnimem.tasks.base import Defect, Gap, Published, Verdict
from omnimem.tasks.rules import LMMS_EVAL, RuleSet

Rules = Literal["official", "lmms_eval", "vlmevalkit"]
Duration = Literal["short", "medium", "long"]

RULES: Mapping[str, RuleSet] = {
    "official": RuleSet(read=rules.video_mme, denominator="answered"),
    "lmms_eval": LMMS_EVAL,
    "vlmevalkit": RuleSet(read=rules.vlmevalkit, denominator="all"),
}
SECONDS: Mapping[str, tuple[float, float]] = {
    "short": (0.0, 120.0),
    "medium": (240.0, 900.0),
    "long": (1800.0, 3600.0),
}
AXES = ("duration", "domain", "sub_category", "task_type")
TABLES = ("videomme/test-00000-of-00001.parquet", "test-00000-of-00001.parquet", "videomme.parquet")
VIDEOS, SUBTITLES = ("data", "video", "videos"), ("subtitle", "subtitles")
SOURCE = "hf download lmms-lab/Video-MME --repo-type dataset --local-dir"

TASK = (
    "Select the best answer to the following multiple-choice question based on the video{and_subtitles}. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)
CUE = re.compile(r"(\d+):(\d\d):(\d\d)[,.](\d+)\s*-->\s*(\d+):(\d\d):(\d\d)[,.](\d+)")
TAG = re.compile(r"<[^>]*>")


@final
@dataclass(frozen=True, kw_only=True)
class VideoMMEOptions:
    """Video-MME, all of it or the videos of some durations."""

    name: Literal["video_mme"] = "video_mme"
    root: str = "data/Video-MME"
    durations: tuple[Duration, ...] = get_args(Duration)
    subtitles: bool = False  # in the prompt, before the question
    subtitle_fps: float = 1.0  # those shown at the frames that are seen: the same as stream.fps
    rules: Rules = "official"

    def __post_init__(self) -> None:
        if not self.durations or len(set(self.durations)) < len(self.durations):
            raise ValueError(f"durations = {list(self.durations)} must name short, medium or long, each once at most")
        if self.subtitle_fps <= 0:
            raise ValueError(f"subtitle_fps = {self.subtitle_fps} must be above 0; give that of stream.fps")

    @property
    def label(self) -> str:
        """Of the result files."""
        part = [] if len(self.durations) == len(SECONDS) else [each for each in SECONDS if each in self.durations]
        subtitles = ["subtitles"] if self.subtitles else []
        return "_".join([self.name, *part, *subtitles, *([] if self.rules == "official" else [self.rules])])

    @property
    def published(self) -> Published:
        """300 videos of each duration."""
        return Published(videos=300 * len(self.durations), questions=900 * len(self.durations))

    @property
    def annotations(self) -> tuple[Path, ...]:
        """The table of questions."""
        root = Path(self.root)
        return (first_file(root / name for name in TABLES) or root / TABLES[0],)

    def gaps(self) -> list[Gap]:
        """The table, videos, the folder of subtitles."""
        (table,) = self.annotations
        if not table.is_file():
            return [Gap(what=f"{table}", how=f"get it with `{SOURCE} {self.root}`")]
        found = missing_videos(
            self.samples(), f"unpack videos_chunked_*.zip into {self.root} (`{SOURCE} {self.root}` gets them)"
        )
        if self.subtitles and not any((Path(self.root) / name).is_dir() for name in SUBTITLES):
            what = f"{Path(self.root) / SUBTITLES[0]}"
            found.append(Gap(what=what, how=f"unpack subtitle.zip into {self.root}, or leave `subtitles` out"))
        return found

    def samples(self) -> list[Sample]:
        """One sample a video, in the order of the table; raises ManifestError with every problem."""
        return self._read()[0]

    def defects(self) -> list[Defect]:
        """What the table has wrong, by rule."""
        return self._read()[1]

    def judge(self, question: Question, prediction: str) -> Verdict:
        """By the rule set of `rules`."""
        return RULES[self.rules].judge(question, prediction)

    def _read(self) -> tuple[list[Sample], list[Defect]]:
        reading = AnnotationReader()
        rows = read_parquet(self.annotations[0])
        for place, row in rows:
            reading.one_of(row, "duration", tuple(SECONDS), place)
        chosen = [placed for placed in rows if placed[1].get("duration") in self.durations]
        samples = [self._sample(group, reading) for group in grouped(chosen, "videoID")]
        reading.done(samples)
        return samples, reading.defects

    def _sample(self, rows: list[tuple[str, Row]], reading: AnnotationReader) -> Sample:
        """The video that these rows ask about."""
        origin, first = rows[0]
        name = reading.text(first, "videoID", origin)
        before = self._before(name)
        return stream_of(
            name,
            video_file(Path(self.root), VIDEOS, name),
            [self._asked(row, place, before, reading) for place, row in rows],
            seconds=SECONDS.get(str(first.get("duration"))),
            origin=origin,
        )

    def _asked(self, row: Row, origin: str, before: str, reading: AnnotationReader) -> Asked:
        where, question = reading.text(row, "question_id", origin), reading.text(row, "question", origin)
        options = reading.options(strings_of(row.get("options")) or [], where)
        answer = reading.letter(row, "answer", origin)
        reading.check_answer(answer, options.texts, where)
        item = Item(id=where, question=question, options=options.texts, categories=labels_of(row, AXES))
        return Asked(item=item, prompt=before + self._prompt(question, options), answer=answer)

    def _prompt(self, question: str, options: Options) -> str:
        """The task and the question; what comes before them is `_subtitles`."""
        asked = "\n".join([question, *options.lines])
        match self.rules:
            case "official":
                return f"{TASK.format(and_subtitles='')}\n{asked}\nThe best answer is:"
            case "lmms_eval":  # speaks of subtitles where there are none, as theirs does
                direct = "\nAnswer with the option's letter from the given choices directly."
                ending = "The best answer is:" if self.subtitles else direct
                return f"{TASK.format(and_subtitles=' and the subtitles')}\n{asked}\n{ending}"
            case "vlmevalkit":
                return f"{TASK.format(and_subtitles='')}\nQuestion: {asked}\nAnswer: "

    def _before(self, name: str) -> str:
        """What stands before the task: the subtitles shown at the frames that are seen."""
        frames = "\nThese are the frames of a video. " if self.rules == "vlmevalkit" else ""
        if not self.subtitles:
            return frames
        path = first_file(Path(self.root) / folder / f"{name}.srt" for folder in SUBTITLES)
        shown = "\n".join(_shown(path.read_text(encoding="utf-8-sig"), self.subtitle_fps)) if path else ""
        if self.rules == "lmms_eval":
            return f"This video's subtitles are listed below: \n{shown or 'No subtitles available'}\n"
        return f"{frames}This video's subtitles are listed below:\n{shown}\n"


def _shown(srt: str, fps: float) -> Iterator[str]:
    """The texts of an srt file that are on the screen at a time k / fps, each once, without markup."""
    for block in re.split(r"\n\s*\n", srt.replace("\r\n", "\n")):
        found = CUE.search(block)
        if found is None:
            continue
        start, end = (_seconds(found.groups()[place : place + 4]) for place in (0, 4))
        frame = -(-start * fps // 1) / fps  # the first one at or after its start
        text = " ".join(TAG.sub("", block[found.end() :]).split())
        if text and frame < end:
            yield text


def _seconds(clock: tuple[str, ...]) -> float:
    hours, minutes, seconds, thousandths = map(int, clock)
    return 3600 * hours + 60 * minutes + seconds + thousandths / 1000
