"""LVOmniBench: 1,014 questions about 275 videos of ten to ninety minutes that need both eyes and ears.

Folder (huggingface.co/datasets/KD-TAO/LVOmniBench): data.json, videos/<video_id>.mp4. Prompt, extraction and
denominator: OmniEval of github.com/KD-TAO/LVOmniBench (official); its model wrappers also change the system prompt,
which this does not. `lmms_eval` reads the same answers by lmms-eval's shared extraction: it has no such task.
"""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

from omnimem.data import Item, ManifestError, Question, Sample
from omnimem.tasks import rules
from omnimem.tasks.annotations import (
    AnnotationReader,
    Asked,
    Row,
    grouped,
    labels_of,
    missing_videos,
    read_json,
    stream_of,
    strings_of,
    video_file,
)
from omnimem.tasks.base import Defect, Gap, Published, Verdict
from omnimem.tasks.rules import LMMS_EVAL, RuleSet

RULES: Mapping[str, RuleSet] = {
    "official": RuleSet(read=rules.lvomnibench, denominator="answered"),
    "lmms_eval": LMMS_EVAL,
}
AXES = ("question_type", "audio_type", "difficulty", "video_category", "sub_category")
SECONDS = (600.0, 5400.0)
PROMPT = (
    "Question: {question}\nOptions:\n{options}\n\nSelect the best answer from the options above. Directly provide the "
    "letter representing your choice and nothing else. Do not include the full text of the option, do not provide any "
    "explanation."
)


@final
@dataclass(frozen=True, kw_only=True)
class LVOmniBenchOptions:
    """LVOmniBench."""

    name: Literal["lvomnibench"] = "lvomnibench"
    root: str = "data/LVOmniBench"
    rules: Literal["official", "lmms_eval"] = "official"

    @property
    def label(self) -> str:
        """Of the result files."""
        return self.name if self.rules == "official" else f"{self.name}_{self.rules}"

    @property
    def published(self) -> Published:
        """As in the paper."""
        return Published(videos=275, questions=1014)

    @property
    def annotations(self) -> tuple[Path, ...]:
        """The list of questions."""
        return (Path(self.root) / "data.json",)

    def gaps(self) -> list[Gap]:
        """The annotations and the videos."""
        how = f"get it with `hf download KD-TAO/LVOmniBench --repo-type dataset --local-dir {self.root}`"
        if not self.annotations[0].is_file():
            return [Gap(what=f"{self.annotations[0]}", how=how)]
        return missing_videos(self.samples(), how.replace("get it", "get them", 1))

    def samples(self) -> list[Sample]:
        """One sample a video, in the order of the list; raises ManifestError with every problem."""
        return self._read()[0]

    def defects(self) -> list[Defect]:
        """What the list has wrong, by rule."""
        return self._read()[1]

    def judge(self, question: Question, prediction: str) -> Verdict:
        """By the rule set of `rules`."""
        return RULES[self.rules].judge(question, prediction)

    def _read(self) -> tuple[list[Sample], list[Defect]]:
        reading, path = AnnotationReader(), self.annotations[0]
        rows = read_json(path)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ManifestError([f"{path}: expected a list of questions; download the annotations again"])
        placed = [(f"{path}:item {number}", row) for number, row in enumerate(rows, start=1)]
        samples = [self._sample(group, reading) for group in grouped(placed, "video_id")]
        reading.done(samples)
        return samples, reading.defects

    def _sample(self, rows: list[tuple[str, Row]], reading: AnnotationReader) -> Sample:
        origin, first = rows[0]
        name = reading.text(first, "video_id", origin)
        asked = [_asked(row, place, f"{name}#{number}", reading) for number, (place, row) in enumerate(rows)]
        return stream_of(name, video_file(Path(self.root), ("videos", ""), name), asked, seconds=SECONDS, origin=origin)


def _asked(row: Row, origin: str, otherwise: str, reading: AnnotationReader) -> Asked:
    """A question; the published list names none, so that its video and place do."""
    where = str(row.get("question_id") or otherwise)
    options = reading.options(_strings(row.get("options"), where, reading), where)
    answer = reading.letter(row, "correct_option", origin)
    reading.check_answer(answer, options.texts, where)
    question = reading.text(row, "question", origin)
    return Asked(
        item=Item(id=where, question=question, options=options.texts, categories=labels_of(row, AXES)),
        prompt=PROMPT.format(question=question, options="\n".join(options.lines)),
        answer=answer,
    )


def _strings(value: Any, where: str, reading: AnnotationReader) -> list[str]:
    """The list of options, which some editions hold as text."""
    if isinstance(value, str):
        reading.defect("option_list", where, "the list of options is text; read as a list, else line by line")
        try:
            value = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            value = value.splitlines()
    return strings_of(value) or []
