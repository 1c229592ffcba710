"""StreamingBench: questions during a video, about what is seen or heard, or about earlier questions.

Folder (github.com/THUNLP-MT/StreamingBench with huggingface.co/datasets/mjuicem/StreamingBench): src/data of the
repository with questions_real.json, questions_omni.json, questions_sqa.json, and the videos in videos/ as
scripts/preprocess.sh writes them, or unpacked as <part>/<task>/sample_<n>/<file>.mp4. Prompts, extraction and
denominator: src/benchmark/*.py and src/data/count.py there (official). Proactive output, the fourth part, is polled
every second and is not covered. `lmms_eval` applies lmms-eval's shared extraction: lmms-eval has no such task.

A question sees nothing after its time stamp: with `context: all` the stream from its beginning, with `60s` only the
last minute.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal, final, get_args

from omnimem.data import Item, ManifestError, Sample
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
)
from omnimem.tasks.base import AnnotatedBenchmark, Published
from omnimem.tasks.rules import LMMS_EVAL, RuleSet

Part = Literal["real", "omni", "sqa"]
PARTS: tuple[Part, ...] = get_args(Part)

COUNTS: Mapping[str, tuple[int, int]] = {"real": (499, 2500), "omni": (300, 1500), "sqa": (50, 250)}
CONTEXTUAL = ("Misleading Context Understanding", "Anomaly Context Understanding")  # in questions_omni.json
AXES = ("task_type", "required_ability", "video_categories")
FOLDERS = ("", "src/data")
CONTEXT_SECONDS = 60.0
ASTRAY = 3600.0  # seconds after the question's window: a later time stamp is an error
NEAR = 60.0  # seconds around the window in which another interpretation of a time stamp is used

INTRODUCTION = "You are an advanced video question-answering AI assistant. You have been provided with "
LETTER = "Respond with only the letter (A, B, C, or D) of the correct option."
PROMPT = (
    f"{INTRODUCTION}some frames from the video and a multiple-choice question related to the video. Your task is to "
    "carefully analyze the video and provide the best answer to question, choosing from the four options provided. "
    f"{LETTER}\n\nQuestion: {{question}}\n\nOptions:\n{{options}}\n\nThe best option is:"
)
SEQUENTIAL = (
    f"{INTRODUCTION}a video and a multiple-choice question related to the video. Your task is to carefully analyze the "
    "video and the provided context to answer the question, choosing from the four options provided. "
    f"{LETTER}\n\n{{context}}\n\nHere is the question. Answer it and don't confuse it with the previous conversation.\n"
    "Question: {question}\n\nOptions:\n{options}\n\nThe best option is:"
)
CONTEXT = (
    "Here are the contextual information related to the video. Please answer the questions based on the contextual "
    "information: "
)
BEFORE = (
    "At timestamp {stamp}, the following question and answer occurred: Question: {question}; Options: {options}; "
    "Answer: {answer}; "
)


@final
@dataclass(frozen=True, kw_only=True)
class StreamingBenchOptions(AnnotatedBenchmark):
    """StreamingBench, all of its multiple-choice parts or some.

    Answer extraction: `streamingbench` of omnimem/tasks/rules.py.
    """

    rule_sets: ClassVar[Mapping[str, RuleSet]] = {
        "official": RuleSet(read=rules.streamingbench, denominator="written"),
        "lmms_eval": LMMS_EVAL,
    }
    name: Literal["streamingbench"] = "streamingbench"
    root: str = "data/StreamingBench"
    parts: tuple[Part, ...] = PARTS  # sets of questions
    context: Literal["all", "60s"] = "all"  # of a question, before its time stamp
    rules: Literal["official", "lmms_eval"] = "official"

    def __post_init__(self) -> None:
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise ValueError(f"parts = {list(self.parts)} must name real, omni or sqa, each at most once")

    @property
    def label_parts(self) -> list[str]:
        """The name, the parts unless all are chosen, and the context."""
        part = [] if len(self.parts) == len(PARTS) else [each for each in PARTS if each in self.parts]
        return [self.name, *part, *([] if self.context == "all" else [self.context])]

    @property
    def published(self) -> Published:
        videos, questions = zip(*(COUNTS[part] for part in self.parts), strict=True)
        return Published(videos=sum(videos), questions=sum(questions))

    @property
    def annotations(self) -> tuple[Path, ...]:
        root = Path(self.root)
        names = [f"questions_{part}.json" for part in PARTS if part in self.parts]
        return tuple(first_file(root / folder / name for folder in FOLDERS) or root / name for name in names)

    @property
    def sources(self) -> tuple[str, str]:
        return (
            f"get src/data of github.com/THUNLP-MT/StreamingBench and set root to it (now {self.root})",
            f"get them with `hf download mjuicem/StreamingBench --repo-type dataset --local-dir {self.root}`, unpack "
            "them and run scripts/preprocess.sh of github.com/THUNLP-MT/StreamingBench",
        )

    def read(self, reader: AnnotationReader) -> list[Sample]:
        """One sample per video with `context: all`, one per video and time stamp with `60s`."""
        samples, unpacked = list[Sample](), _unpacked(Path(self.root))
        for path in self.annotations:
            part = path.stem.removeprefix("questions_")
            asked: dict[str, list[Asked]] = {}
            for origin, row, earlier in _entries(path, read_json(path)):
                name = PurePosixPath(reader.text(row, "video_path", origin)).name
                mine = asked.setdefault(name, [])
                mine += _questions(row, origin, part, PurePosixPath(name).stem, len(mine), earlier, reader)
            for name, questions in asked.items():
                samples += self._streams(path, name, questions, unpacked)
        return samples

    def _streams(self, path: Path, name: str, asked: Sequence[Asked], unpacked: Mapping[str, Path]) -> list[Sample]:
        """Streams of a video: up to its last question, or the minute before each."""
        # 1. the video and the times of its questions
        stem, video = PurePosixPath(name).stem, path.parent / "videos" / name
        video = video if video.is_file() else unpacked.get(name, video)
        ends = sorted({one.at for one in asked if one.at is not None})
        if not ends:
            return []
        # 2. one stream, or one per time
        if self.context == "all":
            return [stream_of(stem, video, asked, end=ends[-1], origin=f"{path}")]
        return [
            stream_of(
                f"{stem}@{end:g}",
                video,
                [replace(one, at=None) for one in asked if one.at == end],
                start=max(0.0, end - CONTEXT_SECONDS),
                end=end,
                cluster=stem,
                origin=f"{path}",
            )
            for end in ends
        ]


def _entries(path: Path, table: Any) -> list[tuple[str, Row, list[str]]]:
    """Entries with their origin, and the list that collects the questions of one conversation."""
    if not isinstance(table, list):
        raise ManifestError([f"{path}: expected a list of entries; download the annotations again"])
    found: list[tuple[str, Row, list[str]]] = []
    for number, entry in enumerate(table, start=1):
        earlier: list[str] = []
        for row in entry if isinstance(entry, list) else [entry]:
            if not isinstance(row, dict) or not isinstance(row.get("questions"), list):
                raise ManifestError([f"{path}:item {number}: holds no questions; download the annotations again"])
            found.append((f"{path}:item {number}", row, earlier))
    return found


def _questions(
    entry: Row, origin: str, part: str, stem: str, first: int, earlier: list[str], reader: AnnotationReader
) -> list[Asked]:
    """The questions of an entry; in a conversation (sqa) the prompt has the earlier ones with their right answers."""
    asked: list[Asked] = []
    for number, row in enumerate(entry["questions"], start=first):
        # 1. options, answer and question
        name = f"{stem}#{number}"
        options = reader.options(strings_of(row.get("options")) or [], name)
        answer, question = reader.letter(row, "answer", origin), reader.text(row, "question", origin)
        reader.check_answer(answer, options.texts, name)
        # 2. prompt
        lines = "\n".join(options.lines)
        prompt = PROMPT.format(question=question, options=lines)
        if part == "sqa":
            context = CONTEXT + "".join(earlier) if earlier else ""
            prompt = SEQUENTIAL.format(context=context, question=question, options=lines)
            shown = ", ".join(options.lines)
            stamp = row.get("time_stamp")
            earlier.append(BEFORE.format(stamp=stamp, question=question, options=shown, answer=answer))
        # 3. categories and time
        categories = _categories(part, {**entry, **row})
        item = Item(id=name, question=question, options=options.texts, categories=categories)
        at = seconds_of(reader.text(row, "time_stamp", origin), str(entry.get("time")), name, reader)
        asked.append(Asked(item=item, prompt=prompt, answer=answer, at=at))
    return asked


def _categories(part: str, row: Row) -> dict[str, tuple[str, ...]]:
    group = {"real": "real-time visual", "omni": "omni-source", "sqa": "contextual"}[part]
    group = "contextual" if row.get("task_type") in CONTEXTUAL else group
    return {"group": (group,), **labels_of(row, AXES)}


def _unpacked(root: Path) -> dict[str, Path]:
    """Videos as in the zip files, by the names that preprocess.sh would give them."""
    found: dict[str, Path] = {}
    for path in sorted(root.glob("**/sample_*/*.mp4")):
        found[f"{path.parent.name}_{path.parent.parent.name.replace(' ', '_')}.mp4"] = path
    return found


# ------------------------------------------------------------------------------------------------------- time stamps


def seconds_of(stamp: str, window: str, where: str, reader: AnnotationReader) -> float:
    """Seconds of a time stamp; an impossible one is interpreted and listed as a defect.

    Impossible: minutes or seconds of 60 and more, or an hour after the window of the question, which would let the
    question see the whole video. Its digits are read as hours, minutes and seconds, else as minutes and seconds; if
    neither is near the window, the end of the window is used.
    """
    # 1. a possible time stamp
    edges = [_seconds(clock) or 0.0 for clock in re.findall(r"[\d:]+", window)]
    seconds = _seconds(stamp)
    known = len(edges) == 2
    if seconds is not None and not (known and seconds > edges[1] + ASTRAY):
        if seconds < 1:
            reader.defect("time_stamp", where, f"{stamp} is before the first frame; asked at 1 s")
        elif stamp.count(":") == 1:
            reader.defect("time_stamp", where, f"{stamp} is read as minutes and seconds")
        return max(1.0, seconds)
    if not known:
        reader.problems.append(f"{where} time_stamp: {stamp!r} is not a time; download the annotations again")
        return 1.0
    # 2. an impossible one
    digits = re.sub(r"\D", "", stamp)
    tried = [_seconds(f"{digits[:2]}:{digits[2:4]}:{digits[4:6]}"), _seconds(f"{digits[:2]}:{digits[2:4]}")]
    near = [each for each in tried if each is not None and edges[0] - NEAR <= each <= edges[1] + NEAR]
    taken = (near or [edges[1]])[0]
    reader.defect("time_stamp", where, f"{stamp} is outside of {window}; asked at {taken:g} s")
    return max(1.0, taken)


def _seconds(clock: str) -> float | None:
    """Seconds of H:M:S, M:S or S; None if a part is missing, or is 60 and more."""
    parts = clock.split(":")
    if not all(part.isdigit() for part in parts) or any(int(part) >= 60 for part in parts[1:]):
        return None
    return float(sum(int(part) * 60**place for place, part in enumerate(reversed(parts))))
