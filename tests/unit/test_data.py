"""Samples, manifests and the policy for samples that cannot be used."""

import json
from pathlib import Path
from typing import Any

import pytest

from omnimem.data import Failure, Failures, ManifestError, TooManyFailures, read_manifest

ASK = [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "that"}]
GOOD: dict[str, Any] = {"id": "a", "video": "videos/a.mp4", "messages": ASK}


def written(path: Path, *lines: Any) -> Path:
    """A manifest of these lines; bytes as they are, everything else as JSON."""
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(raw) + b"\n")
    return path


def problems_of(path: Path, *lines: Any, **how: Any) -> list[str]:
    with pytest.raises(ManifestError) as caught:
        read_manifest(written(path, *lines), **how)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return [problem.removeprefix(f"{path}:") for problem in caught.value.problems]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return tmp_path / "train.jsonl"


def test_a_full_line_becomes_a_sample_with_media_below_the_manifests_folder(manifest) -> None:
    line = {
        **{"id": "a", "video": "videos/a.mp4", "audio": "a.wav", "start": 2, "end": 60.5},
        "messages": [
            {"role": "system", "content": "Listen."},
            {"role": "user", "content": "what ?", "at": 30},
            {"role": "assistant", "content": "that", "loss": False},
            {"role": "user", "content": "and now ?"},
        ],
        "meta": {"kinds": ["visual", "auditory"], "seed": 3},
    }
    (sample,) = read_manifest(written(manifest, line))
    assert (sample.video, sample.audio) == (manifest.parent / "videos/a.mp4", manifest.parent / "a.wav")
    assert (sample.id, sample.start, sample.end, sample.system) == ("a", 2.0, 60.5, "Listen.")
    assert sample.meta["seed"] == 3
    assert sample.origin == f"{manifest}:1"
    first, second = sample.questions
    assert (first.text, first.answer, first.at, first.kind, first.loss) == ("what ?", "that", 30.0, "visual", False)
    assert (second.index, second.text, second.answer) == (1, "and now ?", None)
    assert (second.at, second.kind) == (None, "auditory")


def test_blank_lines_count_but_hold_nothing(manifest) -> None:
    samples = read_manifest(written(manifest, GOOD, b"", {**GOOD, "id": "b"}, b"  "))
    assert [sample.origin for sample in samples] == [f"{manifest}:1", f"{manifest}:3"]


def test_all_problems_of_all_lines_are_named_at_once_with_file_and_row(manifest) -> None:
    problems = problems_of(manifest, GOOD, {**GOOD, "id": "", "end": -1}, b"{", {**GOOD, "id": "c", "video": 3})
    assert [problem.split(";")[0] for problem in problems] == [
        '2 id: expected a name, got ""',
        "2 end: expected seconds (0 or more) or null, got -1",
        "3: is not JSON (Expecting property name enclosed in double quotes at column 2)",
        "4 video: expected a path or null, got 3",
    ]


ABSOLUTE = {**GOOD, "video": "/srv/a.mp4"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"vidoe": "a.mp4"}, "1 vidoe: unknown key; did you mean video?"),
        ({"seed": 4}, "1 seed: unknown key; put it under meta"),
        ({"video": None}, "1 video: neither video nor audio is given"),
        ({"video": "a" * 252 + ".mp4"}, "1 video: aaaaaaaaaa"),
        ({"audio": "a\x00.wav"}, "1 audio: holds a zero character"),
        ({"video": "../a.mp4"}, "1 video: ../a.mp4 is outside the folder"),
        ({"audio": "/srv/a.wav"}, "1 audio: /srv/a.wav is outside the folder"),
        ({"start": True}, "1 start: expected seconds"),
        ({"start": 5, "end": 5}, "1 end: 5.0 is not after start = 5.0"),
        ({"prefix": 3}, "1 prefix: expected text or null, got 3"),
        ({"prefix": "a" * 70_000}, "1 prefix: its length of "),
        ({"meta": {"kinds": ["visual", "visual"]}}, "1 meta.kinds: expected one word per question (1)"),
        ({"messages": [{"role": "human", "content": "?"}]}, "1 messages[0].role: expected system, user, assistant,"),
        ({"messages": [{"role": "user", "content": " "}]}, "1 messages[0].content: expected text"),
        ({"messages": [ASK[0], {**ASK[1], "loss": 1}]}, "1 messages[1].loss: expected true or false, got 1"),
        ({"messages": [{**ASK[0], "loss": True}, ASK[1]]}, "1 messages[0].loss: only an answer is learned"),
        ({"messages": [ASK[0], {**ASK[1], "at": 3}]}, "1 messages[1].at: only a user message has a time"),
        ({"messages": [{**ASK[0], "at": 70}], "end": 60}, "1 messages[0].at: 70.0 is outside the stream (0.0, 60.0]"),
        ({"messages": ASK[1:]}, "1 messages[0].role: an answer without a question"),
        ({"messages": [*ASK, {"role": "system", "content": "x"}]}, "1 messages[2].role: a system message must be"),
    ],
)
def test_a_wrong_value_is_named_by_its_key(manifest, change, expected) -> None:
    problems = problems_of(manifest, {**GOOD, **change})
    assert problems[0].startswith(expected)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"[1]", "1: expected an object, got [1]"),
        (b'{"id": "\xff"}', "1: is not UTF-8 (invalid start byte at byte 8)"),
        ('{"id": "x"}'.encode("utf-16"), "1: is not UTF-8 (it looks like UTF-16"),
        (b'{"id": "\\ud83d"}', "1: \\ud83d in '\\ud83d' is half of a character"),
        (b'{"start": 1%s}' % (b"0" * 400), "1: the number 10000000000000000000... has 401 digits"),
        (b'{"start": 1e999}', "1: the number 1e999 is too large"),
        (b"[" * 100_000, "1: lists or objects are more than 64 deep"),
        (b'{"id": 1, "id": 2}', "1: the key 'id' is given twice"),
    ],
)
def test_a_line_that_is_no_object_is_named(manifest, line, expected) -> None:
    assert problems_of(manifest, line)[0].startswith(expected)


def test_a_byte_order_mark_and_facts_that_are_null_change_nothing(manifest) -> None:
    line = {**GOOD, "meta": {"kinds": None, "needles": None, "seed": 12345678901234567890123}}
    (sample,) = read_manifest(written(manifest, b"\xef\xbb\xbf" + json.dumps(line).encode()))
    assert sample.meta == {"seed": 12345678901234567890123}
    assert sample.questions[0].kind == ""


def test_two_samples_never_share_an_id(manifest) -> None:
    assert problems_of(manifest, GOOD, b"", GOOD) == ["3 id: 'a' is already used in line 1; rename one"]


def test_paths_leave_the_folder_only_when_allowed(manifest) -> None:
    outside = [ABSOLUTE, {**GOOD, "id": "b", "video": "../b.mp4"}]
    absolute, relative = read_manifest(written(manifest, *outside), allow_absolute=True)
    assert absolute.video == Path("/srv/a.mp4")
    assert relative.video == manifest.parent / "../b.mp4"


def test_a_missing_and_an_empty_manifest_name_the_commands_that_make_one(manifest) -> None:
    with pytest.raises(ManifestError, match=r"create it with `omnimem synthesize --out .*omnimem convert"):
        read_manifest(manifest)
    assert problems_of(manifest, b"") == [" holds no samples; create it again"]


@pytest.mark.parametrize("folder", [".", "..", "/"])
def test_a_folder_without_a_name_has_a_command_too(folder) -> None:
    with pytest.raises(ManifestError, match=f"`omnimem convert {folder} --out train.jsonl`"):
        read_manifest(folder)


def test_a_folder_names_the_command_that_makes_a_manifest_of_it(tmp_path) -> None:
    with pytest.raises(ManifestError, match=r"is a folder, .* `omnimem convert \S+ --out \S+\.jsonl`"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("key", ["conversations", "videos", "audios", "query", "prompt", "instruction"])
def test_of_a_row_of_another_format_only_that_is_said(key, manifest) -> None:
    row = {key: [], "messages": [{"role": "user", "content": "?", "at": 4}]}
    assert problems_of(manifest, row) == [
        f"1 {key}: is of another format; omnimem convert makes a manifest of such rows"
    ]


def test_the_run_stops_at_the_first_failure_above_the_allowed_share() -> None:
    failures = Failures(samples=200, max_failures=0.01)
    for name in ("a", "b", "a", "b"):
        failures = failures.add(Failure(id=name, reason="truncated", message="ends early; download it again"))
    assert [failure.id for failure in failures.found] == ["a", "b"]
    assert failures.reasons == {"truncated": 2}
    message = r"c: no_audio; (?s:.*)3 of 200 samples failed, more than max_failures = 0.01"
    with pytest.raises(TooManyFailures, match=message):
        failures.add(Failure(id="c", reason="no_audio", message="has no audio track; use tracks: video"))


def test_no_failure_passes_when_none_is_allowed_and_every_one_when_all_are() -> None:
    with pytest.raises(TooManyFailures, match="1 of 1,000 samples failed"):
        Failures(samples=1000, max_failures=0.0).add(Failure(id="a", reason="missing"))
    assert Failures(samples=1, max_failures=1.0).add(Failure(id="a", reason="missing")).reasons == {"missing": 1}
