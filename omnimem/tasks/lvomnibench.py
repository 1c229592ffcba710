"""LVOmniBench: 1,014 questions about 275 videos of 10 to 90 minutes that need both video and audio.

Folder (huggingface.co/datasets/KD-TAO/LVOmniBench): data.json, videos/<video_id>.mp4. Prompt, extraction and
denominator: OmniEval of github.com/KD-TAO/LVOmniBench (official); its model wrappers also change the system prompt,
this does not. `lmms_eval` applies lmms-eval's shared extraction to the same prompt: lmms-eval has no such task.
"""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, final

from omnimem.data import Item, ManifestError, Sample
from omnimem.tasks import rules
from omnimem.tasks.annotations import (
    AnnotationReader,
    Asked,
    Row,
    grouped,
    labels_of,
    read_json,
    stream_of,
    strings_of,
    video_file,
)
from omnimem.tasks.base import AnnotatedBenchmark, Published
from omnimem.tasks.rules import LMMS_EVAL, RuleSet

AXES = ("question_type", "audio_type", "difficulty", "video_category", "sub_category")
SECONDS = (600.0, 5400.0)
PROMPT = (
    "Question: {question}\nOptions:\n{options}\n\nSelect the best answer from the options above. Directly provide the "
    "letter representing your choice and nothing else. Do not include the full text of the option, do not provide any "
    "explanation."
)


@final
@dataclass(frozen=True, kw_only=True)
class LVOmniBenchOptions(AnnotatedBenchmark):
    """LVOmniBench. Answer extraction: `lvomnibench` of omnimem/tasks/rules.py."""

    rule_sets: ClassVar[Mapping[str, RuleSet]] = {
        "official": RuleSet(read=rules.lvomnibench, denominator="answered"),
        "lmms_eval": LMMS_EVAL,
    }
    name: Literal["lvomnibench"] = "lvomnibench"
    root: str = "data/LVOmniBench"
    rules: Literal["official", "lmms_eval"] = "official"

    @property
    def published(self) -> Published:
        return Published(videos=275, questions=1014)

    @property
    def annotations(self) -> tuple[Path, ...]:
        return (Path(self.root) / "data.json",)

    @property
    def sources(self) -> tuple[str, str]:
        hub = f"with `hf download KD-TAO/LVOmniBench --repo-type dataset --local-dir {self.root}`"
        return f"get it {hub}", f"get them {hub}"

    def read(self, reader: AnnotationReader) -> list[Sample]:
        """One sample per video."""
        path = self.annotations[0]
        rows = read_json(path)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ManifestError([f"{path}: expected a list of questions; download the annotations again"])
        placed = [(f"{path}:item {number}", row) for number, row in enumerate(rows, start=1)]
        return [self._sample(group, reader) for group in grouped(placed, "video_id")]

    def _sample(self, rows: list[tuple[str, Row]], reader: AnnotationReader) -> Sample:
        origin, first = rows[0]
        name = reader.text(first, "video_id", origin)
        asked = [_asked(row, place, f"{name}#{number}", reader) for number, (place, row) in enumerate(rows)]
        return stream_of(name, video_file(Path(self.root), ("videos", ""), name), asked, seconds=SECONDS, origin=origin)


def _asked(row: Row, origin: str, otherwise: str, reader: AnnotationReader) -> Asked:
    """A question; without an id (as published) it is named by its video and number."""
    where = str(row.get("question_id") or otherwise)
    options = reader.options(_strings(row.get("options"), where, reader), where)
    answer = reader.letter(row, "correct_option", origin)
    reader.check_answer(answer, options.texts, where)
    question = reader.text(row, "question", origin)
    return Asked(
        item=Item(id=where, question=question, options=options.texts, categories=labels_of(row, AXES)),
        prompt=PROMPT.format(question=question, options="\n".join(options.lines)),
        answer=answer,
    )


def _strings(value: Any, where: str, reader: AnnotationReader) -> list[str]:
    """The list of options; some editions store it as text."""
    if isinstance(value, str):
        reader.defect("option_list", where, "the list of options is text; read as a list, else line by line")
        try:
            value = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            value = value.splitlines()
    return strings_of(value) or []
