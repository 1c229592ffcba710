"""LVBench: fifteen questions about each of 103 videos of 0.5 to 2.5 hours.

Folder (github.com/THUDM/LVBench with huggingface.co/datasets/zai-org/LVBench): video_info.meta.jsonl, and the videos
as <key>.mp4 in videos/ or all_videos/, or as video2dataset writes them (numbered, the URL in a .json beside each).
LVBench publishes its answer extraction, but no prompt: both rule sets use the prompt of lmms-eval 0.7.3.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, final

from omnimem.data import Item, ManifestError, Sample
from omnimem.errors import counted
from omnimem.tasks import rules
from omnimem.tasks.annotations import (
    AnnotationReader,
    Asked,
    Row,
    first_file,
    labels_of,
    read_json,
    stream_of,
    strings_of,
    video_file,
)
from omnimem.tasks.base import AnnotatedBenchmark, Published
from omnimem.tasks.rules import LETTERS, LMMS_EVAL, RuleSet
from omnimem.textfile import read_objects

TABLE = "video_info.meta.jsonl"
FOLDERS, VIDEOS = ("", "data"), ("videos", "all_videos", "scripts/videos", "")
DOWNLOADED = ("videos", "scripts/videos")  # where download.sh makes video2dataset write
OPTION = re.compile(r"^\s*\(([A-Z])\)\s*(.*?)\s*$", re.MULTILINE)
SLACK = 0.05  # relative difference allowed between the length of a file and the declared one


@final
@dataclass(frozen=True, kw_only=True)
class LVBenchOptions(AnnotatedBenchmark):
    """LVBench. Answer extraction: `lvbench` of omnimem/tasks/rules.py."""

    rule_sets: ClassVar[Mapping[str, RuleSet]] = {
        "official": RuleSet(read=rules.lvbench, denominator="all"),
        "lmms_eval": LMMS_EVAL,
    }
    name: Literal["lvbench"] = "lvbench"
    root: str = "data/LVBench"
    rules: Literal["official", "lmms_eval"] = "official"

    @property
    def published(self) -> Published:
        return Published(videos=103, questions=1549)

    @property
    def annotations(self) -> tuple[Path, ...]:
        root = Path(self.root)
        return (first_file(root / folder / TABLE for folder in FOLDERS) or root / TABLE,)

    @property
    def sources(self) -> tuple[str, str]:
        into = f"--repo-type dataset --local-dir {self.root}"
        return (
            f"get it with `hf download zai-org/LVBench {into}`",
            "save them there under their YouTube ids; scripts/download.sh of github.com/THUDM/LVBench gets them, or "
            f"`hf download lmms-eval/LVBench {into}`, a mirror",
        )

    def read(self, reader: AnnotationReader) -> list[Sample]:
        """One sample per video."""
        downloaded = _downloaded(Path(self.root))
        samples = [self._sample(row, origin, downloaded, reader) for origin, row in read_objects(self.annotations[0])]
        reader.several_labels(samples, "question_type")
        return samples

    def _sample(self, row: Row, origin: str, downloaded: Mapping[str, Path], reader: AnnotationReader) -> Sample:
        key, questions = reader.text(row, "key", origin), row.get("qa")
        if not isinstance(questions, list) or not all(isinstance(each, dict) for each in questions):
            reader.problems.append(f"{origin} qa: expected a list of questions; download the annotations again")
            questions = []
        video = video_file(Path(self.root), VIDEOS, key)
        kind = labels_of({"video_type": row.get("type")}, ["video_type"])
        return stream_of(
            key,
            video if video.is_file() else downloaded.get(key, video),
            [_asked(each, origin, kind, reader) for each in questions],
            seconds=_declared(row),
            origin=origin,
        )


def _asked(row: Row, origin: str, kind: Mapping[str, tuple[str, ...]], reader: AnnotationReader) -> Asked:
    """A question with the options in its text, or in a list beside it."""
    where, question = str(row.get("uid", "")), reader.text(row, "question", origin)
    if not where:
        reader.problems.append(f"{origin} uid: missing; download the annotations again")
    beside = strings_of(row.get("options")) or []
    question = "\n".join([question, *(f"({letter}) {text}" for letter, text in zip(LETTERS, beside, strict=False))])
    found = list(OPTION.finditer(question))
    options = tuple(match[2] for match in found)
    if not found or "".join(match[1] for match in found) != LETTERS[: len(found)]:
        reader.defect(
            "option_list", where, f"{counted(len(found), 'option')} in the question, or out of order; not changed"
        )
    answer = reader.letter(row, "answer", f"{origin} {where}")
    reader.check_answer(answer, options, where)
    categories = {**labels_of(row, ["question_type"]), **kind}
    alone = question[: found[0].start()].strip() if found else question
    item = Item(id=where, question=alone, options=options, categories=categories)
    return Asked(item=item, prompt=f"{question}\nAnswer the question with the option letter", answer=answer)


def _declared(row: Row) -> tuple[float, float] | None:
    """Shortest and longest length expected of the file."""
    info = row.get("video_info")
    minutes = info.get("duration_minutes") if isinstance(info, dict) else None
    return (60 * minutes * (1 - SLACK), 60 * minutes * (1 + SLACK)) if isinstance(minutes, int | float) else None


def _downloaded(root: Path) -> dict[str, Path]:
    """Videos numbered by video2dataset, by the YouTube id of the URL in the .json beside them."""
    found: dict[str, Path] = {}
    for folder in DOWNLOADED:
        for note in sorted((root / folder).glob("*/*.json")):
            try:
                table = read_json(note)
            except ManifestError:
                continue  # of an unfinished download
            video = first_file([note.with_suffix(".mp4")])
            if video is not None and isinstance(table, dict):
                found[re.split(r"v=|youtu\.be/|/", str(table.get("url")))[-1].split("&")[0]] = video
    return found
