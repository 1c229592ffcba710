"""Rows as other tools write them become lines of a manifest; every problem is named by row and key (docs/data.md).

Values are kept as written. What a row or a turn says and no stream can follow is refused by name.
"""

import json
import os.path
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from omnimem.data import STILL, Sample, is_seconds, read_row, unknown_key
from omnimem.errors import counted
from omnimem.media.frames import SUFFIXES
from omnimem.textfile import ManifestError, got

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
TAGS = ("<video>", "<audio>", "<image>")
TURNS = ("messages", "conversations")
PAIRS = (("query", "response"), ("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
LEARNED = ("loss", "weight", "train", "training")  # whether an answer is learned, in several tools' words
TURN_KEYS = ("role", "from", "content", "value", "at", *LEARNED)
HEARD = ("use_audio", "use_audio_in_video")  # whether the video's own audio track is read
UNHEARD = (  # a row of video-SALMONN that its release reads without any audio
    "an audio file beside the video, and no use_audio: the file is read here, and the release reads the frames alone; "
    "add use_audio: true (the video's own track) or false"
)
CONTROL = re.compile(r"<\|\w+\|>")
ELSEWHERE = re.compile(r"^(https?:|data:|s3:)")
KNOWN = (
    *(*TURNS, "video", "videos", "audio", "audios", "image", "images", "system", "id", "start", "end", "meta"),
    *("tracks", "timestamps", "history", "input", "frames", *HEARD),
)
RATES = ("fps", "sample_fps")  # of a list of frames, in a row or a part
# Kinds of content parts by their type, as Qwen, transformers, TRL and OpenAI's API name them.
PARTS = {
    "text": "text",
    **{f"{kind}{suffix}": kind for kind in ("video", "audio", "image") for suffix in ("", "_url")},
    "input_audio": "audio",
}
SPAN = {"video_start": "start", "video_end": "end"}  # keys of a video part, and of a row
SAMPLING = (
    *("fps", "nframes", "max_frames", "min_frames", "max_pixels", "min_pixels", "total_pixels"),
    *("resized_height", "resized_width"),
)
WHOLE_RUN = "it is one for a whole run: remove it, and set stream.fps and stream.max_pixels"
IN_TURN = "is given for the whole row; give it in the turn that it is about"
# Keys of a row that ask for what a stream follows under another key, or not at all; others are kept under meta.
ASKING: dict[str, str] = {
    **dict.fromkeys((*SAMPLING, "video_fps", "num_frames", "max_num_frames"), WHOLE_RUN),
    **dict.fromkeys((*LEARNED, "at"), IN_TURN),
    **dict.fromkeys(("loss_mask", "loss_scale", "loss_weight", "mask", "weights"), f"{IN_TURN}, as `loss`"),
    **dict.fromkeys(("sample_weight", "sampling_weight"), "rows have no weight; give data.train sources with `weight`"),
    **dict.fromkeys(("time", "question_time", "query_time", "at_time", "ask_at"), f"{IN_TURN}, as `at`"),
    **{f"{key}_{unit}": f"did you mean {key}?" for key in SPAN.values() for unit in ("time", "sec", "seconds")},
    **{f"{kind}_{key}": f"did you mean {key}?" for kind in ("video", "clip") for key in SPAN.values()},
    **dict.fromkeys(("clip", "trim", "span", "segment", "time_span"), "did you mean timestamps?"),
    **{f"{kind}{each}": f"did you mean {kind}?" for kind in ("video", "audio") for each in ("_path", "_file", "_url")},
    **dict.fromkeys(("system_prompt", "system_message"), "did you mean system?"),
    **dict.fromkeys(("track", "modality", "use_video", "has_audio"), "did you mean tracks?"),
    **dict.fromkeys(("image_path", "image_url"), STILL),
    **dict.fromkeys(("skip", "ignore"), "remove it, and the row if it is not to be learned"),
}
PREFERENCE = ("chosen", "reject", "rejected", "rejected_response", "rejected_messages", "kto_tag")
NO_PREFERENCE = "preference rows have no loss here; keep the answer to learn alone, as {role: assistant}"


@final
@dataclass(frozen=True, kw_only=True)
class Target:
    """Folder of the manifest, and the base of users' relative paths."""

    folder: Path
    media_root: Path
    allow_absolute: bool
    cure: str = "write --out into a folder above the media, or give --allow-absolute-paths"

    def place(self, path: str | Path) -> str:
        """The path as the manifest gives it; raises ValueError if it cannot be given.

        A Path is a file that a data set has written itself.
        """
        if isinstance(path, Path):
            return str(path.absolute())
        if ELSEWHERE.match(path):
            raise ValueError(f"{path[:60]} is not a local path; download it first")
        absolute = os.path.abspath(self.media_root / path.removeprefix("file://"))
        relative = os.path.relpath(absolute, os.path.abspath(self.folder))
        if relative.split(os.sep)[0] != os.pardir:
            return Path(relative).as_posix()
        if self.allow_absolute:
            return absolute
        raise ValueError(f"{absolute} is not below {self.folder}; {self.cure}")


def convert_row(row: Mapping[str, Any], origin: str, fallback_id: str, target: Target) -> tuple[Sample, str, list[str]]:
    """The sample of a row, its line of the manifest, and remarks about it; raises ManifestError with all problems."""
    taken = _Row(without_nulls(row), origin, target)
    line = taken.line(fallback_id)
    if taken.problems:
        raise ManifestError(taken.problems)
    try:
        written = json.dumps(line, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ManifestError([f"{origin} meta: {error}; store the column as text"]) from error
    sample = read_row(line, folder=target.folder, origin=origin, allow_absolute=True, text_only=True)
    return sample, written, taken.remarks


def without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row or turn without keys that are null, which say no more than missing ones."""
    return {key: value for key, value in row.items() if value is not None}


def is_path(file: Any) -> bool:
    """Whether a value names a file."""
    return isinstance(file, str | Path)


def is_frames(file: Any) -> bool:
    """Whether a value names the frames of a video."""
    return isinstance(file, tuple) and len(file) > 0 and all(map(is_path, file))


def are_images(files: Sequence[Any]) -> bool:
    """Whether all of several values name image files."""
    return len(files) > 1 and all(is_path(file) and Path(file).suffix.lower() in SUFFIXES for file in files)


def without_tags(text: str) -> str:
    """The text of a question without the tags that represent the stream; a text without them as it is."""
    if not any(tag in text for tag in TAGS):
        return text
    return re.sub(rf"(?:\s*(?:{'|'.join(TAGS)}))+\s*", " ", text).strip()


@final
@dataclass(kw_only=True)
class _Content:
    """The text of a turn, the tags of its media in order, the files of its parts by kind, and a span of the video."""

    text: str
    before: str = ""  # what is written before the first tag
    tags: list[str] = field(default_factory=list)
    files: list[tuple[str, Any]] = field(default_factory=list)  # a tuple of paths: the frames of a video
    span: dict[str, float] = field(default_factory=dict)
    rates: dict[str, Any] = field(default_factory=dict)  # of frames, by their key


@final
class _Row:
    """Converts one row to a line of the manifest; collects its problems."""

    def __init__(self, row: dict[str, Any], origin: str, target: Target) -> None:
        self.row = row
        self.origin = origin
        self.target = target
        self.problems: list[str] = []
        self.remarks: list[str] = []
        self.contents: list[_Content] = []  # of the turns
        self.listed = False  # the video is a list of frames
        self.own_audio = False  # the audio file is not read: use_audio is given, which is about the video's own track

    def problem(self, key: str, what: str) -> None:
        self.problems.append(f"{self.origin} {key}: {what}")

    def line(self, fallback_id: str) -> dict[str, Any]:
        """The line of the manifest, valid only if `problems` is empty."""
        # 1. turns, and the files that they and the row name
        messages = self.turns()
        video, audio = self.media("video"), self.media("audio")
        if self.media("image"):
            self.problem("images", STILL)
        self.check_tags(messages, video, audio)
        span, tracks = self.span(), self.tracks(video, audio)
        prefix = self.prefix(messages)
        # 2. the other keys
        if not isinstance(self.row.get("id", ""), str | int) or isinstance(self.row.get("id"), bool):
            self.problem("id", f"expected a name, got {got(self.row['id'])}")
        rates = RATES if self.listed else ()  # of its frames
        for key in [key for key in ASKING if key in self.row and key not in rates]:
            self.problem(key, ASKING[key])
        for key in [key for key in PREFERENCE if key in self.row]:
            self.problem(key, NO_PREFERENCE)
        meta = self.meta()
        # 3. remarks
        if any(CONTROL.search(turn["content"]) for turn in messages):
            self.remarks.append("signs such as <|VIDEO|> are read as text; write <video> for the stream")
        if sum(turn["role"] == "user" for turn in messages) > 1:
            self.remarks.append("several turns: each is asked by itself, without the turns before it")
        if not video and not audio:
            self.remarks.append("no file: the row is text alone")
        return {
            "id": str(self.row.get("id", fallback_id)),
            **self.placed_video(video),
            "audio": None if video and self.own_audio else self.placed("audio", audio),
            **({"tracks": tracks} if tracks else {}),
            **({"prefix": prefix} if prefix else {}),
            **span,
            "messages": messages,
            "meta": meta,
        }

    def meta(self) -> dict[str, Any]:
        """The row's `meta`, and the keys that no other part of a line holds."""
        known = {*KNOWN, *(self.pair() or ()), *(RATES if self.listed else ())}
        kept, meta = {key: value for key, value in self.row.items() if key not in known}, self.row.get("meta", {})
        if not isinstance(meta, dict) or meta.keys() & kept.keys():
            self.problem("meta", f"expected an object without the keys of the row, got {got(meta)}")
            meta = {}
        self.remarks += [f"key {key} is kept under meta only" for key in kept]
        return {**meta, **kept}

    # ----------------------------------------------------------------------------------------------------------- media

    def media(self, kind: str) -> list[Any]:
        """The files of a kind: under its plural or singular key, and in content parts."""
        # 1. of the row
        keys = [f"{kind}s", kind, *(["frames"] if kind == "video" else [])]
        values = {key: value for key in keys if (value := self.row.get(key)) not in (None, "", [])}
        if len(values) > 1:
            self.problem(list(values)[1], f"is given beside {next(iter(values))}; keep one of them")
        key, files = next(iter(values.items()), (kind, []))
        files = [files] if isinstance(files, str | Path) else files
        if kind == "video" and isinstance(files, list):
            alone = key == "frames" or (key == "video" and are_images(files))  # one list, not several files
            files = [tuple(files)] if alone else [tuple(each) if isinstance(each, list) else each for each in files]
        # 2. of its content parts
        inside = [file for content in self.contents for each, file in content.files if each == kind]
        if inside and files:
            self.problem(kind, "is given in the row and in a content part; keep one of them")
        if isinstance(files, list) and all(is_path(file) or is_frames(file) for file in (*files, *inside)):
            self.listed |= any(is_frames(file) for file in (*files, *inside))
            return [*files, *inside]
        shown = str(inside[0] if inside else files)[:60]
        self.problem(f"{kind}s", f"expected a list of paths, got {shown}; correct it")
        return []

    def placed_video(self, files: Sequence[Any]) -> dict[str, Any]:
        """`video` of the line, or `frames` and `fps`."""
        if len(files) != 1 or not is_frames(files[0]):
            if len(files) > 1 and are_images(files):
                self.problem("videos", "frames of one video are a list in it: [[frame, frame, ...]]; correct it")
            return {"video": self.placed("video", files)}
        # 1. the rate
        given = [{key: self.row[key] for key in RATES if key in self.row}, *(each.rates for each in self.contents)]
        rates = [(key, rate) for each in given for key, rate in each.items()]
        if len(rates) != 1:
            what = "is given more than once; keep one of them" if rates else "is missing; add the frames per second"
            self.problem("fps", f"the rate of the list of frames {what}" + ("" if rates else " that the list has"))
        # 2. the files
        placed = [self.placed("frame", [file]) for file in files[0]]
        return {"video": None, "frames": placed, "fps": rates[0][1] if rates else 1.0}

    def placed(self, kind: str, files: Sequence[Any]) -> str | None:
        if len(files) > 1:
            self.problem(
                f"{kind}s", f"{counted(len(files), 'file')} in a row, but a row is one stream; split it, or join them"
            )
        if len(files) != 1:
            return None
        try:
            return self.target.place(files[0])
        except ValueError as error:
            self.problem(f"{kind}s", str(error))
            return None

    def span(self) -> dict[str, Any]:
        """`start` and `end` of the stream, from the row's own keys, `timestamps`, or the part of the video."""
        found: dict[str, Any] = {key: self.row[key] for key in ("start", "end") if key in self.row}
        pair = self.row.get("timestamps")
        given = [found] if found else []
        if pair is not None and isinstance(pair, list) and len(pair) == 2 and all(map(is_seconds, pair)):
            given.append(dict(zip(("start", "end"), pair, strict=True)))
        elif pair is not None:
            self.problem("timestamps", f"expected [start, end] in seconds, got {got(pair)}; correct it")
        given += [content.span for content in self.contents if content.span]
        if len(given) > 1:
            self.problem("start", "is given more than once (start, timestamps, video_start); keep one of them")
        return given[0] if given else {}

    def tracks(self, video: Sequence[Any], audio: Sequence[Any]) -> Any:
        """The one track that is read: `tracks` of the row, or as `use_audio` says.

        As in the release (video-SALMONN): `use_audio` is about the video's own track, and no audio file is read then.
        """
        keys = [key for key in ("tracks", *HEARD) if key in self.row]
        if len(keys) > 1:
            self.problem(keys[1], f"is given beside {keys[0]}; keep one of them")
        heard = next((self.row[key] for key in keys if key in HEARD), None)
        if heard is None:
            if self.of_salmonn and video and audio and not keys:
                self.remarks.append(UNHEARD)
            return self.row.get("tracks")
        if not isinstance(heard, bool):
            self.problem(keys[0], f"expected true or false, got {got(heard)}; correct it")
        elif not heard and not video:
            self.problem(keys[0], "is false, and there is no video to watch; remove the row, or make it true")
        elif heard and self.listed:
            self.problem(keys[0], "is about the video's own track, and a list of frames has none; remove it")
        elif video:
            self.own_audio = True
            self.remarks += [f"{keys[0]} is about the video's own track: the audio file is not read"] if audio else []
            self.remarks += [] if heard else [f"{keys[0]}: false, the video is read without audio"]
            return None if heard else "video"
        return None

    # ----------------------------------------------------------------------------------------------------------- turns

    @property
    def of_salmonn(self) -> bool:
        """Whether the row has the keys of video-SALMONN's training data."""
        return "conversations" in self.row and bool({"video", "audio"} & self.row.keys())

    def prefix(self, messages: list[dict[str, Any]]) -> str:
        """What a row of video-SALMONN says before the tag, which the model reads before the stream; else it is empty.

        It is taken from the first question, unless nothing is asked after the tag.
        """
        asked = next((turn for turn in messages if turn["role"] == "user"), None)
        written = next((content.before for content in self.contents if content.tags), "")
        if asked is None or not self.of_salmonn or not written.strip():
            return ""
        after = asked["content"].removeprefix(written.strip()).strip()
        if not after:
            return ""
        asked["content"] = after
        return written

    def pair(self) -> tuple[str, str] | None:
        """The keys of question and answer of a row without a list of turns."""
        if any(self.row.get(key) for key in TURNS):
            return None
        return next((pair for pair in PAIRS if pair[0] in self.row), None)

    def turns(self) -> list[dict[str, Any]]:
        """System prompt and turns as messages."""
        found = [key for key in TURNS if self.row.get(key)]
        pair = self.pair()
        if len(found) != 1 and not pair:
            keys = " and ".join(found) or ", ".join(self.row) or "nothing"
            self.problem("messages", f"expected messages or conversations, got {keys}; rename the column of turns")
            return []
        items = self.items(found[0], self.row[found[0]]) if found else self.paired(*(pair or ("", "")))
        for other in (other for other, _ in PAIRS if pair and other in self.row and other != pair[0]):
            self.problem(other, f"is given beside {pair[0] if pair else ''}; keep one of them")
        if (system := self.row.get("system", "")) != "":
            items.insert(0, ("system", {"role": "system", "content": system}))
        for key in ("history", "input"):
            if key in self.row and found:
                self.problem(key, f"goes with query and response, not with {found[0]}; remove it")
        return [turn for where, item in items if (turn := self.turn(where, item))]

    def items(self, key: str, given: Any) -> list[tuple[str, Any]]:
        """Each turn of a list with its place."""
        if not isinstance(given, list):
            self.problem(key, f"expected a list of turns, got {got(given)}")
            return []
        return [(f"{key}[{index}]", item) for index, item in enumerate(given)]

    def paired(self, asked: str, answered: str) -> list[tuple[str, Any]]:
        """The turns of a row with one question and its answer; TRL's prompt and completion may be lists of turns."""
        # 1. earlier turns
        history, found = self.row.get("history", []), []
        pairs = history if isinstance(history, list) else None
        if pairs is None or any(not isinstance(pair, list) or len(pair) != 2 for pair in pairs):
            self.problem("history", f"expected a list of [question, answer], got {got(history)}")
            pairs = []
        for number, texts in enumerate(pairs):
            roles = zip(("user", "assistant"), texts, strict=True)
            found += [(f"history[{number}]", {"role": role, "content": text}) for role, text in roles]
        # 2. the question and its answer
        for key, role in ((asked, "user"), (answered, "assistant")):
            value = self.row.get(key)
            if isinstance(value, list) and asked == "prompt":
                found += self.items(key, value)
            elif value is not None:
                more = self.row.get("input") if role == "user" else None
                text = f"{value}\n{more}" if isinstance(value, str) and isinstance(more, str) and more else value
                found.append((key, {"role": role, "content": text}))
        return found

    def turn(self, where: str, item: Any) -> dict[str, Any] | None:
        if not isinstance(item, dict):
            self.problem(where, f"expected an object, got {str(item)[:60]}")
            return None
        # 1. check the keys
        item = without_nulls(item)
        for key in [key for key in item if key not in TURN_KEYS]:
            self.problem(f"{where}.{key}", unknown_key(key, TURN_KEYS, "remove it"))
        for pair in ({"role", "from"}, {"content", "value"}, {*LEARNED}):
            if len(pair & item.keys()) > 1:
                self.problem(where, f"{' and '.join(sorted(pair & item.keys()))} are both given; keep one of them")
        given = item.get("role", item.get("from"))
        # 2. role, text and what is learned
        role = ROLES.get(str(given))
        if role is None and given in PREFERENCE:
            self.problem(where, NO_PREFERENCE)
        elif role is None:
            self.problem(where, f"role {given!r} is unknown; use one of {', '.join(ROLES)}")
        content = self.content(where, item.get("content", item.get("value")))
        if role is None or content is None:
            return None
        self.contents.append(content)
        turn = {"role": role, "content": content.text, **{key: item[key] for key in ("at",) if key in item}}
        for key in LEARNED:
            if key in item and item[key] in (0, 1) and not isinstance(item[key], str):
                turn["loss"] = bool(item[key])
            elif key in item:
                self.problem(f"{where}.{key}", f"expected true or false, got {got(item[key])}; correct it")
        return turn

    def content(self, where: str, given: Any) -> _Content | None:
        """A text with tags, or a list of content parts, whose texts are joined as they are."""
        if isinstance(given, str):
            tags = re.findall("|".join(TAGS), given)
            return _Content(text=without_tags(given), before=given.partition(tags[0])[0] if tags else "", tags=tags)
        if not isinstance(given, list) or not given:
            self.problem(where, "expected text; write <video> and <audio> in it and list the files beside it")
            return None
        found, before = _Content(text=""), len(self.problems)
        for index, part in enumerate(given):
            self.part(f"{where}.content[{index}]", part, found)
        return found if len(self.problems) == before else None

    def part(self, where: str, part: Any, found: _Content) -> None:
        """Add one content part: {"type": "text", "text": ...}, {"type": "video", "video": path} or without a path."""
        # 1. its kind
        part = without_nulls(part) if isinstance(part, dict) else part
        kinds = [key for key in PARTS if isinstance(part, dict) and key in part]
        name = part.get("type", kinds[0] if len(kinds) == 1 else None) if isinstance(part, dict) else None
        kind = PARTS.get(name) if isinstance(name, str) else None
        if kind is None or not isinstance(name, str):
            self.problem(where, f"expected a part with type text, video or audio, got {got(part)}")
            return
        if kind == "image":
            self.problem(where, STILL)
            return
        # 2. its keys
        files = ("text",) if kind == "text" else tuple(dict.fromkeys((name, kind, f"{kind}_url", "path", "url")))
        spans = tuple(SPAN) if kind == "video" else ()
        values: list[Any] = [part[key] for key in files if key in part]
        listed = kind == "video" and len(values) == 1 and isinstance(values[0], list)
        rates = RATES if listed else ()
        for key in [key for key in part if key not in ("type", *files, *spans, *rates)]:
            otherwise = "remove it"
            if key in SAMPLING:
                otherwise = WHOLE_RUN
            self.problem(f"{where}.{key}", unknown_key(key, (*files, *spans), otherwise))
        # 3. its text or file; without a file it stands for one of the row
        value = values[0].get("url") if values and isinstance(values[0], dict) else next(iter(values), None)
        if len(values) > 1 or (kind == "text" and not isinstance(value, str)):
            self.problem(where, f"expected one {'text' if kind == 'text' else 'file'}, got {got(part)}")
        elif kind == "text":
            found.text += str(value)
        else:
            found.tags.append(f"<{kind}>")
            value = tuple(values[0]) if listed else value
            found.files += [] if value is None and not values else [(kind, value)]
        found.rates |= {key: part[key] for key in rates if key in part}
        found.span |= {SPAN[key]: part[key] for key in spans if key in part}

    def check_tags(self, turns: Sequence[dict[str, Any]], video: Sequence[Any], audio: Sequence[Any]) -> None:
        """Tags are optional; there is one per file, and all are in the first question, where the stream begins."""
        counts = Counter(tag for content in self.contents for tag in content.tags)
        expected = {"<video>": len(video), "<audio>": len(audio), "<image>": 0}
        if {"video", "audio"} & self.row.keys() and counts["<image>"]:  # video-SALMONN: one tag for the whole stream
            expected = {"<video>": 0, "<audio>": 0, "<image>": 1}
        for tag, files in expected.items():
            if counts[tag] and counts[tag] != files:
                self.problem(
                    "messages", f"{counted(counts[tag], f'{tag} tag')} for {counted(files, 'file')}; make them equal"
                )
        if (video or audio) and not counts:
            self.remarks.append("no tag: the stream is placed before the first question")
        first = next((number for number, turn in enumerate(turns) if turn["role"] == "user"), None)
        if any(content.tags for number, content in enumerate(self.contents) if number != first):
            self.problem("messages", "a tag after the first question; move it there, or split the row")
