"""A list of image files is read as a video of the same frames, with the same rules and errors."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from support.media_files import write_frames, write_image

from omnimem.cli.data_report import inspect_sample
from omnimem.commands import ask
from omnimem.data import Sample, read_row
from omnimem.formats import Target, convert_row
from omnimem.media import FileSource, FrameList, Geometry, LogMel, MediaError, SourceOptions, probe, read_frames
from omnimem.rows import judge, tracks_of
from omnimem.streaming.encoder_cache import EncoderCache
from omnimem.textfile import ManifestError
from omnimem.training.sampler import recording

ASKED = [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "red"}]
NAMES = [f"f{number}.png" for number in range(9)]
MEL = LogMel(mels=64, hop=4000, n_fft=4096)
SIZES = {"patch": 14, "merge": 2, "temporal_patch": 2, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
GEOMETRY = Geometry(**SIZES, mel=MEL, segment_seconds=2.0)


def pixels(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A frame of one colour with a white line, so that lossy codecs keep it apart from others."""
    frame = np.full((height, width, 3), (20 * number, 255 - 20 * number, 90), np.uint8)
    frame[number] = 255
    return frame


def write_silence(path: Path, seconds: int) -> None:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000 * seconds), np.int16), format="s16", layout="mono")
        frame.sample_rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine frames as png files and as a lossless video, audio of 4 and of 9 s, and files that cannot be frames."""
    folder = tmp_path_factory.mktemp("frames")
    for number, name in enumerate(NAMES):
        write_image(folder / name, pixels(number))
    write_frames(folder / "v.mkv", "ffv1", "bgr0", [pixels(number) for number in range(9)], 2)
    for seconds in (4, 9):
        write_silence(folder / f"{seconds}.wav", seconds)
    write_image(folder / "large.png", pixels(0, 96))
    write_image(folder / "whole.jpg", np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:-900])
    (folder / "cut.png").write_bytes((folder / "f0.png").read_bytes()[:-40])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no image")
    return folder


def frames_of(folder: Path, *names: str, fps: float = 2.0) -> FrameList:
    return FrameList(tuple(folder / name for name in names or NAMES), fps)


def sample_of(video: Path | FrameList, audio: Path | None = None) -> Sample:
    return Sample(id="a", video=video, audio=audio, messages=())


@pytest.mark.parametrize("fps", [0.5, 1.0, 2.0, 3.0, 7.0])
@pytest.mark.parametrize(("start", "end"), [(0.0, None), (1.25, None), (0.0, 2.0), (1.0, 3.3), (4.4, None)])
def test_a_list_gives_the_frames_and_times_of_the_video_file(folder, fps, start, end) -> None:
    listed, filed = (
        list(read_frames(media, fps=fps, start=start, end=end)) for media in (frames_of(folder), folder / "v.mkv")
    )
    assert [time for time, _ in listed] == [time for time, _ in filed]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(listed, filed, strict=True))


def test_a_list_is_as_long_as_its_frames(folder) -> None:
    info = probe(frames_of(folder))
    assert (info.has_video, info.has_audio, info.video_seconds) == (True, False, 4.5)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".jpg"])
@pytest.mark.parametrize("name", [None, "a:b.dat", "frame%03d.jpg", "é 1.png"])
def test_an_image_is_read_whatever_its_name(tmp_path, suffix, name) -> None:
    path = tmp_path / f"a{suffix}"
    write_image(path, pixels(3))
    path = path.rename(tmp_path / (name or path.name))
    ((_, frame),) = read_frames(FrameList((path,), 1.0), fps=1.0)
    assert (frame.permute(1, 2, 0).int() - torch.from_numpy(pixels(3)).int()).abs().max() <= 8


BAD: dict[str, tuple[str, str]] = {  # the third of three frames, its reason and words
    "gone.png": ("missing", "is not a file"),
    "empty.png": ("empty", "zero bytes"),
    "text.png": ("unreadable", "cannot be read"),
    "cut.png": ("unreadable", "no size"),
    "cut.jpg": ("truncated", "decoding failed"),
    "large.png": ("unreadable", "64 x 96 pixels, the frame before it 64 x 48; make all frames"),
    "v.mkv": ("unreadable", "is no image"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_frame_that_cannot_be_used_is_named(folder, name) -> None:
    reason, words = BAD[name]
    sample = sample_of(frames_of(folder, "f0.png", "f1.png", name))
    with pytest.raises(MediaError, match=words) as raised:
        list(read_frames(sample.video, fps=2.0))
    assert (raised.value.path, raised.value.reason) == (folder / name, reason)
    finding = inspect_sample(sample, decode=True)
    assert [failure.reason for failure in finding.failures] == [reason]
    assert name in finding.failures[0].message
    problems = judge(sample, "both").problems  # without decoding, files that are not there
    assert [problem.path.name for problem in problems] == ([name] if reason == "missing" else [])


@pytest.mark.parametrize("tracks", ["both", "video", "audio", "require_both"])
@pytest.mark.parametrize("audio", ["4.wav", "9.wav"])
def test_audio_beside_frames_is_read_as_beside_a_file(folder, audio, tracks) -> None:
    listed, filed = (
        inspect_sample(sample_of(video, folder / audio), tracks=tracks)
        for video in (frames_of(folder), folder / "v.mkv")
    )
    same = ("seconds", "video", "audio", "failures")
    assert [getattr(listed, name) for name in same] == [getattr(filed, name) for name in same]
    assert [note.partition(": ")[2] for note in listed.notes] == [note.partition(": ")[2] for note in filed.notes]


@pytest.mark.parametrize("asked", ["audio", "require_both"])
def test_frames_alone_have_no_audio(folder, asked) -> None:
    with pytest.raises(MediaError) as raised:
        tracks_of(sample_of(frames_of(folder)), asked)
    assert raised.value.reason == "no_audio"
    source = FileSource(frames_of(folder), options=SourceOptions(tracks="audio"), geometry=GEOMETRY)
    with pytest.raises(MediaError, match="list of frames"):
        list(source)


@pytest.mark.parametrize(("end", "at"), [(9.0, None), (None, 8.0)])
def test_times_after_the_last_frame_are_refused(folder, end, at) -> None:
    row = {"id": "a", "frames": NAMES, "fps": 2, "end": end, "messages": [{**ASKED[0], "at": at}, ASKED[1]]}
    sample = read_row(row, folder=folder, origin="m:1")
    assert [problem.reason for problem in judge(sample, "both").problems] == ["too_short"]


@pytest.mark.parametrize("causal", [False, True])
def test_a_list_streams_as_the_file_also_from_a_decoding_process(folder, causal) -> None:
    settings: dict[str, Any] = {"options": SourceOptions(min_pixels=784), "geometry": GEOMETRY, "causal": causal}
    listed, filed = (
        list(pickle.loads(pickle.dumps(FileSource(video, folder / "9.wav", asks=[3.3], **settings))))
        for video in (frames_of(folder), folder / "v.mkv")
    )
    assert [replace(each, frames=None, mel=None) for each in listed] == [
        replace(each, frames=None, mel=None) for each in filed
    ]
    for one, other in zip(listed, filed, strict=True):
        pairs = ((one.frames, other.frames), (one.mel, other.mel))
        assert all((a is b is None) or torch.equal(a, b) for a, b in pairs)


def test_every_frame_and_the_rate_are_in_the_key_of_the_cache(folder, tmp_path) -> None:
    def key(*names: str, fps: float = 2.0) -> Path:
        video = frames_of(folder, *names, fps=fps)
        source = FileSource(video, options=SourceOptions(tracks="video"), geometry=GEOMETRY)
        return EncoderCache(tmp_path, "").path_of(source, "visual")

    keys = {key(*NAMES[:3]), key(*NAMES[:2]), key(*NAMES[:3], fps=1.0), key("f0.png", "f2.png", "f1.png")}
    assert len(keys) == 4
    assert key(*NAMES[:3]) in keys


def test_a_list_that_would_last_for_hours_is_refused(folder) -> None:
    with pytest.raises(MediaError, match="sparse_seconds"):
        probe(frames_of(folder, "f0.png", fps=1e-9))


def test_frames_of_one_folder_are_one_recording(folder) -> None:
    first, second = (recording(sample_of(frames_of(folder, name))) for name in NAMES[:2])
    assert first == second == str(folder)


# ------------------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"fps": None}, "fps"),
        ({"fps": 0}, "fps"),
        ({"fps": True}, "fps"),
        ({"fps": float("nan")}, "fps"),
        ({"fps": "2"}, "fps"),
        ({"frames": []}, "frames"),
        ({"frames": "a.png"}, "frames"),
        ({"frames": ["a.png", None]}, "frames[1]"),
        ({"frames": ["a.png", "../b.png"]}, "frames[1]"),
        ({"video": "a.mp4"}, "frames"),
        ({"frames": None, "video": "a.mp4"}, "fps"),
        ({"frames": None, "audio": "a.wav"}, "fps"),
    ],
)
def test_a_wrong_row_is_refused_by_key(change, key, tmp_path) -> None:
    row = {"id": "a", "frames": ["a.png"], "fps": 2, "messages": ASKED, **change}
    with pytest.raises(ManifestError) as raised:
        read_row(row, folder=tmp_path, origin="m:1")
    assert [problem.removeprefix("m:1 ").partition(":")[0] for problem in raised.value.problems] == [key]


def parts(video: list[str], **rate: float) -> dict[str, Any]:
    content = [{"type": "video", "video": video, **rate}, {"type": "text", "text": "what ?"}]
    return {"messages": [{"role": "user", "content": content}, ASKED[1]]}


FORMS: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "qwen": lambda files: parts([f"file://{file}" for file in files], fps=2),
    "qwen, sample_fps": lambda files: parts(files, sample_fps=2.0),
    "rate in the row": lambda files: {**parts(files), "fps": 2},
    "lists in videos": lambda files: {"messages": ASKED, "videos": [files], "fps": 2},
    "images in video": lambda files: {"messages": ASKED, "video": files, "fps": 2},
    "frames": lambda files: {"messages": ASKED, "frames": files, "fps": 2},
}


@pytest.mark.parametrize("form", FORMS)
def test_lists_of_other_formats_become_frames(form, folder) -> None:
    target = Target(folder=folder, media_root=folder, allow_absolute=False)
    sample, line, _ = convert_row(FORMS[form]([str(folder / name) for name in NAMES]), "m:1", "a", target)
    assert sample.video == frames_of(folder)
    assert json.loads(line)["frames"] == NAMES
    assert (sample.questions[0].text, sample.meta) == ("what ?", {})
    assert read_row(json.loads(line), folder=folder, origin="m:1").video == sample.video


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"videos": [["a.png"]]}, "fps"),
        ({"videos": [["a.png"]], "fps": 2, "sample_fps": 2}, "fps"),
        ({**parts(["a.png"], fps=2), "fps": 2}, "fps"),
        ({"videos": ["a.png", "b.png"], "fps": 2}, "videos"),
        ({"videos": [["a.png"], ["b.png"]], "fps": 2}, "videos"),
        ({"videos": [[]], "fps": 2}, "videos"),
        ({"videos": [["a.png", 3]], "fps": 2}, "videos"),
        ({"frames": ["a.png"], "video": "a.mp4", "fps": 2}, "frames"),
        ({"frames": ["a.png"], "fps": 0}, "fps"),
        ({"frames": ["a.png"], "fps": 2, "use_audio_in_video": True}, "use_audio_in_video"),
        ({"frames": ["https://x/a.png"], "fps": 2}, "frames"),
    ],
)
def test_a_row_of_another_format_is_refused_by_key(row, key, tmp_path) -> None:
    target = Target(folder=tmp_path, media_root=tmp_path, allow_absolute=False)
    with pytest.raises(ManifestError) as raised:
        convert_row({"messages": ASKED, **row}, "m:1", "a", target)
    assert any(problem.startswith(f"m:1 {key}:") for problem in raised.value.problems), raised.value.problems


@pytest.mark.parametrize(("rate", "files"), [(None, None), ("2", NAMES[:2]), ("0", SystemExit), ("2", MediaError)])
def test_ask_reads_a_folder_of_frames(folder, tmp_path, rate, files) -> None:
    for name in NAMES[:2] if files is not MediaError else ():
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    given = ["--model", "m", "--video", str(tmp_path), *(["--frame-rate", rate] if rate else []), "what ?"]
    if isinstance(files, type):
        with pytest.raises(files):
            ask.video_of(ask._parser().parse(given))
        return
    video = ask.video_of(ask._parser().parse(given))
    assert video == (frames_of(tmp_path, *files) if files else str(tmp_path))


def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path) -> None:
    for name in ("f10.png", "f9.PNG", "f1.jpg", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in FrameList.of_folder(tmp_path, 2.0).files] == ["f1.jpg", "f9.PNG", "f10.png"]
    with pytest.raises(ValueError, match="no frames"):
        FrameList.of_folder(tmp_path / "none", 2.0)
