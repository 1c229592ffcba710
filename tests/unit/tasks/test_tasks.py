"""Benchmarks are read from folders in the official layouts: questions, prompts, times, categories, defects, gaps."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support import task_layouts as layouts

from omnimem.data import ManifestError, Sample
from omnimem.tasks import (
    Benchmark,
    LVBenchOptions,
    LVOmniBenchOptions,
    OwnOptions,
    StreamingBenchOptions,
    VideoMMEOptions,
)
from omnimem.tasks.annotations import AnnotationReader
from omnimem.tasks.streamingbench import seconds_of

BUILT: dict[str, tuple[Callable[[Path], Path], type]] = {
    "video_mme": (layouts.video_mme, VideoMMEOptions),
    "lvbench": (layouts.lvbench, LVBenchOptions),
    "lvomnibench": (layouts.lvomnibench, LVOmniBenchOptions),
    "streamingbench": (layouts.streamingbench, StreamingBenchOptions),
    "own": (layouts.own, OwnOptions),
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A folder of each benchmark."""
    return {name: str(build(tmp_path_factory.mktemp(name))) for name, (build, _) in BUILT.items()}


def texts(samples: list[Sample]) -> dict[str, str]:
    """Prompts by the id of the question."""
    return {question.item.id: question.text for sample in samples for question in sample.questions}


def ids(samples: list[Sample]) -> list[list[str]]:
    return [[question.item.id for question in sample.questions] for sample in samples]


@pytest.mark.parametrize("name", BUILT)
def test_a_benchmark_is_one_and_lacks_nothing_in_a_whole_folder(name, roots) -> None:
    benchmark = BUILT[name][1](root=roots[name])
    assert isinstance(benchmark, Benchmark)
    assert benchmark.gaps() == []
    assert all(path.is_file() for path in benchmark.annotations)
    for sample in benchmark.samples():
        assert sample.video is not None
        assert sample.video.is_file()
        assert len(sample.items) == len(sample.questions) > 0


@pytest.mark.parametrize("name", BUILT)
def test_an_empty_folder_is_a_gap_with_its_cure_and_no_error(name, tmp_path) -> None:
    gaps = BUILT[name][1](root=str(tmp_path)).gaps()
    assert all(gap.share == 1 and str(tmp_path) in gap.what and gap.how for gap in gaps)
    assert gaps


@pytest.mark.parametrize("name", BUILT)
def test_missing_videos_are_counted_and_annotations_that_cannot_be_read_are_an_error(name, tmp_path) -> None:
    root = BUILT[name][0](tmp_path)
    benchmark = BUILT[name][1](root=str(root))
    before = benchmark.samples()
    assert before[0].video is not None
    before[0].video.unlink()
    (gap,) = benchmark.gaps()
    lost = sum(sample.video == before[0].video for sample in before)
    assert gap.share == lost / len(before) < 1
    assert gap.what.startswith("1 of ")
    assert ids(benchmark.samples()) == ids(before)  # n never shrinks in silence

    benchmark.annotations[0].write_bytes(b"\xff\xfe no annotations")
    with pytest.raises(ManifestError, match=benchmark.annotations[0].name):
        benchmark.samples()


def test_video_mme_asks_three_questions_of_each_video_with_the_official_prompt(roots) -> None:
    samples = VideoMMEOptions(root=roots["video_mme"]).samples()
    assert ids(samples) == [[f"00{video}-{place}" for place in (1, 2, 3)] for video in (1, 2, 3)]
    assert [question.answer for question in samples[0].questions] == ["B", "A", "D"]
    assert samples[0].questions[0].item.categories == {
        "duration": ("short",),
        "domain": ("Knowledge",),
        "sub_category": ("Geography",),
        "task_type": ("Counting Problem",),
    }
    assert samples[0].questions[0].text == (
        "Select the best answer to the following multiple-choice question based on the video. "
        "Respond with only the letter (A, B, C, or D) of the correct option.\n"
        "Which colour has the star?\nA. Red.\nB. Green.\nC. Blue.\nD. Yellow.\nThe best answer is:"
    )


def test_the_prompt_of_lmms_eval_speaks_of_subtitles_where_there_are_none(roots) -> None:
    asked = texts(VideoMMEOptions(root=roots["video_mme"], rules="lmms_eval").samples())["001-1"]
    assert asked == (
        "Select the best answer to the following multiple-choice question based on the video and the subtitles. "
        "Respond with only the letter (A, B, C, or D) of the correct option.\n"
        "Which colour has the star?\nA. Red.\nB. Green.\nC. Blue.\nD. Yellow.\n\n"
        "Answer with the option's letter from the given choices directly."
    )


def test_the_prompt_of_vlmevalkit_is_its_template(roots) -> None:
    asked = texts(VideoMMEOptions(root=roots["video_mme"], rules="vlmevalkit").samples())["001-1"]
    assert asked == (
        "\nThese are the frames of a video. Select the best answer to the following multiple-choice question based on "
        "the video. Respond with only the letter (A, B, C, or D) of the correct option.\n"
        "Question: Which colour has the star?\nA. Red.\nB. Green.\nC. Blue.\nD. Yellow.\nAnswer: "
    )


@pytest.mark.parametrize(
    ("rules", "begins"),
    [
        ("official", "This video's subtitles are listed below:\nHello there.\nGood bye.\nSelect the best"),
        ("lmms_eval", "This video's subtitles are listed below: \nHello there.\nGood bye.\nSelect the best"),
        ("vlmevalkit", "\nThese are the frames of a video. This video's subtitles are listed below:\nHello there.\n"),
    ],
)
def test_subtitles_are_those_on_the_screen_at_the_frames_that_are_seen(rules, begins, roots) -> None:
    asked = texts(VideoMMEOptions(root=roots["video_mme"], subtitles=True, rules=rules).samples())  # pyright: ignore[reportArgumentType]
    assert asked["001-1"].startswith(begins)
    denser = VideoMMEOptions(root=roots["video_mme"], subtitles=True, subtitle_fps=2.0)
    assert "Between two frames." in texts(denser.samples())["001-1"]


def test_video_mme_is_sliced_by_duration_and_refuses_one_that_it_does_not_know(tmp_path) -> None:
    root = layouts.video_mme(tmp_path)
    sliced = VideoMMEOptions(root=str(root), durations=("long",))
    assert [sample.id for sample in sliced.samples()] == ["vid3"]
    assert sliced.published.questions == 900
    rows = layouts.pyarrow.parquet.read_table(sliced.annotations[0]).to_pylist()
    layouts.write_parquet(sliced.annotations[0], [{**rows[0], "duration": "endless"}, *rows[1:]])
    with pytest.raises(ManifestError, match='row 1 duration: expected short, medium, long, got "endless"'):
        sliced.samples()


def test_lvbench_uses_the_options_in_the_question_and_knows_several_labels(roots) -> None:
    benchmark = LVBenchOptions(root=roots["lvbench"])
    first, second = benchmark.samples()
    assert first.questions[0].text == (
        "What year appears in the opening caption?\n(A) 1636\n(B) 1366\n(C) 1363\n(D) 1633\n"
        "Answer the question with the option letter"
    )
    assert first.questions[0].item.options == ("1636", "1366", "1363", "1633")
    assert first.questions[1].item.categories["question_type"] == ("reasoning", "temporal grounding")
    assert second.questions[0].item.options == ()
    assert {(defect.rule, defect.where) for defect in benchmark.defects()} == {
        ("option_list", "57"),
        ("several_labels", "question_type"),
    }
    assert first.meta["seconds"] == pytest.approx((7.6, 8.4))


def test_a_video_that_video2dataset_numbered_is_found_by_its_address(roots) -> None:
    second = LVBenchOptions(root=roots["lvbench"]).samples()[1]
    assert second.video == Path(roots["lvbench"]) / "videos" / "00000" / "000000001.mp4"


def test_lvomnibench_shows_letters_whether_its_options_have_them_or_not(roots) -> None:
    benchmark = LVOmniBenchOptions(root=roots["lvomnibench"])
    first, second = benchmark.samples()
    assert [question.text for question in first.questions] == [second.questions[0].text] * 2
    assert first.questions[0].text == (
        "Question: Which colour has the star?\nOptions:\nA. Red.\nB. Green.\nC. Blue.\nD. Yellow.\n\n"
        "Select the best answer from the options above. Directly provide the letter representing your choice and "
        "nothing else. Do not include the full text of the option, do not provide any explanation."
    )
    assert [question.answer for question in first.questions] == ["B", "C"]
    assert first.questions[1].item.categories["audio_type"] == ("music",)
    assert {defect.where: defect.rule for defect in benchmark.defects()} == {
        "video_0#1": "option_letters",
        "video_1#0": "option_list",
    }


def test_streamingbench_asks_at_the_time_stamp_and_streams_nothing_after_the_last_one(roots) -> None:
    samples = StreamingBenchOptions(root=roots["streamingbench"]).samples()
    assert [sample.id for sample in samples] == ["sample_1_real", "sample_2_real", "sample_3_Source", "sample_4_sqa"]
    assert [question.at for question in samples[0].questions] == [3.0, 6.0, 7.0]
    assert [(sample.start, sample.end) for sample in samples] == [(0.0, 7.0), (0.0, 5.0), (0.0, 8.0), (0.0, 7.0)]


def test_the_sixty_second_track_streams_the_minute_before_each_question(tmp_path) -> None:
    root = layouts.streamingbench(tmp_path)
    late = [
        layouts.streaming_entry("sample_1_real", stamp, "Counting", window="[0:01:00 - 0:02:00]")
        for stamp in ("00:01:30", "00:00:10", "00:01:30")
    ]
    layouts.write_json(root / "questions_real.json", late)
    samples = StreamingBenchOptions(root=str(root), parts=("real",), context="60s").samples()
    assert [(sample.start, sample.end) for sample in samples] == [(0.0, 10.0), (30.0, 90.0)]
    assert ids(samples) == [["sample_1_real#1"], ["sample_1_real#0", "sample_1_real#2"]]
    assert {question.at for sample in samples for question in sample.questions} == {None}
    assert {sample.cluster for sample in samples} == {"sample_1_real"}


def test_a_sequential_prompt_holds_the_earlier_questions_with_right_answers(roots) -> None:
    first, second = StreamingBenchOptions(root=roots["streamingbench"]).samples()[3].questions
    context = (
        "Here are the contextual information related to the video. Please answer the questions based on the "
        "contextual information: At timestamp 00:00:03, the following question and answer occurred: Question: Which "
        "colour has the star?; Options: A. Red., B. Green., C. Blue., D. Yellow.; Answer: C; "
    )
    asked = (
        "Here is the question. Answer it and don't confuse it with the previous conversation.\n"
        "Question: Which colour has the star?\n\nOptions:\nA. Red.\nB. Green.\nC. Blue.\nD. Yellow.\n\n"
        "The best option is:"
    )
    assert first.text.endswith(f"of the correct option.\n\n\n\n{asked}")
    assert second.text.endswith(f"of the correct option.\n\n{context}\n\n{asked}")


def test_defects_of_streamingbench_are_fixed_by_rule_and_listed(roots) -> None:
    benchmark = StreamingBenchOptions(root=roots["streamingbench"])
    found = [(defect.rule, defect.where) for defect in benchmark.defects()]
    assert found == [
        ("time_stamp", "sample_1_real#2"),
        ("time_stamp", "sample_2_real#0"),
        ("option_list", "sample_3_Source#0"),
        ("option_list", "sample_3_Source#0"),
        ("time_stamp", "sample_3_Source#1"),
        ("option_letters", "sample_4_sqa#0"),
        ("option_letters", "sample_4_sqa#1"),
    ]
    fixed = benchmark.samples()[2].questions[0]
    assert fixed.item.options == ("Red or so.", "Green.", "Blue.", "Yellow.")
    assert "Options:\nA. Red or so.\nB. Green.\nC. Blue.\nD. Yellow.\n\n" in fixed.text


@pytest.mark.parametrize(
    ("stamp", "window", "seconds", "defects"),
    [
        ("00:00:31", "[0:00:00 - 0:01:00]", 31, 0),
        ("0:07:18", "[0:07:00 - 0:07:15]", 438, 0),
        ("00:08:07", "[0:03:00 - 0:04:00]", 487, 0),  # windows of conversations are only a pattern
        ("00:24", "[0:00:00 - 0:01:00]", 24, 1),
        ("00:12450", "[0:12:00 - 0:13:00]", 765, 1),  # of sample_132_real: 12,450 s at its word
        ("05:11:00", "[0:05:00 - 0:06:10]", 311, 1),  # of sample_32, Anomaly Context: 18,660 s at its word
        ("09:99:99", "[0:05:00 - 0:06:10]", 370, 1),  # no reading is near: the window's end
        ("00:00:00", "[0:00:00 - 0:01:00]", 1, 1),
    ],
)
def test_an_impossible_time_stamp_is_read_from_its_digits(stamp, window, seconds, defects) -> None:
    reading = AnnotationReader()
    assert seconds_of(stamp, window, "q", reading) == seconds
    assert len(reading.defects) == defects


def test_a_time_stamp_without_digits_is_an_error() -> None:
    reading = AnnotationReader()
    seconds_of("soon", "", "q", reading)
    assert reading.problems == ["q time_stamp: 'soon' is not a time; download the annotations again"]


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85"])
def test_line_ends_within_json_strings_do_not_cut_a_question(end, tmp_path) -> None:
    root = layouts.own(tmp_path)
    rows = [json.loads(line) for line in (root / "questions.jsonl").read_text().splitlines()]
    layouts.write_lines(root / "questions.jsonl", [rows[0] | {"question": f"first{end}second?"}, *rows[1:]])
    assert f"first{end}second?" in OwnOptions(root=str(root)).samples()[0].questions[0].text


def test_own_questions_on_one_stream_are_asked_in_one_pass(tmp_path) -> None:
    root = layouts.own(tmp_path)
    rows = [json.loads(line) for line in (root / "questions.jsonl").read_text().splitlines()]
    layouts.write_lines(root / "questions.jsonl", [*rows, {**rows[0], "id": "q4", "at": 3}])
    samples = OwnOptions(root=str(root)).samples()
    assert ids(samples) == [["q1", "q4"], ["q2"], ["q3"]]
    assert [sample.cluster for sample in samples] == ["videos/a.mp4", "videos/a.mp4", "b.mp4"]
    assert samples[0].questions[0].text == (
        "Which colour has the star?\nA. Red\nB. Blue\nAnswer with the option's letter from the given choices directly."
    )
    assert [question.at for question in samples[0].questions] == [None, 3.0]
    assert samples[1].start == 2.0
    assert samples[2].questions[0].item.categories == {"topic": ("sport", "music"), "level": ("easy",)}


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_files_of_questions_and_subtitles_are_utf8_with_or_without_a_mark(mark, tmp_path) -> None:
    questions = layouts.own(tmp_path / "own") / "questions.jsonl"
    root = layouts.video_mme(tmp_path / "mme")
    for path, options in (
        (questions, OwnOptions(root=str(questions.parent))),
        (root / "subtitle" / "vid1.srt", VideoMMEOptions(root=str(root), subtitles=True)),
    ):
        plain, text = options.samples(), path.read_bytes()
        path.write_bytes(mark + text)
        assert options.samples() == plain
        path.write_bytes(text + b"O\xf9")
        with pytest.raises(ManifestError, match=f"{path.name}:\\d+: is not UTF-8"):
            options.samples()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"option": []}, "1 option: unknown key; did you mean options?"),
        ({"genre": "x"}, "1 genre: unknown key; put it under categories"),
        ({"options": ["one"]}, "1 options: expected a list of 2 to 26 texts"),
        ({"answer": "E"}, "1 answer: E is not one of 2 options"),
        ({"start": 4, "at": 3}, "1 at: 3 is outside the stream"),
        ({"start": 4, "end": 3}, "1 end: 3 is not after start = 4"),
        ({"video": "../film.mp4"}, "1 video: ../film.mp4 is outside the folder"),
        ({"video": "v" * 256}, "1 video: vvvv"),
        ({"audio": 5}, "1 audio: expected text, got 5"),
        ({"at": 10**400}, "1: the number 10000000000000000000... has 401 digits"),
        ({"id": "q2"}, "question 'q2' occurs 2 times"),
    ],
)
def test_a_wrong_line_of_own_questions_is_named_with_its_key(change, problem, tmp_path) -> None:
    root = layouts.own(tmp_path)
    first, *rest = [json.loads(line) for line in (root / "questions.jsonl").read_text().splitlines()]
    layouts.write_lines(root / "questions.jsonl", [{**first, **change}, *rest])
    with pytest.raises(ManifestError) as raised:
        OwnOptions(root=str(root)).samples()
    assert any(problem in line for line in raised.value.problems)
    assert not any("download" in line for line in raised.value.problems)


@pytest.mark.parametrize("string", ["A. x", "A.x", "A) x", "(A) x", "A: x", "A.  x"])
def test_a_letter_before_an_option_is_known_in_every_form(string) -> None:
    reading = AnnotationReader()
    assert reading.options([string, "B. y"], "q").texts == ("x", "y")
    assert reading.defects == []


@pytest.mark.parametrize(
    ("given", "lines"),
    [
        (["A. Milne", "Tolstoy", "Kafka"], ["A. A. Milne", "B. Tolstoy", "C. Kafka"]),
        (["A.M. radio", "B.B. King", "C.S. Lewis"], ["A. A.M. radio", "B. B.B. King", "C. C.S. Lewis"]),
        (["Tolstoy", "B. Brecht"], ["A. Tolstoy", "B. B. Brecht"]),
        (["Tolstoy", "A. Milne"], ["A. Tolstoy", "B. A. Milne"]),
        (["A: red", "blue"], ["A. A: red", "B. blue"]),
        (["A. red", "A. blue"], ["A. A. red", "B. A. blue"]),
        (["A. red", "B. blue"], ["A. red", "B. blue"]),
        (["(A) red", "(B) blue"], ["(A) red", "(B) blue"]),
        (["U.S. army", "U.K. army"], ["A. U.S. army", "B. U.K. army"]),
    ],
)
def test_own_options_are_never_merged(given, lines, tmp_path) -> None:
    root = layouts.own(tmp_path)
    rows = [json.loads(line) for line in (root / "questions.jsonl").read_text().splitlines()]
    layouts.write_lines(root / "questions.jsonl", [{**rows[0], "options": given, "answer": "B"}])
    benchmark = OwnOptions(root=str(root))
    (question,) = benchmark.samples()[0].questions
    assert question.text.splitlines()[1:-1] == lines
    assert len(question.item.options) == len(given)
    assert benchmark.defects() == []


def test_published_options_are_not_merged_into_one() -> None:
    reading = AnnotationReader()
    assert reading.options(["A. Milne", "Tolstoy", "Kafka"], "q").texts == ("A. Milne", "Tolstoy", "Kafka")


def test_a_right_answer_that_no_option_has_is_a_defect_and_stays(tmp_path) -> None:
    root = layouts.lvomnibench(tmp_path)
    rows = json.loads((root / "data.json").read_text())
    layouts.write_json(root / "data.json", [{**rows[0], "correct_option": "F"}, *rows[1:]])
    benchmark = LVOmniBenchOptions(root=str(root))
    assert "answer" in {defect.rule for defect in benchmark.defects()}
    assert len(benchmark.samples()[0].questions) == 2


def test_a_name_that_leaves_the_folder_is_refused(tmp_path) -> None:
    root = layouts.lvomnibench(tmp_path)
    rows = json.loads((root / "data.json").read_text())
    layouts.write_json(root / "data.json", [{**rows[0], "video_id": "../video_0"}])
    with pytest.raises(ManifestError, match="cannot name a video"):
        LVOmniBenchOptions(root=str(root)).samples()
