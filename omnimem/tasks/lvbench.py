"""LVBench: fifteen questions about each of 103 videos of half an hour to two and a half.

Folder (github.com/THUDM/LVBench with huggingface.co/datasets/zai-org/LVBench): video_info.meta.jsonl, and the videos
as <key>.mp4 in videos/ or all_videos/, or as video2dataset leaves them (numbered, the address in a .json beside each).
LVBench publishes how answers are read and counted, but no prompt: both rule sets ask as lmms-eval 0.7.3 does.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

from omnimem.data import Item, ManifestError, Question, Sample
from omnimem.tasks import rules
from omnimem.tasks.annotations import (
    AnnotationReader,
    Asked,
    Row,
    first_file,
    labels_of,
    missing_videos,
    read_json,
    read_lines,
    stream_of,
    strings_of,
    video_file,
)
from omnimem.tasks.base import Defect, Gap, Published, Verdict
from omnimem.tasks.rules import LETTERS, LMMS_EVAL, RuleSet

RULES: Mapping[str, RuleSet] = {
    "official": RuleSet(read=rules.lvbench, denominator="all"),
    "lmms_eval": LMMS_EVAL,
}
TABLE = "video_info.meta.jsonl"
FOLDERS, VIDEOS = ("", "data"), ("videos", "all_videos", "scripts/videos", "")
DOWNLOADED = ("videos", "scripts/videos")  # where download.sh lets video2dataset write
OPTION = re.compile(r"^\s*\(([A-Z])\)\s*(.*?)\s*$", re.MULTILINE)
SLACK = 0.05  # share by which a file may differ from the length that is declared


@final
@dataclass(frozen=True, kw_only=True)
class LVBenchOptions:
    """LVBench."""

    name: Literal["lvbench"] = "lvbench"
    root: str = "data/LVBench"
    rules: Literal["official", "lmms_eval"] = "official"

    @property
    def label(self) -> str:
        """Of the result files."""
        return self.name if self.rules == "official" else f"{self.name}_{self.rules}"

    @property
    def published(self) -> Published:
        """As in the paper."""
        return Published(videos=103, questions=1549)

    @property
    def annotations(self) -> tuple[Path, ...]:
        """The lines of videos with their questions."""
        root = Path(self.root)
        return (first_file(root / folder / TABLE for folder in FOLDERS) or root / TABLE,)

    def gaps(self) -> list[Gap]:
        """The annotations and the videos."""
        (table,) = self.annotations
        source = f"hf download zai-org/LVBench --repo-type dataset --local-dir {self.root}"
        if not table.is_file():
            return [Gap(what=f"{table}", how=f"get it with `{source}`")]
        return missing_videos(
            self.samples(),
            "save them there under their YouTube ids; scripts/download.sh of github.com/THUDM/LVBench gets them, or "
            f"`hf download lmms-eval/LVBench --repo-type dataset --local-dir {self.root}`, a mirror",
        )

    def samples(self) -> list[Sample]:
        """One sample a video, in the order of the file; raises ManifestError with every problem."""
        return self._read()[0]

    def defects(self) -> list[Defect]:
        """What the annotations have wrong, by rule."""
        return self._read()[1]

    def judge(self, question: Question, prediction: str) -> Verdict:
        """By the rule set of `rules`."""
        return RULES[self.rules].judge(question, prediction)

    def _read(self) -> tuple[list[Sample], list[Defect]]:
        reading, downloaded = AnnotationReader(), _downloaded(Path(self.root))
        samples = [self._sample(row, origin, downloaded, reading) for origin, row in read_lines(self.annotations[0])]
        reading.several_labels(samples, "question_type")
        reading.done(samples)
        return samples, reading.defects

    def _sample(self, row: Row, origin: str, downloaded: Mapping[str, Path], reading: AnnotationReader) -> Sample:
        key, questions = reading.text(row, "key", origin), row.get("qa")
        if not isinstance(questions, list) or not all(isinstance(each, dict) for each in questions):
            reading.problems.append(f"{origin} qa: expected a list of questions; download the annotations again")
            questions = []
        video = video_file(Path(self.root), VIDEOS, key)
        kind = labels_of({"video_type": row.get("type")}, ["video_type"])
        return stream_of(
            key,
            video if video.is_file() else downloaded.get(key, video),
            [_asked(each, origin, kind, reading) for each in questions],
            seconds=_declared(row),
            origin=origin,
        )


def _asked(row: Row, origin: str, kind: Mapping[str, tuple[str, ...]], reading: AnnotationReader) -> Asked:
    """A question with the options that stand in it, or in a list beside it."""
    where, question = str(row.get("uid", "")), reading.text(row, "question", origin)
    if not where:
        reading.problems.append(f"{origin} uid: missing; download the annotations again")
    beside = strings_of(row.get("options")) or []
    question = "\n".join([question, *(f"({letter}) {text}" for letter, text in zip(LETTERS, beside, strict=False))])
    found = list(OPTION.finditer(question))
    options = tuple(match[2] for match in found)
    if not found or "".join(match[1] for match in found) != LETTERS[: len(found)]:
        reading.defect("option_list", where, f"{len(found)} options in the question, or out of order; asked as it is")
    answer = reading.letter(row, "answer", f"{origin} {where}")
    reading.check_answer(answer, options, where)
    categories = {**labels_of(row, ["question_type"]), **kind}
    alone = question[: found[0].start()].strip() if found else question
    item = Item(id=where, question=alone, options=options, categories=categories)
    return Asked(item=item, prompt=f"{question}\nAnswer the question with the option letter", answer=answer)


def _declared(row: Row) -> tuple[float, float] | None:
    """How long the file should be."""
    info = row.get("video_info")
    minutes = info.get("duration_minutes") if isinstance(info, dict) else None
    return (60 * minutes * (1 - SLACK), 60 * minutes * (1 + SLACK)) if isinstance(minutes, int | float) else None


def _downloaded(root: Path) -> dict[str, Path]:
    """Videos that video2dataset numbered, by the YouTube id in the address that it noted beside them."""
    found: dict[str, Path] = {}
    for folder in DOWNLOADED:
        for note in sorted((root / folder).glob("*/*.json")):
            try:
                told = read_json(note)
            except ManifestError:
                continue  # a note of an unfinished download
            video = first_file([note.with_suffix(".mp4")])
            if video is not None and isinstance(told, dict):
                found[re.split(r"v=|youtu\.be/|/", str(told.get("url")))[-1].split("&")[0]] = video
    return found
