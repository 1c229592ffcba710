"""Convert users' files into a manifest: ms-swift messages, LLaMA-Factory (sharegpt) and video-SALMONN conversations.

    omnimem convert my.jsonl [more.json ...] --out data/train.jsonl [--media-root DIR]

    {"messages": [{"role", "content": "<video>..."}], "videos": [...], "audios": [...]}            ms-swift
    {"conversations": [{"from": "human", "value": "<video>..."}], "videos": [...], "audios": [...]}  LLaMA-Factory
    {"video": path, "audio": path, "conversations": [{"from", "value": "<image>\n..."}]}           video-SALMONN

Values are kept as written. A turn may have `at` and one of loss, weight, train, training (true, false, 1, 0).
A row is one stream: at most one video and one audio file, before the first question. Every row becomes a sample, or a
failure that names file, row and repair. If more rows fail than --max-failures allows, nothing is written (exit code 2).
"""

import json
import os.path
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from tqdm import tqdm

from omnimem.cli.data_report import DataReport, Finding, add_report_options, inspect_sample
from omnimem.cli.parser import Parser
from omnimem.data import Failure, Sample, read_row, unknown_key
from omnimem.run import write_text
from omnimem.textfile import ManifestError, got, parse_json, read_objects, read_text

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
TAGS = ("<video>", "<audio>", "<image>")
TURNS = ("messages", "conversations")
LEARNED = ("loss", "weight", "train", "training")  # whether an answer is learned, in several tools' words
TURN_KEYS = ("role", "from", "content", "value", "at", *LEARNED)
CONTROL = re.compile(r"<\|\w+\|>")
KNOWN = (*TURNS, "video", "videos", "audio", "audios", "image", "images", "system", "id", "start", "end", "meta")
ELSEWHERE = re.compile(r"^(https?:|data:|s3:|file:)")


@final
@dataclass(frozen=True, kw_only=True)
class Target:
    """Folder of the manifest, and the base of users' relative paths."""

    folder: Path
    media_root: Path
    allow_absolute: bool

    def place(self, path: str) -> str:
        """The path as the manifest will give it; raises ValueError if it cannot be given."""
        if ELSEWHERE.match(path):
            raise ValueError(f"{path[:60]} is not a local path; download it first")
        absolute = os.path.abspath(self.media_root / path)
        relative = os.path.relpath(absolute, os.path.abspath(self.folder))
        if relative.split(os.sep)[0] != os.pardir:
            return Path(relative).as_posix()
        if self.allow_absolute:
            return absolute
        cure = "write --out into a folder above the media, or give --allow-absolute-paths"
        raise ValueError(f"{absolute} is not below {self.folder}; {cure}")


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each row as written, with its origin `file:line` (`file:item n` in a JSON array); raises ManifestError."""
    # 1. read the lines, or the items of an array
    if not os.path.isfile(path):
        raise ManifestError([f"{path}: no such file; give a .json or .jsonl file"])
    text = read_text(path)
    if text.lstrip().startswith("["):
        items = parse_json(text, str(path), "export it again")
        rows = [(f"{path}:item {number}", item) for number, item in enumerate(items, start=1)]
    else:
        rows = read_objects(path)
    # 2. check that they are rows
    problems = [f"{origin}: expected an object, got {got(row)}" for origin, row in rows if not isinstance(row, dict)]
    if problems or not rows:
        raise ManifestError(problems or [f"{path}: holds no rows; export it again"])
    return [(origin, {key: value for key, value in row.items() if value is not None}) for origin, row in rows]


@final
class _Row:
    """Converts one row to a line of the manifest; collects its problems."""

    def __init__(self, row: dict[str, Any], origin: str, target: Target) -> None:
        self.row = row
        self.origin = origin
        self.target = target
        self.problems: list[str] = []
        self.remarks: list[str] = []

    def problem(self, key: str, what: str) -> None:
        self.problems.append(f"{self.origin} {key}: {what}")

    def line(self, fallback_id: str) -> dict[str, Any]:
        """The line of the manifest, valid only if `problems` is empty."""
        video, audio = self.media("video"), self.media("audio")
        if self.media("image"):
            self.problem("images", "still images are not streamed; make them a video, or remove them")
        turns = self.turns()
        self.check_tags(turns, video, audio)
        messages = [{**turn, "content": without_tags(turn["content"])} for turn in turns]
        if any(CONTROL.search(turn["content"]) for turn in turns):
            self.remarks.append("signs such as <|VIDEO|> are read as text; write <video> for the stream")
        if not isinstance(self.row.get("id", ""), str | int) or isinstance(self.row.get("id"), bool):
            self.problem("id", f"expected a name, got {got(self.row['id'])}")
        for key in [key for key in (*LEARNED, "at") if key in self.row]:
            self.problem(key, "is given for the whole row; give it in the turn that it is about")
        kept, meta = {key: value for key, value in self.row.items() if key not in KNOWN}, self.row.get("meta", {})
        if not isinstance(meta, dict) or meta.keys() & kept.keys():
            self.problem("meta", f"expected an object without the keys of the row, got {got(meta)}")
            meta = {}
        self.remarks += [f"key {key} is kept under meta only" for key in kept]
        if sum(turn["role"] == "user" for turn in turns) > 1:
            self.remarks.append("several turns: each is asked by itself, without the turns before it")
        return {
            "id": str(self.row.get("id", fallback_id)),
            "video": self.placed("video", video),
            "audio": self.placed("audio", audio),
            **{key: self.row[key] for key in ("start", "end") if key in self.row},
            "messages": messages,
            "meta": {**meta, **kept},
        }

    def media(self, kind: str) -> list[str]:
        """The files of a kind, under its plural or singular key."""
        values = [value for key in (f"{kind}s", kind) if (value := self.row.get(key)) not in (None, "", [])]
        if len(values) > 1:
            self.problem(kind, f"is given beside {kind}s; keep one of them")
        files = values[0] if values else []
        if isinstance(files, str):
            return [files]
        if isinstance(files, list) and all(isinstance(file, str) for file in files):
            return files
        self.problem(f"{kind}s", f"expected a list of paths, got {str(files)[:60]}; frame lists must become a file")
        return []

    def placed(self, kind: str, files: list[str]) -> str | None:
        if len(files) > 1:
            self.problem(f"{kind}s", f"{len(files)} files in a row, but a row is one stream; split it, or join them")
        if len(files) != 1:
            return None
        try:
            return self.target.place(files[0])
        except ValueError as error:
            self.problem(f"{kind}s", str(error))
            return None

    def turns(self) -> list[dict[str, Any]]:
        """System prompt and turns as messages with tags still in them."""
        found = [key for key in TURNS if self.row.get(key)]
        if len(found) != 1:
            keys = " and ".join(found) or ", ".join(self.row) or "nothing"
            self.problem("messages", f"expected messages or conversations, got {keys}; rename the column of turns")
            return []
        given, system = self.row[found[0]], self.row.get("system", "")
        if not isinstance(given, list):
            self.problem(found[0], f"expected a list of turns, got {got(given)}")
            return []
        items = [(f"{found[0]}[{index}]", item) for index, item in enumerate(given)]
        if system != "":
            items.insert(0, ("system", {"role": "system", "content": system}))
        return [turn for where, item in items if (turn := self.turn(where, item))]

    def turn(self, where: str, item: Any) -> dict[str, Any] | None:
        if not isinstance(item, dict):
            self.problem(where, f"expected an object, got {str(item)[:60]}")
            return None
        # 1. check the keys
        item = {key: value for key, value in item.items() if value is not None}
        for key in [key for key in item if key not in TURN_KEYS]:
            self.problem(f"{where}.{key}", unknown_key(key, TURN_KEYS, "remove it"))
        for pair in ({"role", "from"}, {"content", "value"}, {*LEARNED}):
            if len(pair & item.keys()) > 1:
                self.problem(where, f"{' and '.join(sorted(pair & item.keys()))} are both given; keep one of them")
        given, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        # 2. role, text and what is learned
        role = ROLES.get(str(given))
        if role is None:
            self.problem(where, f"role {given!r} is unknown; use one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            self.problem(where, "expected text; write <video> and <audio> in it and list the files beside it")
        if role is None or not isinstance(content, str):
            return None
        turn = {"role": role, "content": content, **{key: item[key] for key in ("at",) if key in item}}
        for key in LEARNED:
            if key in item and item[key] in (0, 1) and not isinstance(item[key], str):
                turn["loss"] = bool(item[key])
            elif key in item:
                self.problem(f"{where}.{key}", f"expected true or false, got {got(item[key])}; correct it")
        return turn

    def check_tags(self, turns: list[dict[str, Any]], video: list[str], audio: list[str]) -> None:
        """Tags are optional; there is one per file, and all are in the first question, where the stream begins."""
        counts = Counter(tag for turn in turns for tag in re.findall("|".join(TAGS), turn["content"]))
        expected = {"<video>": len(video), "<audio>": len(audio), "<image>": 0}
        if {"video", "audio"} & self.row.keys() and counts["<image>"]:  # video-SALMONN: one tag for the whole stream
            expected = {"<video>": 0, "<audio>": 0, "<image>": 1}
        for tag, files in expected.items():
            if counts[tag] and counts[tag] != files:
                self.problem("messages", f"{counts[tag]} {tag} tags for {files} files; make them equal")
        if (video or audio) and not counts:
            self.remarks.append("no tag: the stream is placed before the first question")
        first = next((turn for turn in turns if turn["role"] == "user"), None)
        if any(tag in turn["content"] for turn in turns if turn is not first for tag in TAGS):
            self.problem("messages", "a tag after the first question; move it there, or split the row")


def without_tags(text: str) -> str:
    """The text of a question without the tags that represent the stream; a text without them as it is."""
    if not any(tag in text for tag in TAGS):
        return text
    return re.sub(rf"(?:\s*(?:{'|'.join(TAGS)}))+\s*", " ", text).strip()


def convert_row(row: dict[str, Any], origin: str, fallback_id: str, target: Target) -> tuple[Sample, str, list[str]]:
    """The sample, its line and remarks about it; raises ManifestError."""
    taken = _Row(row, origin, target)
    line = taken.line(fallback_id)
    if taken.problems:
        raise ManifestError(taken.problems)
    sample = read_row(line, folder=target.folder, origin=origin, allow_absolute=True)
    return sample, json.dumps(line, ensure_ascii=False), taken.remarks


def convert(files: Sequence[Path], media_root: Path | None, target: Target, **how: Any) -> tuple[DataReport, list[str]]:
    """A report on all rows of all files, and the lines of the usable samples; `how` goes to `inspect_sample`."""
    findings: list[Finding] = []
    lines: list[str] = []
    rejected: list[Failure] = []
    remarks: Counter[str] = Counter()
    used: dict[str, str] = {}
    for file in files:
        here = replace(target, media_root=media_root or file.parent)
        rows = tqdm(read_rows(file), desc=str(file), unit="row", leave=False, disable=None)
        for number, (origin, row) in enumerate(rows, start=1):
            try:
                sample, line, said = convert_row(row, origin, f"{file.stem}-{number:06d}", here)
                if used.setdefault(sample.id, origin) != origin:
                    raise ManifestError(
                        [f"{origin} id: {sample.id!r} is already used at {used[sample.id]}; rename one"]
                    )
            except ManifestError as error:
                rejected += [Failure(id=origin, reason="row", message=problem) for problem in error.problems]
                continue
            finding = inspect_sample(sample, **how)
            findings.append(finding)
            if not finding.failures:
                lines.append(line)
                remarks.update(said)
    notes = tuple(f"{count:,} rows: {remark}" for remark, count in remarks.items())
    name = ", ".join(str(file) for file in files)
    return DataReport(name=name, findings=tuple(findings), rejected=tuple(rejected), remarks=notes), lines


def main(arguments: Sequence[str]) -> None:
    """Write the manifest and print the report; raises ManifestError if too many rows fail."""
    given = _parser().parse(arguments)
    out: Path = given.out
    if out.exists() and not given.overwrite:
        raise ManifestError([f"{out}: exists already; give another --out, or --overwrite"])
    target = Target(folder=out.parent, media_root=out.parent, allow_absolute=given.allow_absolute_paths)
    # 1. convert and report
    report, lines = convert(given.files, given.media_root, target, tracks=given.tracks, decode=given.decode)
    print(report.text())
    problems = [failure.message for failure in report.failures]
    if report.failed_share > given.max_failures or not lines:
        raise ManifestError([*problems, f"{out}: not written; repair the rows above, or raise --max-failures"])
    for problem in problems:
        print(problem, file=sys.stderr)
    # 2. write
    write_text(out, "".join(f"{line}\n" for line in lines))
    print(f"{out}: {len(lines):,} samples")


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("files", type=Path, nargs="+", help=".json or .jsonl")
    parser.add_argument("--out", type=Path, required=True, help="the manifest, in a folder above the media")
    parser.add_argument("--media-root", type=Path, help="base of relative paths (default: the folder of each file)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing manifest")
    add_report_options(parser)
    return parser
