"""data_prep/check.py says of a benchmark's folder what is there, what is not, and how to get it."""

import json
from pathlib import Path

import pytest
from support import task_layouts as layouts
from support.commands import exit_code

from omnimem.cli import data_report
from omnimem.commands import check, convert
from omnimem.data import Item, Message, Sample

Said = tuple[int, str, list[str]]


def checked(capsys: pytest.CaptureFixture[str], name: str, root: Path, *more: str) -> Said:
    """Exit code, what was printed, and the lines of problems."""
    code = exit_code(check.main, ["--benchmark", name, "--root", str(root), *more])
    told = capsys.readouterr()
    return code, told.out, told.err.splitlines()


def test_a_whole_folder_passes_with_its_counts_categories_and_defects(tmp_path, capsys) -> None:
    code, told, problems = checked(capsys, "streamingbench", layouts.streamingbench(tmp_path), "--subset")
    assert (code, problems) == (0, [])
    assert "questions  all 8" in told
    assert "video with its own audio 4" in told
    assert "group: real-time visual 4, contextual 3, omni-source 1" in told
    assert "defect: time_stamp sample_3_Source#1: 05:11:00 is outside of [0:00:04 - 0:00:08]; asked at 8 s" in told


def test_fewer_questions_than_published_are_refused_unless_a_subset_is_wanted(tmp_path, capsys) -> None:
    root = layouts.lvbench(tmp_path)
    code, _, problems = checked(capsys, "lvbench", root)
    assert code == 2
    assert problems == [
        f"{root}/video_info.meta.jsonl: 2 videos and 3 questions, but 103 and 1,549 are published; "
        "download the annotations again, or give --subset"
    ]


def test_missing_videos_are_each_named_and_their_share_may_be_allowed(tmp_path, capsys) -> None:
    root = layouts.lvbench(tmp_path)
    (root / "videos" / "Cm73ma6Ibcs.mp4").unlink()
    code, told, problems = checked(capsys, "lvbench", root, "--subset")
    assert code == 2
    assert "2 (1 usable, 1 failed)" in told
    assert problems[0].endswith("Cm73ma6Ibcs.mp4: is not a file; check the path")
    assert problems[1].startswith(f"missing: 1 of 2 videos (first: {root}/videos/Cm73ma6Ibcs.mp4); save them there")
    assert checked(capsys, "lvbench", root, "--subset", "--max-failures", "0.5")[0] == 0


def test_a_video_much_shorter_than_it_should_be_is_a_failure(tmp_path, capsys) -> None:
    code, _, problems = checked(capsys, "video_mme", layouts.video_mme(tmp_path), "--subset")
    assert code == 2
    assert [line.split(" video: ")[1].split("/")[-1] for line in problems] == [
        f"vid{number}.mp4 lasts 8.0 s, but at least {least} s were expected; download it again"
        for number, least in ((2, 240), (3, 1800))
    ]
    short = checked(capsys, "video_mme", tmp_path, "--subset", "--set", "durations=[short]")
    assert short[0] == 0


@pytest.mark.parametrize(("start", "what"), [(0.0, "it sees all of it"), (30.0, "from 30 s on it sees nothing")])
def test_a_question_after_the_end_is_noted_with_what_it_sees(start, what, tmp_path) -> None:
    messages = (Message(role="user", content="what ?"), Message(role="assistant", content="A"))
    sample = Sample(
        id="x", video=tmp_path / "x.mp4", audio=None, messages=messages, start=start, end=90.0, items=(Item(id="x#0"),)
    )
    [note] = data_report._with_lengths(data_report.Finding(sample=sample, seconds=6.0), [sample]).notes
    assert note == f"x#0 is asked after the end of its video (6.0 s): {what}"


ASKED, LEARNED = {"role": "user", "content": "what ?"}, {"role": "assistant", "content": "that"}
NOT_LEARNED = {**LEARNED, "loss": False}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([[ASKED, LEARNED], [ASKED]], ["1 row", "(first: 1)", "omnimem finetune refuses", "do for omnimem calibrate"]),
        ([[ASKED], [ASKED, NOT_LEARNED]], ["2 rows", "(first: 0)", "do for omnimem calibrate"]),
        ([[ASKED, NOT_LEARNED]], ["1 row", "do for an evaluation", "remove its loss: false"]),
        ([[ASKED, LEARNED], [ASKED, ASKED, LEARNED]], []),
    ],
)
@pytest.mark.parametrize("convert_too", [False, True])
def test_rows_without_an_answer_to_train_on_are_noted(rows, words, convert_too, tmp_path, capsys) -> None:
    lines = [json.dumps({"id": str(number), "messages": row}) for number, row in enumerate(rows)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    arguments = [str(path), "--out", str(tmp_path / "b.jsonl")] if convert_too else [str(path)]
    assert exit_code((convert if convert_too else check).main, arguments) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "note: " in line and "to train on" in line]
    assert len(notes) == bool(words)
    assert all(word in note for word in words for note in notes)
