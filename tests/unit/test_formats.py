"""Rows of other tools: every accepted format gives the same line, and what no stream can follow is refused by name."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT

from omnimem.data import KEYS, DataSource, Sample
from omnimem.formats import Target, convert_row
from omnimem.media import FrameList
from omnimem.textfile import ManifestError

HERE = Path("data")
TARGET = Target(folder=HERE, media_root=HERE, allow_absolute=False)
ASKED, ANSWER = {"role": "user", "content": "what ?"}, {"role": "assistant", "content": "that"}
VIDEO = {"type": "video", "video": "a.mp4"}


def converted(row: dict[str, Any]) -> tuple[Sample, list[str]]:
    sample, _, remarks = convert_row(row, "rows:1", "rows-1", TARGET)
    return sample, remarks


def problems(row: dict[str, Any]) -> str:
    with pytest.raises(ManifestError) as caught:
        converted(row)
    return "\n".join(caught.value.problems)


def parts(*content: Any, **row: Any) -> dict[str, Any]:
    """A row with content parts in its question."""
    return {"messages": [{"role": "user", "content": list(content)}, ANSWER], **row}


TEXT = {"type": "text", "text": "what ?"}
TALK = [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "that"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "<video>what ?"}, ANSWER], "videos": ["a.mp4"]},
        {"conversations": [{"from": "human", "value": "<video>\nwhat ?"}, TALK[1]], "videos": ["a.mp4"]},
        {"video": "a.mp4", "conversations": TALK},
        {"video": "a.mp4", "use_audio": True, "conversations": TALK},
        {"video": "a.mp4", "audio": "a.wav", "use_audio": True, "conversations": TALK},
        parts(VIDEO, TEXT),
        parts(TEXT, VIDEO),
        parts({"type": "video"}, TEXT, videos=["a.mp4"]),
        parts({"type": "video", "path": "a.mp4", "text": None}, {"type": "text", "text": "what ?", "video": None}),
        parts({"type": "video", "url": "a.mp4"}, TEXT),
        parts({"type": "video_url", "video_url": {"url": "file://a.mp4"}}, TEXT),
        parts({"video": "a.mp4"}, {"text": "what "}, {"text": "?"}),
        {"query": "<video>what ?", "response": "that", "videos": ["a.mp4"]},
        {"prompt": "what ?", "completion": "that", "video": "a.mp4"},
        {"prompt": [ASKED], "completion": [ANSWER], "videos": ["a.mp4"]},
        {"question": "what ?", "answer": "that", "video": "a.mp4"},
        {"messages": [{**ASKED, "at": None}, {**ANSWER, "weight": None}], "video": "a.mp4", "audio": None},
    ],
)
def test_every_format_of_the_same_row_is_the_same_sample(row) -> None:
    sample, _ = converted(row)
    (question,) = sample.questions
    assert (sample.video, sample.audio, sample.tracks) == (HERE / "a.mp4", None, None)
    assert (sample.start, sample.end, sample.meta) == (0.0, None, {})
    assert (question.text, question.answer, question.loss) == ("what ?", "that", True)


@pytest.mark.parametrize(
    ("written", "prefix", "asked"),
    [
        ("Choose one letter.\n<image>\nWhich ?", "Choose one letter.\n", "Which ?"),
        ("  Choose. <video>Which ?", "  Choose. ", "Which ?"),
        ("it <video> it", "it ", "it"),
        ("<image>\nWhich ?", "", "Which ?"),
        ("\n<image>\nWhich ?", "", "Which ?"),
        ("Which ?\n<image>", "", "Which ?"),
        ("Which ?", "", "Which ?"),
    ],
)
def test_what_the_release_writes_before_the_tag_is_read_before_the_stream(written, prefix, asked) -> None:
    talk = [{"from": "human", "value": written}, TALK[1]]
    sample, _ = converted({"video": "a.mp4", "conversations": talk})
    assert (sample.prefix, sample.questions[0].text) == (prefix, asked)
    others = [{**talk[0], "value": written.replace("<image>", "<video>")}, TALK[1]]
    of_others, _ = converted({"videos": ["a.mp4"], "conversations": others})
    assert of_others.prefix == ""


@pytest.mark.parametrize(
    ("more", "warned"),
    [
        ({"audio": "a.wav"}, True),
        ({"audio": "a.wav", "use_audio": True}, False),
        ({}, False),
        ({"use_audio": True}, False),
    ],
)
def test_an_audio_file_that_the_release_would_not_read_is_warned_of(more, warned) -> None:
    _, remarks = converted({"video": "a.mp4", "conversations": TALK, **more})
    assert any("no use_audio: the file is read here" in remark for remark in remarks) == warned


def test_text_of_parts_is_kept_as_written_with_signs_that_look_like_tags() -> None:
    sample, _ = converted(parts(VIDEO, {"type": "text", "text": "\nwhat is <video> ?\n"}))
    assert sample.questions[0].text == "\nwhat is <video> ?\n"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (parts({**VIDEO, "video_start": 2, "video_end": 9.5}, TEXT), (2.0, 9.5)),
        ({"video": "a.mp4", "timestamps": [2, 9.5], "conversations": TALK}, (2.0, 9.5)),
        ({"video": "a.mp4", "start": 2, "end": 9.5, "conversations": TALK}, (2.0, 9.5)),
    ],
)
def test_the_span_of_a_row_is_start_and_end_in_every_format(row, expected) -> None:
    sample, _ = converted(row)
    assert (sample.start, sample.end) == expected


@pytest.mark.parametrize(
    ("more", "tracks", "audio", "remark"),
    [
        ({"use_audio": False}, "video", None, "use_audio: false, the video is read without audio"),
        ({"use_audio_in_video": False}, "video", None, "use_audio_in_video: false, the video is read without audio"),
        ({"use_audio": False, "audio": "a.wav"}, "video", None, "use_audio is about the video's own track"),
        ({"use_audio": True, "audio": "a.wav"}, None, None, "use_audio is about the video's own track"),
        ({"tracks": "audio"}, "audio", None, ""),
        ({"audio": "a.wav"}, None, HERE / "a.wav", ""),
    ],
)
def test_the_track_of_a_row_is_read_as_it_says(more, tracks, audio, remark) -> None:
    sample, remarks = converted({"video": "a.mp4", "conversations": TALK, **more})
    assert (sample.tracks, sample.audio) == (tracks, audio)
    assert any(remark in each for each in remarks) or not remark


def test_earlier_turns_and_a_second_input_are_kept() -> None:
    row = {
        "instruction": "Read.",
        "input": "a page",
        "output": "that",
        "history": [["one ?", "1"]],
        "system": "Listen.",
    }
    sample, remarks = converted(row)
    assert [(q.text, q.answer) for q in sample.questions] == [("one ?", "1"), ("Read.\na page", "that")]
    assert (sample.system, sample.has_stream) == ("Listen.", False)
    assert "no file: the row is text alone" in remarks


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (parts({**VIDEO, "fps": 2}, TEXT), "messages[0].content[0].fps: unknown key; it is one for a whole run"),
        (parts({**VIDEO, "max_pixels": 9}, TEXT), ".max_pixels: unknown key; it is one for a whole run"),
        (parts({**VIDEO, "colour": 1}, TEXT), ".colour: unknown key; remove it"),
        (parts(VIDEO, {**TEXT, "txet": 1}), ".txet: unknown key; did you mean text?"),
        (parts(VIDEO, {"type": "text"}), "content[1]: expected one text"),
        (parts({"type": "image", "image": "a.png"}, TEXT), "content[0]: still images are not streamed"),
        (parts({"type": "image_url", "image_url": {"url": "a.png"}}, TEXT), "still images are not streamed"),
        (parts({"type": "video", "video": ["a.png", "b.png"]}, TEXT), "fps: the rate of the list of frames is missing"),
        (parts({"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}}), "audios: expected a list"),
        (parts({"type": "tool_use"}, TEXT), "content[0]: expected a part with type text, video or audio"),
        (parts("what ?"), "content[0]: expected a part with type"),
        (parts({"type": "video"}, TEXT), "messages: 1 <video> tag for 0 files"),
        (parts(VIDEO, TEXT, video="b.mp4"), "video: is given in the row and in a content part"),
        (parts(VIDEO, VIDEO, TEXT), "videos: 2 files in a row"),
        (parts({**VIDEO, "path": "b.mp4"}, TEXT), "content[0]: expected one file"),
        (parts({**VIDEO, "video_start": 2}, TEXT, start=1), "start: is given more than once"),
        (parts({**VIDEO, "video_start": "2"}, TEXT), "start: expected seconds"),
        ({"messages": [{"role": "system", "content": [VIDEO]}, ASKED]}, "a tag after the first question"),
        ({"messages": [ASKED, {"role": "assistant", "content": [VIDEO]}]}, "a tag after the first question"),
        ({"query": "a ?", "prompt": "b ?", "video": "a.mp4"}, "prompt: is given beside query"),
        ({"query": "a ?", "history": "x", "video": "a.mp4"}, "history: expected a list of [question, answer]"),
        ({"query": 3, "video": "a.mp4"}, "query: expected text"),
        ({"messages": [ASKED], "history": []}, "history: goes with query and response"),
        ({"video": "a.mp4", "timestamps": [2], "conversations": TALK}, "timestamps: expected [start, end] in seconds"),
        ({"video": "a.mp4", "timestamps": [2, "9"], "conversations": TALK}, "timestamps: expected [start, end]"),
        ({"video": "a.mp4", "use_audio": "no", "conversations": TALK}, "use_audio: expected true or false"),
        ({"audio": "a.wav", "use_audio": False, "conversations": TALK}, "use_audio: is false, and there is no video"),
        ({"video": "a.mp4", "use_audio": True, "tracks": "video", "conversations": TALK}, "is given beside tracks"),
        ({"video": ["a.mp4", "b.mp4"], "conversations": TALK}, "videos: 2 files in a row"),
        ({"video": "a.mp4", "tracks": "sound", "conversations": TALK}, "tracks: expected video, audio or null"),
        ({"audio": "a.wav", "tracks": "video", "conversations": TALK}, "tracks: is video, and only audio is given"),
        ({"query": "a ?", "rejected_response": "b", "video": "a.mp4"}, "rejected_response: preference rows"),
        ({"video": "a.mp4", "conversations": [TALK[0], {"from": "chosen", "value": "x"}]}, "preference rows"),
        ({"messages": [{**ASKED, "at": 3}]}, "messages[0].at: is a time of a file, and none is given"),
        ({"query": "a ?", "tracks": "video"}, "tracks: is about a file, and neither video nor audio is given"),
        *(
            ({"messages": [ASKED, ANSWER], "video": "a.mp4", key: value}, f"{key}: {said}")
            for key, value, said in (
                *(("fps", 2, "it is one for a whole run"), ("nframes", 8, "it is one for a whole run")),
                *((key, 1, "did you mean start?") for key in ("start_time", "start_sec", "video_start", "clip_start")),
                *((key, 4, "did you mean end?") for key in ("end_time", "end_seconds", "video_end")),
                *(("clip", [1, 2], "did you mean timestamps?"), ("trim", [1, 2], "did you mean timestamps?")),
                *(("video_path", "b.mp4", "did you mean video?"), ("audio_file", "b.wav", "did you mean audio?")),
                *((key, 0, "is given for the whole row") for key in ("loss", "weight", "train", "training", "at")),
                *((key, [0], "is given for the whole row") for key in ("loss_mask", "loss_scale", "mask", "weights")),
                *((key, 3, "is given for the whole row") for key in ("time", "question_time")),
                ("system_prompt", "Listen.", "did you mean system?"),
                ("modality", "audio", "did you mean tracks?"),
                ("sample_weight", 2, "rows have no weight"),
                ("skip", True, "remove it, and the row"),
            )
        ),
        ({"messages": [{**ASKED, "tool_calls": []}], "video": "a.mp4"}, "messages[0].tool_calls: unknown key"),
    ],
)
def test_what_no_stream_can_follow_is_refused_by_name(row, expected) -> None:
    assert expected in problems(row)


def documented() -> list[str]:
    """Every row of an example of docs/data.md."""
    blocks = re.findall(r"```json\n(.*?)```", (ROOT / "docs/data.md").read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("line", documented())
def test_every_example_of_the_docs_is_accepted_without_a_remark_on_its_keys(line) -> None:
    sample, remarks = converted(json.loads(line))
    assert sample.questions[0].answer in ("Hello.", "Music.")
    listed = "a/1.jpg" if isinstance(sample.video, FrameList) else json.loads(line).get("video", "a.mp4")
    assert sample.files[0] == HERE / listed
    assert not any("under meta only" in remark for remark in remarks)


def test_the_docs_name_every_key_of_a_manifest_and_of_a_source() -> None:
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    assert [key for key in KEYS if f"`{key}`" not in text] == []
    assert [
        each.name for each in fields(DataSource) if f"{each.name}:" not in text and f"`{each.name}`" not in text
    ] == []
