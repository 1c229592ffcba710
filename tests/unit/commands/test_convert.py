"""Users' files become a manifest, with every problem named by file and row; checking a manifest."""

import json
import re
import wave
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from support.commands import exit_code

from omnimem.commands import check, convert
from omnimem.data import read_manifest
from omnimem.recall.renderer import write_mp4
from omnimem.recall.worlds import draw_world


def write_silent(path: Path) -> None:
    """Two seconds of video without a sound track."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for _ in range(8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a talking and a silent video, a sound file, and a file that is none of these."""
    folder = tmp_path_factory.mktemp("convert")
    (folder / "clips").mkdir()
    write_mp4(draw_world(1, 8), folder / "clips" / "talk.mp4")
    write_silent(folder / "clips" / "silent.mp4")
    (folder / "clips" / "broken.mp4").write_bytes(b"no video at all")
    with wave.open(str(folder / "clips" / "sound.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16000)
        sound.writeframes(bytes(2 * 16000 * 2))
    return folder


def written(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows) if name.endswith("l") else json.dumps(rows))
    return path


def swift(text: str = "<video>what ?", **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "that"}]
    return {"messages": turns, "videos": ["clips/talk.mp4"], **more}


def turned(**more: Any) -> dict[str, Any]:
    """A row with more keys in the turn of its answer."""
    question, answer = swift()["messages"]
    return swift(messages=[question, {**answer, **more}])


def run(media: Path, rows: list[Any], *more: str) -> tuple[int, Path]:
    out = media / "train.jsonl"
    out.unlink(missing_ok=True)
    return exit_code(convert.main, [str(written(media, rows)), "--out", str(out), *more]), out


def problems(capsys: pytest.CaptureFixture[str], media: Path) -> list[str]:
    return [line.removeprefix(f"{media / 'rows.jsonl'}:") for line in capsys.readouterr().err.splitlines()]


def test_ms_swift_messages_become_samples(media) -> None:
    first = swift(id="one", chat_template_kwargs={"fps": 1})
    first["messages"] = [
        {"role": "system", "content": "Listen."},
        {"role": "user", "content": "Look at <video>: what ?"},
        {"role": "assistant", "content": "that", "loss": False},
        {"role": "user", "content": "And then ?"},
        {"role": "assistant", "content": "this"},
    ]
    code, out = run(media, [first, swift()])
    one, two = read_manifest(out)
    assert code == 0
    assert (one.id, one.video, one.audio, one.system) == ("one", media / "clips/talk.mp4", None, "Listen.")
    assert [(q.text, q.answer, q.loss) for q in one.questions] == [
        ("Look at : what ?", "that", False),
        ("And then ?", "this", True),
    ]
    assert one.meta == {"chat_template_kwargs": {"fps": 1}}
    assert (two.id, two.questions[0].text) == ("rows-000002", "what ?")


def test_values_are_kept_as_written(media) -> None:
    facts = {"date": "2020-01-02T00:00:00", "big": 12345678901234567890123, "mixed": [1, "a", None, {"b": None}]}
    rows = [{**swift(), "first": None}, {**swift(**facts), "meta": {"seed": 3}}]
    assert run(media, rows)[0] == 0
    assert [sample.meta for sample in read_manifest(media / "train.jsonl")] == [{}, {**facts, "seed": 3}]


@pytest.mark.parametrize("answer", [" that\n", "that\n\n  this", "\u00a0that", "a  b"])
def test_blanks_of_an_answer_are_kept_as_written(media, answer) -> None:
    question = swift("<video>\nwhat ?")["messages"][0]
    assert run(media, [swift(messages=[question, {"role": "assistant", "content": answer}])])[0] == 0
    (asked,) = read_manifest(media / "train.jsonl")[0].questions
    assert (asked.text, asked.answer) == ("what ?", answer)


@pytest.mark.parametrize("key", ["loss", "weight", "train", "training"])
def test_a_question_that_is_to_be_learned_is_refused(media, capsys, key) -> None:
    row = swift()
    row["messages"][0][key] = True
    assert run(media, [row])[0] == 2
    assert "messages[0].loss: only an answer is learned" in capsys.readouterr().err


@pytest.mark.parametrize("mask", [{"loss": False}, {"loss": 0}, {"weight": 0.0}, {"train": False}, {"training": 0}])
def test_a_masked_answer_is_not_learned_and_the_time_of_a_question_is_kept(media, mask) -> None:
    row = turned(**mask)
    row["messages"][0]["at"] = 2
    assert run(media, [row])[0] == 0
    (question,) = read_manifest(media / "train.jsonl")[0].questions
    assert (question.loss, question.at) == (False, 2)


def test_sharegpt_conversations_with_both_files_become_samples(media) -> None:
    row = {
        "conversations": [{"from": "human", "value": "<video><audio>\nwhat ?"}, {"from": "gpt", "value": "that"}],
        "system": "Look.",
        "videos": ["clips/silent.mp4"],
        "audios": ["clips/sound.wav"],
    }
    source = written(media, [row, row], "rows.json")
    out = media / "shared.jsonl"
    assert exit_code(convert.main, [str(source), "--out", str(out)]) == 0
    sample = read_manifest(out)[1]
    assert (sample.video, sample.audio) == (media / "clips/silent.mp4", media / "clips/sound.wav")
    assert (sample.system, sample.questions[0].text) == ("Look.", "what ?")


def test_video_salmonn_rows_become_samples(media) -> None:
    talk = [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "that"}]
    rows = [
        {"video": "clips/silent.mp4", "audio": "clips/sound.wav", "conversations": talk},
        {"video": "clips/talk.mp4", "conversations": talk},
    ]
    code, out = run(media, rows)
    assert code == 0
    assert [sample.audio for sample in read_manifest(out)] == [media / "clips/sound.wav", None]
    assert read_manifest(out)[0].questions[0].text == "what ?"


def test_all_problems_of_all_rows_are_named_at_once_and_nothing_is_written(media, capsys) -> None:
    rows = [
        swift(),
        swift("<video><video>what ?"),
        swift(videos=["clips/gone.mp4"]),
        swift(videos=["clips/silent.mp4"]),
        swift(videos=["clips/broken.mp4"], images=["a.png"]),
        swift(audios=["clips/sound.wav"]),
        swift("<audio>what ?"),
    ]
    code, out = run(media, rows)
    assert code == 2
    assert not out.exists()
    assert [problem.split(";")[0].replace(f"{media}/", "") for problem in problems(capsys, media)] == [
        "2 messages: 2 <video> tags for 1 file",
        "5 images: still images are not streamed",
        "7 messages: 1 <audio> tag for 0 files",
        "3 video: clips/gone.mp4: is not a file",
        "train.jsonl: not written",
    ]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (swift("<video><video>what ?", videos=["a.mp4", "b.mp4"]), "1 videos: 2 files in a row"),
        (swift(videos=[["a.png", 3]]), "1 videos: expected a list of paths"),
        (swift(videos=["https://example.org/a.mp4"]), "1 videos: https://example.org/a.mp4 is not a local path"),
        (swift(videos=["../talk.mp4"]), "1 videos: "),
        (swift(conversations=[{"from": "human", "value": "?"}]), "1 messages: expected messages or conversations, got"),
        (swift(messages=[{"role": "tool", "content": "x"}]), "1 messages[0]: role 'tool' is unknown; use one of"),
        (swift(messages={"role": "user"}), "1 messages: expected a list of turns"),
        (swift(system=5), "1 system: expected text"),
        (swift(loss=False), "1 loss: is given for the whole row"),
        (swift(meta={"a": 1}, a=2), "1 meta: expected an object without the keys of the row"),
        (turned(loss=0.5), "1 messages[1].loss: expected true or false, got 0.5"),
        (turned(wieght=0), "1 messages[1].wieght: unknown key; did you mean weight?"),
        (turned(loss=True, weight=0), "1 messages[1]: loss and weight are both given"),
        (turned(value="other"), "1 messages[1]: content and value are both given"),
        (swift(messages=["what ?"]), "1 messages[0]: expected an object, got what ?"),
        (swift("what ?", videos=[], end=3), "1 end: is about a file, and neither video nor audio is given"),
        (swift(end=90), "1 end: "),
        (swift(audios=["clips/talk.mp4"], videos=["clips/sound.wav"]), "1 video: "),
    ],
)
def test_a_wrong_row_is_named_with_its_cure(media, capsys, row, expected) -> None:
    assert run(media, [row])[0] == 2
    assert problems(capsys, media)[0].startswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"messages": []}\n\n{"messages": [}\n3', ["3: is not JSON", "4: expected an object, got 3"]),
        ("[{]", ["is not JSON"]),
        ('{"messages": [],\n"videos": []}', ["1 object over several lines"]),
        ("", ["holds no rows"]),
    ],
)
def test_a_file_that_is_no_json_is_named_by_line(media, capsys, text, expected) -> None:
    path = media / "rows.jsonl"
    path.write_text(text)
    assert exit_code(convert.main, [str(path), "--out", str(media / "train.jsonl"), "--overwrite"]) == 2
    found = problems(capsys, media)
    assert len(found) == len(expected)
    assert all(want in got for want, got in zip(expected, found, strict=True))


def test_some_rows_may_fail_when_allowed_and_the_report_counts_them(media, capsys) -> None:
    rows = [swift(), swift(), swift("what ?"), swift(videos=["clips/gone.mp4"])]
    code, out = run(media, rows, "--max-failures", "0.3")
    printed = capsys.readouterr()
    assert code == 0
    assert [sample.id for sample in read_manifest(out)] == ["rows-000001", "rows-000002", "rows-000003"]
    assert "4 (3 usable, 1 failed)" in printed.out
    assert "video with its own audio 3" in printed.out
    assert "failures   missing 1" in printed.out
    assert "1 row: no tag: the stream is placed before the first question" in printed.out
    assert "gone.mp4" in printed.err
    # where files are missing, the option for their folder is named unless it was given
    for more, said in (((), True), (("--media-root", str(media)), False)):
        assert run(media, rows, *more)[0] == 2
        assert ("--media-root" in problems(capsys, media)[-1]) == said


def test_media_outside_the_manifests_folder_must_be_allowed(media, tmp_path, capsys) -> None:
    source, out = str(written(media, [swift()])), tmp_path / "far" / "train.jsonl"
    assert exit_code(convert.main, [source, "--out", str(out)]) == 2
    assert "--allow-absolute-paths" in capsys.readouterr().err
    assert exit_code(convert.main, [source, "--out", str(out), "--allow-absolute-paths"]) == 0
    assert read_manifest(out, allow_absolute=True)[0].video == media / "clips/talk.mp4"


def test_two_rows_never_share_an_id_and_a_manifest_is_never_overwritten_unasked(media, capsys) -> None:
    assert run(media, [swift(id="a"), swift(id="a")])[0] == 2
    assert problems(capsys, media)[0].startswith("2 id: 'a' is already used at ")
    code, out = run(media, [swift()])
    assert code == 0
    assert exit_code(convert.main, [str(media / "rows.jsonl"), "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_checking_a_good_manifest_reports_it(media, capsys) -> None:
    code, out = run(media, [swift(), swift(end=6)])
    capsys.readouterr()
    assert code == 0
    assert exit_code(check.main, [str(out), "--decode"]) == 0
    printed = capsys.readouterr()
    assert "2 (2 usable, 0 failed)" in printed.out
    assert "shortest 6.0 s" in printed.out
    assert printed.err == ""


def test_checking_tells_when_two_manifests_share_files(media, capsys) -> None:
    _, out = run(media, [swift()])
    other = media / "test.jsonl"
    other.write_text(out.read_text())
    assert exit_code(check.main, [str(out), str(other)]) == 0
    assert "have 1 file in common" in capsys.readouterr().out


def test_a_file_of_another_format_is_sent_to_convert(media, capsys) -> None:
    listed = written(media, [swift()], "rows.json")
    assert exit_code(check.main, [str(listed)]) == 2
    assert f"convert it: `omnimem convert {listed} --out {media / 'rows.jsonl'}`" in capsys.readouterr().err
    foreign = written(media, [swift(), {"query": "what ?"}], "foreign.jsonl")
    assert exit_code(check.main, [str(foreign)]) == 2
    assert capsys.readouterr().err.count("omnimem convert makes a manifest of such rows") == 2


@pytest.mark.parametrize("command", [check.main, convert.main])
def test_a_long_list_of_problems_is_capped_and_counted(media, capsys, command) -> None:
    rows = [{"messages": [{"role": "robot", "content": "x"}]}] * 25
    more = ["--out", str(media / "new.jsonl")] if command is convert.main else []
    assert exit_code(command, [str(written(media, rows)), *more]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 22
    assert re.fullmatch(r"\.\.\. and \d+ more", lines[20])


@pytest.mark.parametrize(
    ("line", "option"),
    [
        ({"video": "/srv/a.mp4"}, "give --allow-absolute-paths"),
        ({"video": "clips/sound.wav", "audio": "clips/talk.mp4"}, "give --tracks audio"),
    ],
)
def test_a_hint_of_check_names_an_option_of_check(media, capsys, line, option) -> None:
    row = {"id": "a", "messages": [{"role": "user", "content": "what ?"}], **line}
    assert exit_code(check.main, [str(written(media, [row]))]) == 2
    error = capsys.readouterr().err
    assert option in error
    assert "data." not in error
