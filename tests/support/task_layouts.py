"""Small benchmark folders, true to the official layouts, with real mp4 files; every question in them is ours.

Defects that published annotations have are here too: split and empty options, impossible time stamps, letters
missing, several labels, a list of options held as text.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from omnimem.recall.renderer import write_mp4
from omnimem.recall.worlds import draw_world
from support.paths import RECORDED

COLOURS = ("Red.", "Green.", "Blue.", "Yellow.")
LETTERED = [f"{letter}. {colour}" for letter, colour in zip("ABCD", COLOURS, strict=True)]
QUESTIONS = [f"Which colour has the {shape}?" for shape in ("star", "moon", "heart")]
QUESTION = QUESTIONS[0]
SUBTITLES = """1
00:00:00,500 --> 00:00:02,000
<font color="white" size=".72c">Hello there.</font>

2
00:00:02,100 --> 00:00:02,900
<font color="white" size=".72c">Between two frames.</font>

3
00:00:04,000 --> 00:00:05,000
<font color="white" size=".72c">Good bye.</font>
"""


@cache
def video(seconds: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_mp4(draw_world(seconds, seconds), path)
        return path.read_bytes()


def put(path: Path, seconds: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(video(seconds))


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=4, ensure_ascii=False), encoding="utf-8")


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")


def video_mme(root: Path) -> Path:
    """One video of each duration, three questions each, as the hub's parquet; subtitles for the first."""
    rows = [
        {
            "video_id": f"{number:03}",
            "duration": duration,
            "domain": "Knowledge",
            "sub_category": "Geography" if number < 3 else "Astronomy",
            "url": f"https://www.youtube.com/watch?v=vid{number}",
            "videoID": f"vid{number}",
            "question_id": f"{number:03}-{place}",
            "task_type": "Counting Problem" if place == 1 else "Object Recognition",
            "question": QUESTIONS[place - 1],
            "options": LETTERED,
            "answer": answer,
        }
        for number, duration in enumerate(("short", "medium", "long"), start=1)
        for place, answer in enumerate("BAD", start=1)
    ]
    write_parquet(root / "videomme" / "test-00000-of-00001.parquet", rows)
    for number in (1, 2, 3):
        put(root / "data" / f"vid{number}.mp4")
    (root / "subtitle").mkdir()
    (root / "subtitle" / "vid1.srt").write_text(SUBTITLES)
    return root


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


def lvbench(root: Path) -> Path:
    """Two videos, the second as video2dataset leaves it; one question of several labels, one without options."""
    options = "(A) 1636\n(B) 1366\n(C) 1363\n(D) 1633"
    first, second = (f"What year appears in the {part} caption?\n{options}" for part in ("opening", "closing"))
    questions = [
        {"uid": "55", "question": first, "answer": "D", "question_type": ["key information retrieval"]},
        {"uid": "56", "question": second, "answer": "A", "question_type": ["reasoning", "temporal grounding"]},
        {"uid": "57", "question": "What year appears?", "answer": "B", "question_type": ["summarization"]},
    ]
    info = {"fps": 4.0, "duration_minutes": 8 / 60, "resolution": {"width": 112, "height": 112}}
    rows = [
        {"key": "Cm73ma6Ibcs", "type": "tv", "video_info": info, "qa": questions[:2]},
        {"key": "-x_9", "type": "cartoon", "video_info": info, "qa": questions[2:]},
    ]
    for row in rows:
        row["qa"] = [{**one, "time_reference": "00:02-00:05"} for one in row["qa"]]
    write_lines(root / "video_info.meta.jsonl", rows)
    put(root / "videos" / "Cm73ma6Ibcs.mp4")
    put(root / "videos" / "00000" / "000000001.mp4")
    note = {"url": "https://www.youtube.com/watch?v=-x_9", "key": "000000001", "status": "success"}
    write_json(root / "videos" / "00000" / "000000001.json", note)
    return root


def lvomnibench(root: Path) -> Path:
    """Two videos; options with letters, without them, and as text."""
    kinds = {"question_type": "counting", "audio_type": "speech", "difficulty": "hard", "video_category": "vlog"}
    row = {"video_id": "video_0", "question": QUESTION, "correct_option": "B", **kinds}
    rows = [
        {**row, "options": LETTERED},
        {**row, "options": list(COLOURS), "correct_option": "c", "audio_type": "music"},
        {**row, "options": str(LETTERED), "video_id": "video_1"},
    ]
    write_json(root / "data.json", rows)
    for number in (0, 1):
        put(root / "videos" / f"video_{number}.mp4")
    return root


def streaming_entry(video: str, stamp: str, task: str, *, window: str, **changes: Any) -> dict[str, Any]:
    """An entry of StreamingBench with one question."""
    question = {
        "task_type": task,
        "question": QUESTION,
        "time_stamp": stamp,
        "answer": "C",
        "options": LETTERED,
        "required_ability": "working memory",
    }
    return {
        "time": window,
        "questions": [{**question, **changes}],
        "video_categories": "driving",
        "video_path": f"./videos/{video}.mp4",
    }


def streamingbench(root: Path) -> Path:
    """Split and empty options, impossible times, a conversation without letters whose video keeps its zip's path."""
    early, seconds = "[0:00:00 - 0:00:06]", "[0:00:04 - 0:00:08]"
    split = ["A. Red", "or so.", *LETTERED[1:3], "", LETTERED[3]]
    real = [
        streaming_entry("sample_1_real", "00:00:03", "Object Recognition", window=early),
        streaming_entry("sample_1_real", "0:00:06", "Counting", window=seconds, answer="D"),
        streaming_entry("sample_1_real", "00:00070", "Counting", window=seconds),
        streaming_entry("sample_2_real", "00:05", "Event Understanding", window=early),
    ]
    omni = [
        streaming_entry("sample_3_Source", "00:00:04", "Source Discrimination", window=early, options=split),
        streaming_entry("sample_3_Source", "05:11:00", "Anomaly Context Understanding", window=seconds),
    ]
    sequential = {"task": "Sequential QA", "window": "[0:01:00 - 0:02:00]", "options": list(COLOURS)}
    sqa = [[streaming_entry("sample_4_sqa", stamp, **sequential) for stamp in ("00:00:03", "00:00:07")]]
    for part, entries in (("real", real), ("omni", omni), ("sqa", sqa)):
        write_json(root / f"questions_{part}.json", entries)
    for name in ("sample_1_real", "sample_2_real", "sample_3_Source"):
        put(root / "videos" / f"{name}.mp4")
    put(root / "data" / "sqa" / "sample_4" / "video.mp4")
    return root


def own(root: Path) -> Path:
    """Two streams of one file, and one of another with a question at a time."""
    rows = [
        {"id": "q1", "video": "videos/a.mp4", "question": QUESTION, "options": ["Red", "Blue"], "answer": "B"},
        {"id": "q2", "video": "videos/a.mp4", "question": QUESTION, "options": LETTERED, "answer": "a", "start": 2},
        {"id": "q3", "video": "b.mp4", "question": QUESTION, "options": ["1", "2", "3"], "answer": "C", "at": 4.5},
    ]
    rows[2]["categories"] = {"topic": ["sport", "music"], "level": "easy"}
    write_lines(root / "questions.jsonl", rows)
    put(root / "videos" / "a.mp4")
    put(root / "b.mp4")
    return root


LMMS_VIDEO_MME = RECORDED / "lmms_eval_samples_videomme.jsonl"
LMMS_LVBENCH = RECORDED / "lmms_eval_samples_lvbench.jsonl"
VLMEVALKIT = RECORDED / "vlmevalkit_Video-MME_score.tsv"
