"""Rows: one judgement of tracks and times, the same in every command, for every container."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from support.commands import exit_code
from support.thinkers import write_folder

from omnimem.backbones import Backbone, ModelOptions, Turn, load_backbone
from omnimem.cli.data_report import inspect_sample
from omnimem.commands import ask, check
from omnimem.data import Message, Sample, read_manifest
from omnimem.media import FileSource, LiveSource, MediaError
from omnimem.rows import judge, tracks_of
from omnimem.streaming.feeder import Feeder
from omnimem.streaming.options import StreamOptions

RATE, SECONDS = 16000, 6
# name: video codec, audio codec; adts and mpegts declare no duration, that of ogg and mp3 is found by ffmpeg
FILES = {
    "both.mp4": ("mpeg4", "aac"),
    "both.mkv": ("mpeg4", "flac"),
    "both.ts": ("mpeg2video", "mp2"),
    "silent.mp4": ("mpeg4", None),
    "silent.ts": ("mpeg2video", None),
    "sound.wav": (None, "pcm_s16le"),
    "sound.ogg": (None, "libopus"),
    "sound.aac": (None, "aac"),
    "sound.mp3": (None, "libmp3lame"),
}


def write(path: Path, video: str | None, audio: str | None, lengths: tuple[int, int] = (SECONDS, SECONDS)) -> None:
    """Noise in each track that has a codec; `lengths`: seconds of video and audio."""
    draw = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        moving = container.add_stream(video, rate=25) if video else None
        heard = container.add_stream(audio, rate=RATE, layout="mono") if audio else None
        if moving is not None:
            moving.width, moving.height, moving.pix_fmt = 64, 64, "yuv420p"
            for _ in range(25 * lengths[0]):
                pixels = draw.integers(0, 255, (64, 64, 3), dtype=np.uint8)
                container.mux(moving.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(moving.encode(None))
        if heard is not None:
            kind = heard.codec_context.format.name
            resampler = av.AudioResampler(kind, "mono", RATE)
            for first in range(0, RATE * lengths[1], 1000):
                block = 0.1 * draw.standard_normal((1, 1000)).astype(np.float32)
                frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = RATE, first, Fraction(1, RATE)
                for converted in resampler.resample(frame):
                    container.mux(heard.encode(converted))
            container.mux(heard.encode(None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    for name, codecs in FILES.items():
        write(folder / name, *codecs)
    return folder


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return load_backbone(ModelOptions(path=str(write_folder(folder / "model", rates="tiny"))))


def manifest(folder: Path, name: str, *, at: float | None = None, **keys: Any) -> Path:
    key = "audio" if name.startswith("sound") else "video"
    messages = [{"role": "user", "content": "what ?", "at": at}, {"role": "assistant", "content": "red"}]
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({"id": "x", key: name, "messages": messages, **keys}) + "\n")
    return path


# case: keys of the row, and the reason why it is refused
TIMES: dict[str, tuple[dict[str, Any], str | None]] = {
    "no times": ({}, None),
    "in the middle": ({"at": 3.0}, None),
    "exactly at the end": ({"at": float(SECONDS)}, None),
    "at the end of a clip": ({"start": 2.0, "end": 4.0, "at": 4.0}, None),
    "a question after the end": ({"at": 900.0}, "too_short"),
    "a question some seconds after the end": ({"at": SECONDS + 2.5}, "too_short"),
    "an end after the end": ({"end": 900.0}, "too_short"),
    "a question within an end after the end": ({"end": 900.0, "at": 3.0}, "too_short"),
    "a question between the end and `end`": ({"end": 900.0, "at": 800.0}, "too_short"),
    "a start after the end": ({"start": 900.0}, "empty"),
    "a start at the end": ({"start": SECONDS + 0.5, "at": 7.0}, "empty"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("case", TIMES)
def test_times_are_judged_alike_by_the_check_and_by_whoever_reads(folder, backbone, name, case) -> None:
    keys, reason = TIMES[case]
    path = manifest(folder, name, **keys)
    (sample,) = read_manifest(path)
    found = inspect_sample(sample)
    assert [failure.reason for failure in found.failures[:1]] == ([] if reason is None else [reason])
    assert exit_code(check.main, [str(path)]) == (0 if reason is None else 2)
    feeder = Feeder(backbone, StreamOptions(max_pixels=12544, chunk_tokens=60))
    if reason is None:
        assert feeder.open(sample).tokens
        return
    with pytest.raises(MediaError) as raised:
        feeder.open(sample)
    assert (raised.value.reason, raised.value.path) == (reason, folder / name)


@pytest.mark.parametrize("name", ["both.mp4", "both.ts", "silent.mp4", "sound.wav", "sound.ogg", "sound.aac"])
@pytest.mark.parametrize(("at", "code"), [("6", 0), ("900", 2)])
def test_ask_judges_a_time_as_a_row_does(folder, backbone, capsys, name, at, code) -> None:
    model = ["--model", str(folder / "model"), "--max-pixels", "12544", "--max-new-tokens", "1"]
    assert exit_code(ask.main, [*model, "--video", str(folder / name), "--at", at, "what ?"]) == code
    said = capsys.readouterr()
    assert ("after the end of the stream (6." in said.err) == (code == 2)
    assert ("track: " in said.err) == (code == 0 and not name.startswith("both"))


def row(folder: Path, video: str | None, audio: str | None = None) -> Sample:
    paths = {"video": video and folder / video, "audio": audio and folder / audio}
    return Sample(id="x", **paths, messages=())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("video", "audio", "asked", "expected"),
    [
        ("both.mp4", None, "both", "both"),
        ("silent.mp4", None, "both", "video"),
        ("sound.wav", None, "both", "audio"),
        (None, "sound.wav", "both", "audio"),
        (None, "both.mp4", "both", "audio"),
        ("silent.mp4", "sound.wav", "both", "both"),
        ("silent.mp4", "both.mp4", "require_both", "both"),
        ("both.mp4", None, "require_both", "both"),
        ("silent.mp4", None, "require_both", "no_audio"),
        ("sound.wav", None, "require_both", "no_video"),
        (None, "sound.wav", "require_both", "no_video"),
        ("silent.mp4", None, "audio", "no_audio"),
        ("silent.mp4", None, "video", "video"),
        (None, "sound.wav", "video", "no_video"),
        ("sound.wav", "sound.ogg", "both", "no_video"),  # a file that is named and holds nothing to read
        ("both.mp4", "silent.mp4", "both", "no_audio"),
    ],
)
def test_both_reads_what_is_there_and_require_both_refuses(folder, video, audio, asked, expected) -> None:
    sample = row(folder, video, audio)
    if expected in ("both", "video", "audio"):
        assert tracks_of(sample, asked) == expected
        return
    with pytest.raises(MediaError) as raised:
        tracks_of(sample, asked)
    assert raised.value.reason == expected
    at_fault = audio if expected == "no_audio" and audio else video or audio
    assert raised.value.path == folder / at_fault
    assert [each.reason for each in judge(sample, asked).problems] == [expected]


@pytest.mark.parametrize(("name", "tracks"), [("silent.mp4", "video"), ("sound.wav", "audio")])
def test_a_file_with_one_track_has_the_layout_of_that_track(folder, backbone, name, tracks) -> None:
    key = "audio" if tracks == "audio" else "video"
    (sample,) = read_manifest(manifest(folder, name, **{key: name}))
    streams = []
    for asked in ("both", tracks):
        feeder = Feeder(backbone, StreamOptions(max_pixels=12544, chunk_tokens=60, tracks=asked))
        opened = feeder.open(sample)
        assert opened.tracks == tracks
        prompt = feeder.prompt([[Turn(text="what ?")]], opened.tracks)
        chunks = [*feeder.chunks([opened]), *feeder.watch(folder / name)]
        streams.append((opened.layout, prompt.ids.tolist(), [chunk.positions.tolist() for chunk in chunks]))
        assert chunks[0].tracks == tracks
    assert streams[0] == streams[1]


def test_a_stream_too_short_for_one_token_is_refused(folder, backbone) -> None:
    sample = Sample(id="s", video=None, audio=folder / "sound.wav", end=0.01, messages=())
    feeder = Feeder(backbone, StreamOptions(max_pixels=12544, chunk_tokens=60, tracks="audio"))
    with pytest.raises(MediaError, match="too little audio for one token") as raised:
        feeder.open(sample)
    assert raised.value.reason == "empty"
    geometry, options = backbone.geometry, feeder.options.source("audio")
    samples = torch.zeros(200)
    for source in (
        FileSource(folder / "sound.wav", options=options, geometry=geometry, end=0.01),
        FileSource(folder / "sound.wav", options=options, geometry=geometry, end=0.01, asks=[0.005]),
        LiveSource(None, iter([samples]), options=options, geometry=geometry),
        LiveSource(None, iter([]), options=options, geometry=geometry),
    ):
        with pytest.raises(MediaError, match="too little audio for one token"):
            list(feeder.watch(source))


@pytest.mark.parametrize("name", ["uneven.mp4", "uneven_video.mp4"])
def test_a_question_after_the_track_that_is_read_is_one_about_the_file(folder, backbone, capsys, name) -> None:
    """As in training and evaluation: the other track goes on, so the question is about silence, or the last frame."""
    track = "audio" if name == "uneven.mp4" else "video"
    write(folder / name, "mpeg4", "aac", (6, 2) if track == "audio" else (2, 6))
    (sample,) = read_manifest(manifest(folder, name, at=5.0))
    assert not judge(sample, track).problems
    model = ["--model", str(folder / "model"), "--max-pixels", "12544", "--max-new-tokens", "1", "--tracks", track]
    assert exit_code(ask.main, [*model, "--video", str(folder / name), "--at", "5", "what ?"]) == 0
    assert "tokens in 2 s" in capsys.readouterr().out


@pytest.mark.parametrize(("at", "said"), [(3.0, None), (5.5, "after the end of the sample (end = 3 s)")])
def test_a_question_after_the_end_of_the_sample_is_no_question_about_the_file(folder, at, said) -> None:
    question = Message(role="user", content="what ?", at=at)
    sample = Sample(id="s", video=folder / "both.mp4", audio=None, end=3.0, messages=(question,))
    assert [said in str(problem.error) for problem in judge(sample, "both").problems] == (
        [] if said is None else [True]
    )


@pytest.mark.parametrize(
    ("keys", "asked", "expected"),
    [
        ({"tracks": "video"}, "both", "video"),
        ({"tracks": "audio"}, "both", "audio"),
        ({"tracks": "audio", "audio": "sound.wav"}, "both", "audio"),
        ({"tracks": "video"}, "video", "video"),
        ({}, "both", "both"),
        ({"tracks": "video"}, "audio", "is read without audio (tracks: video of the row)"),
        ({"tracks": "audio"}, "video", "is read without its video (tracks: audio of the row)"),
        ({"tracks": "video"}, "require_both", "is read without audio"),
    ],
)
def test_a_row_may_name_the_one_track_that_is_read(folder, backbone, keys, asked, expected) -> None:
    (sample,) = read_manifest(manifest(folder, "both.mp4", **keys))
    judged = judge(sample, asked)
    if judged.problems:
        assert expected in judged.problems[0].what
        return
    assert judged.tracks == expected
    opened = Feeder(backbone, StreamOptions(tracks=asked)).open(sample)
    seen = {"video": opened.heard.frames > 0, "audio": opened.heard.audio_seconds > 0}
    assert seen == {"video": expected != "audio", "audio": expected != "video"}
