"""Media: what is read from files made here, and equality with the processors of transformers."""

import errno
import math
import os
import struct
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.paths import ROOT
from torch import Tensor
from transformers import WhisperFeatureExtractor

from omnimem.media import (
    FileSource,
    Geometry,
    LiveSource,
    LogMel,
    MediaError,
    RunningMel,
    Segment,
    SourceOptions,
    mel,
    patchify,
    probe,
    read_audio,
    read_frames,
    read_live,
    resize,
    smart_resize,
)
from omnimem.media.decode import contiguous, sample_by_time, timed_audio

RECORDED = load_file(ROOT / "tests" / "recorded" / "qwen2_vl_video.safetensors")
WHISPER = LogMel()
TINY = LogMel(mels=64, hop=4000, n_fft=4096)
RATE = 16000


def geometry(log_mel: LogMel = TINY) -> Geometry:
    half = (0.5, 0.5, 0.5)
    return Geometry(patch=14, merge=2, temporal_patch=2, mean=half, std=half, mel=log_mel, segment_seconds=2.0)


def noise(seconds: float, seed: int = 0, rate: int = RATE) -> Tensor:
    """Noise whose loudness fades and swells over five orders of magnitude, loudest after 5.5 s."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(round(seconds * rate), generator=generator)
    swell = 10 ** (-2.5 * torch.sin(torch.arange(len(samples)) * (2 * math.pi / (7.3 * rate))) - 3.5)
    return (samples * swell).clamp(-1, 1)


def write(
    path: Path,
    *,
    times: Sequence[float] = (),
    samples: Tensor | None = None,
    rate: int = RATE,
    size: tuple[int, int] = (64, 64),
    audio_from: Callable[[int], int] = lambda sample: sample,
    options: dict[str, str] | None = None,
    picture: Callable[[int], np.ndarray] | None = None,
    codec: str = "aac",
) -> Path:
    """A file whose frame i, shown from times[i] on, is grey of level 8 i (mod 256), and that sounds like `samples`."""
    clock = Fraction(1, 90000)
    with av.open(str(path), "w", options=options or {}) as container:
        video = container.add_stream("libx264", rate=rate_of(times), options={"g": "8", "crf": "10"}) if times else None
        if video is not None:
            video.height, video.width, video.pix_fmt, video.codec_context.time_base = *size, "yuv420p", clock
        layout = "mono" if samples is None or samples.ndim == 1 else "stereo"
        audio = None if samples is None else container.add_stream(codec, rate=rate, layout=layout)
        for index, time in enumerate(times):
            pixels = picture(index) if picture else np.full((*size, 3), 8 * index % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(time / clock), clock
            container.mux(video.encode(frame))
        if video is not None:
            container.mux(video.encode(None))
        if audio is not None and samples is not None:
            planes = samples.reshape(-1, samples.shape[-1]).numpy()
            for first in range(0, planes.shape[1], 1024):
                block = np.ascontiguousarray(planes[:, first : first + 1024])
                frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=layout)
                frame.sample_rate, frame.pts, frame.time_base = rate, audio_from(first), Fraction(1, rate)
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return path


def rate_of(times: Sequence[float]) -> Fraction:
    """Frames per second if all frames last as long as the first."""
    return Fraction(1 / (times[1] - times[0])).limit_denominator(100) if len(times) > 1 else Fraction(25)


def ticks(seconds: float, rate: float) -> list[float]:
    return [index / rate for index in range(round(seconds * rate))]


def tone(seconds: float, hertz: float, rate: int = RATE) -> Tensor:
    cycles = hertz * torch.arange(round(seconds * rate), dtype=torch.float64) / rate
    return 0.3 * torch.sin(2 * math.pi * cycles).float()


def shown(path: Path, **where: float) -> list[int]:
    """Which frame of a file made by `write` is shown at each time."""
    return [round(frame.float().mean().item() / 8) for _, frame in read_frames(path, **where)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module")
def film(folder: Path) -> Path:
    """7.5 s of video at 4 frames a second and 8.1 s of sound."""
    return write(folder / "film.mp4", times=ticks(7.5, 4), samples=noise(8.1))


@pytest.mark.parametrize("case", ["up", "down", "both", "same", "wide"])
def test_resized_patches_equal_the_recorded_processor_to_the_bit(case) -> None:
    patch, low, high = RECORDED[f"{case}.settings"].tolist()
    mean, std = RECORDED[f"{case}.normalisation"].tolist()
    frames = RECORDED[f"{case}.frames"]
    height, width = smart_resize(*frames.shape[-2:], cell=2 * patch, min_pixels=low, max_pixels=high)
    patches, grid = patchify(resize(frames, height, width), patch=patch, merge=2, temporal_patch=2, mean=mean, std=std)
    assert grid == tuple(RECORDED[f"{case}.grid"].tolist())
    assert torch.equal(patches, RECORDED[f"{case}.patches"])


def test_smart_resize_equals_the_recorded_sizes() -> None:
    for height, width, cell, low, high, *expected in RECORDED["sizes"].tolist():
        assert smart_resize(height, width, cell=cell, min_pixels=low, max_pixels=high) == tuple(expected)


def test_frames_too_slender_or_off_the_cell_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="aspect ratio above 200 in a 2010x10 frame"):
        smart_resize(10, 2010, cell=28, min_pixels=784, max_pixels=7840)
    frames = torch.zeros(2, 3, 56, 60, dtype=torch.uint8)
    with pytest.raises(ValueError, match="60x56 are not a multiple of 28 pixels"):
        patchify(frames, patch=14, merge=2, temporal_patch=2, mean=[0.0] * 3, std=[1.0] * 3)


@lru_cache
def extractor(log_mel: LogMel, samples: int) -> WhisperFeatureExtractor:
    """The stock extractor, which pads to a number of samples."""
    sizes = {"feature_size": log_mel.mels, "hop_length": log_mel.hop, "n_fft": log_mel.n_fft}
    made = WhisperFeatureExtractor(**sizes, chunk_length=1)
    made.n_samples = samples
    return made


def stock_mel(log_mel: LogMel, samples: Tensor, padded: int) -> Tensor:
    """The frames that WhisperFeatureExtractor marks as audio, padded as by Qwen2_5OmniProcessor."""
    options = {"padding": "max_length", "return_attention_mask": True, "return_tensors": "pt"}
    output = extractor(log_mel, padded)(samples.numpy(), sampling_rate=RATE, **options)
    return output["input_features"][0, :, : int(output["attention_mask"].sum())]


@pytest.mark.parametrize("log_mel", [WHISPER, TINY], ids=["whisper", "tiny"])
@pytest.mark.parametrize("seconds", [2.0, 7.77, 31.0, 7.77 + 1 / RATE])
def test_mel_of_a_clip_equals_the_whisper_feature_extractor(log_mel, seconds) -> None:
    samples = noise(seconds)
    expected = stock_mel(log_mel, samples, 60 * RATE)
    assert log_mel.clip(samples).shape == expected.shape == (log_mel.mels, math.ceil(len(samples) / log_mel.hop))
    assert (log_mel.clip(samples) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("log_mel", [WHISPER, LogMel(mels=20, hop=200)], ids=["whisper", "even"])
def test_mel_of_every_short_length_equals_the_whisper_feature_extractor(log_mel) -> None:
    samples = torch.rand(900, generator=torch.Generator().manual_seed(0)) - 0.5
    for length in range(1, 901):  # beyond two windows of 400; longer ones are drawn in the next test
        expected = stock_mel(log_mel, samples[:length], 3200)
        found = log_mel.clip(samples[:length])
        assert found.shape == expected.shape, length
        assert (found - expected).abs().max() <= 1e-5, length


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 20 * RATE), block=st.integers(2000, 3 * RATE), click=st.booleans())
def test_mel_of_any_length_in_any_blocks_equals_the_whisper_feature_extractor(length, block, click) -> None:
    samples = 0.1 * noise(20.0)[:length]
    if click:  # the loudest frame may be the one after the end
        samples[-1] = 1.0
    blocks = samples.split(block)
    pieces = list(WHISPER.pieces(lambda: blocks, 200))
    expected = stock_mel(WHISPER, samples, 21 * RATE)
    assert [piece.shape[1] for piece in pieces[:-1]] == [200] * (len(pieces) - 1)
    assert torch.cat(pieces, dim=1).shape == expected.shape
    assert (torch.cat(pieces, dim=1) - expected).abs().max() <= 1e-5
    assert (WHISPER.clip(samples) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("samples", [1, 159, 160, 320, 321, 32000, 32001, 32160, 32321, 33599, 48000, 63999])
@pytest.mark.parametrize("causal", [False, True])
def test_no_audio_of_a_file_is_lost_at_the_end(tmp_path, samples, causal) -> None:
    path = write(tmp_path / "sound.wav", samples=noise(4)[:samples] + 0.1, codec="pcm_s16le")
    options = SourceOptions(tracks="audio")
    source = FileSource(path, options=options, geometry=geometry(WHISPER), causal=causal)
    mels = [segment.mel for segment in source if segment.mel is not None]
    whole = WHISPER.clip(read_audio(path))
    assert torch.cat(mels, dim=1).shape == whole.shape == (128, math.ceil(samples / 160))
    assert (source.seconds, source.audio_seconds_heard) == pytest.approx((samples / RATE, samples / RATE))
    assert causal or (torch.cat(mels, dim=1) - whole).abs().max() <= 1e-5


def test_mel_in_blocks_equals_mel_at_once(monkeypatch) -> None:
    samples = noise(9.0)
    whole = WHISPER.clip(samples)
    monkeypatch.setattr(mel, "BLOCK", 400 * 7)
    assert (WHISPER.clip(samples) - whole).abs().max() <= 1e-6


def test_a_clip_shorter_than_half_a_window_is_continued_with_silence() -> None:
    samples = noise(0.01)[:150]
    padded = LogMel(hop=50).clip(torch.cat([samples, torch.zeros(51)]))[:, :3]
    assert (LogMel(hop=50).clip(samples) - padded).abs().max() <= 1e-6  # a product of another width rounds differently


@pytest.mark.parametrize("log_mel", [WHISPER, TINY, LogMel(mels=20, hop=200)], ids=["whisper", "tiny", "even"])
@pytest.mark.parametrize("blocks", [[1], [160, 3, 4000], [48000], [100000, 1]])
def test_a_running_mel_differs_from_the_clip_only_below_the_clips_floor(log_mel, blocks) -> None:
    samples = noise(6.9)
    whole, running, pieces = log_mel.clip(samples), RunningMel(log_mel), []
    if blocks == [1]:  # sample by sample around the mirrored start only
        samples = samples[:4200]
        whole = log_mel.clip(samples)
    done, turn = 0, 0
    while done < len(samples):
        step = blocks[turn % len(blocks)]
        running.feed(samples[done : done + step])
        done, turn = done + step, turn + 1
        pieces.append(running.take(running.ready))
    running.end()
    pieces.append(running.take(running.ready))
    live = torch.cat(pieces, dim=1)
    floor = whole.max() - 2.0
    assert live.shape == whole.shape
    assert (live.clamp(min=floor) - whole).abs().max() <= 1e-5
    peak = int(whole.max(dim=0).values.argmax())
    ends = torch.tensor([piece.shape[1] for piece in pieces]).cumsum(0)
    reached = int(ends[ends > peak][0]) - pieces[int((ends <= peak).sum())].shape[1]
    assert (live[:, reached:] - whole[:, reached:]).abs().max() <= 1e-5


def test_a_running_mel_gives_no_frame_before_its_window_is_complete() -> None:
    running = RunningMel(WHISPER)
    running.feed(noise(0.5)[: 160 * 10 + 199])
    assert running.ready == 10
    with pytest.raises(ValueError, match="11 mel frames requested, 10 ready"):
        running.take(11)
    running.feed(torch.zeros(1))
    assert running.ready == 11
    running.end()
    with pytest.raises(ValueError, match="after the end"):
        running.feed(torch.zeros(1))


def test_the_frame_shown_at_each_time_is_read(film) -> None:
    assert shown(film, fps=1.0) == [0, 4, 8, 12, 16, 20, 24, 28]
    assert shown(film, fps=4.0) == list(range(30))
    assert shown(film, fps=0.5, start=1.3, end=6.0) == [5, 13, 21]
    assert [time for time, _ in read_frames(film, fps=2.0, start=1.25, end=2.5)] == [1.25, 1.75, 2.25]


@settings(max_examples=60, deadline=None)
@given(
    gaps=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    fps=st.sampled_from([0.5, 1.0, 2.0, 3.0]),
    start=st.integers(0, 20),
    length=st.integers(1, 60),
)
def test_sampling_by_time_shows_the_last_frame_not_after_each_time(gaps, fps, start, length) -> None:
    times = [0, *np.cumsum(gaps).tolist()]  # tenths of a second
    timed = [(time / 10, (after - time) / 10, time) for time, after in pairwise([*times, times[-1] + 5])]
    until = min((start + length) / 10, times[-1] / 10 + 0.5)
    wanted = [start / 10 + index / fps for index in range(200)]
    expected = [(t, max(time for time in times if time / 10 <= t + 1e-3)) for t in wanted if t < until - 1e-3]
    found = list(sample_by_time(timed, fps, start / 10, (start + length) / 10))
    assert found == expected


def test_variable_frame_rates_are_read_by_timestamp(folder) -> None:
    times = [0.0, 0.1, 0.2, 2.9, 3.0, 3.05, 5.95, 6.2, 6.3]
    for suffix in ("mp4", "mkv"):
        path = write(folder / f"variable.{suffix}", times=times)
        assert shown(path, fps=1.0) == [0, 2, 2, 4, 5, 5, 6], suffix
        assert shown(path, fps=3.0, start=2.9, end=3.9) == [3, 5, 5], suffix


def test_a_container_that_begins_at_any_time_begins_at_zero(folder) -> None:
    path = write(folder / "broadcast.ts", times=ticks(6, 4), samples=tone(6, 500))
    assert shown(path, fps=1.0) == [0, 4, 8, 12, 16, 20]
    assert shown(path, fps=1.0, start=4.5) == [18, 22]
    assert len(read_audio(path, start=4.5, end=5.5)) == RATE


@pytest.mark.parametrize("ending", ["ts", "mkv", "mp4", "mov"])
@pytest.mark.parametrize("begin", [0.0, 1000.0, 95441.7, -2.0])  # 33 bits of 90 kHz wrap after 95443.7 s
def test_no_second_is_lost_wherever_a_clock_begins_or_wraps(folder, ending, begin) -> None:
    path = write(
        folder / f"clock{begin}.{ending}",
        times=[begin + time for time in ticks(6, 4)],
        samples=tone(6, 500),
        audio_from=lambda sample: sample + round(begin * RATE),
        options={"avoid_negative_ts": "disabled"},
    )
    first, seconds = (8, 4) if begin < 0 and ending in ("mp4", "mov") else (0, 6)  # an edit list begins at 0 there
    frames = shown(path, fps=1.0)
    assert (frames[0], frames[-1] // 4, abs(len(frames) - seconds) <= 1) == (first, 5, True)
    assert abs(len(read_audio(path)) / RATE - seconds) < 0.2
    assert probe(path, measure=True).seconds == pytest.approx(seconds, abs=0.2)


@pytest.mark.parametrize("ending", ["ts", "mpg", "ogg"])
def test_recordings_that_were_joined_go_on_where_the_clock_starts_again(folder, ending) -> None:
    """As ffmpeg, in both tracks, in a clip and in a pipe; the second recording is louder, and its frames brighter."""
    codec = {"ts": "aac", "mpg": "mp2", "ogg": "libopus"}[ending]
    parts = []
    for first, level in ((0, 0.1), (16, 1.0)):
        path = folder / f"part{first}.{ending}"
        grey = lambda index, first=first: np.full((64, 64, 3), 8 * (first + index), np.uint8)  # noqa: E731
        times = ticks(4, 4) if ending == "ts" else []
        parts.append(write(path, times=times, samples=level * tone(4, 500), codec=codec, picture=grey).read_bytes())
    joined = folder / f"joined.{ending}"
    joined.write_bytes(b"".join(parts))
    heard = read_audio(joined)
    assert abs(len(heard) / RATE - 8) < 0.3
    assert probe(joined, measure=True).seconds == pytest.approx(8, abs=0.3)
    loudness = [heard[second * RATE :][:RATE].abs().mean() for second in (1, 2, 5, 6)]
    assert min(loudness[2:]) > 5 * max(loudness[:2])
    assert read_audio(joined, start=5.0, end=6.0).abs().mean() == pytest.approx(float(loudness[2]), rel=0.02)
    if ending != "ts":
        return
    assert shown(joined, fps=1.0)[:8] == pytest.approx([0, 4, 8, 12, 16, 20, 24, 28], abs=1)
    assert shown(joined, fps=1.0, start=5.5, end=7.5) == pytest.approx([22, 26], abs=1)
    with joined.open("rb") as pipe:
        frames, audio = read_live(pipe, fps=1.0)
        live = list(LiveSource(frames, audio, options=SourceOptions(), geometry=geometry()))
    assert sum(segment.seconds for segment in live) == pytest.approx(8, abs=0.5)


def test_pictures_are_turned_upright(folder) -> None:
    def left_half_white(index: int) -> np.ndarray:
        return np.repeat(np.arange(64)[None, :, None] < 32, 64, axis=0).repeat(3, axis=2).astype(np.uint8) * 255

    path = write(folder / "upright.mp4", times=[0.0, 0.1], picture=left_half_white)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 64 << 16, 0, 1 << 30)
    path.write_bytes(content)  # as a telephone held upright writes it: to be turned clockwise by 90 degrees
    _, frame = next(iter(read_frames(path, fps=1.0)))
    assert frame[:, :28].min() > 200
    assert frame[:, 36:].max() < 50


def test_the_whole_track_is_heard_beyond_300_seconds(folder) -> None:
    samples = torch.cat([torch.zeros(305 * 4000), tone(5, 440, 4000)])
    heard = read_audio(write(folder / "long.wav", samples=samples, rate=4000, codec="pcm_s16le"))
    assert len(heard) == 310 * RATE
    assert heard[: 304 * RATE].abs().max() < 1e-3
    assert heard[306 * RATE : 309 * RATE].abs().max() > 0.29


def test_sound_of_any_rate_stays_in_place_and_channels_are_averaged(folder) -> None:
    channels = torch.stack([tone(3, 440, 44100), torch.zeros(3 * 44100)])
    heard = read_audio(write(folder / "stereo.wav", samples=channels, rate=44100, codec="pcm_s16le"))
    assert len(heard) == 3 * RATE
    assert (heard - tone(3, 440) / 2)[200:-200].abs().max() < 2e-3


def test_a_stretch_of_sound_equals_that_stretch_of_the_whole(film) -> None:
    whole = read_audio(film)
    assert abs(len(whole) / RATE - 8.1) < 0.1
    part = read_audio(film, start=2.3, end=5.1)
    assert len(part) == round(2.8 * RATE)
    assert (part - whole[round(2.3 * RATE) : round(5.1 * RATE)]).abs().max() < 1e-6


def test_a_clip_of_overlapping_codec_blocks_has_settled_at_its_start(folder) -> None:
    path = write(folder / "sound_only.m4a", samples=noise(8.1))
    whole = read_audio(path)
    for start in (2.05, 4.1, 5.555):
        part = read_audio(path, start=start)
        assert (part - whole[round(start * RATE) :]).abs().max() < 1e-6


def test_sound_whose_clock_goes_back_is_heard_once() -> None:
    def block(first: int, value: float) -> tuple[float, av.AudioFrame]:
        frame = av.AudioFrame.from_ndarray(np.full((1, 1600), value, np.float32), format="fltp", layout="mono")
        frame.sample_rate = RATE
        return first / RATE, frame

    heard = contiguous([block(0, 0.1), block(1600, 0.2), block(0, 0.9), block(3200, 0.3)], RATE)
    assert np.concatenate(list(heard)).reshape(3, 1600).mean(axis=1).tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_holes_in_the_sound_and_a_late_start_are_silence(folder) -> None:
    def with_holes(sample: int) -> int:
        return sample + RATE // 2 + (RATE if sample >= 32 * 1024 else 0)  # late, and with a second of nothing

    path = write(folder / "hole.mkv", times=ticks(6, 4), samples=tone(4, 500), audio_from=with_holes, codec="pcm_s16le")
    heard, hole = read_audio(path), 32 * 1024 + RATE // 2
    assert len(heard) == round(5.5 * RATE)
    assert heard[: RATE // 2 - 20].abs().max() < 1e-3
    assert heard[hole : hole + RATE].abs().max() < 1e-3
    assert (heard[hole + RATE :] - tone(4, 500)[32 * 1024 :]).abs().max() < 1e-3


def cut(path: Path, fraction: float) -> Path:
    content = path.read_bytes()
    shortened = path.with_stem(f"{path.stem}_cut")
    shortened.write_bytes(content[: int(len(content) * fraction)])
    return shortened


def with_cover(path: Path) -> Path:
    """Sound with a picture of its cover."""
    with av.open(str(path), "w") as container:
        audio = container.add_stream("aac", rate=RATE, layout="mono")
        cover = container.add_stream("mjpeg", rate=1)
        cover.width = cover.height = 32
        cover.pix_fmt, cover.disposition = "yuvj420p", av.stream.Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        container.mux(cover.encode(picture.reformat(format="yuvj420p")))
        container.mux(cover.encode(None))
        frame = av.AudioFrame.from_ndarray(tone(1, 440)[None].numpy(), format="fltp", layout="mono")
        frame.sample_rate = RATE
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    return path


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str, str]]:
    """name: (file, expected reason, what the message says)."""
    folder = tmp_path_factory.mktemp("broken")
    whole = write(folder / "whole.mp4", times=ticks(20, 4), samples=noise(20), options={"movflags": "+faststart"})
    matroska = write(folder / "whole.mkv", times=ticks(20, 4), samples=noise(20))
    flash = write(folder / "whole.flv", times=ticks(20, 4), samples=noise(20))
    sound = write(folder / "sound.wav", samples=noise(2), codec="pcm_s16le")
    index_last = write(folder / "index_last.mp4", times=ticks(4, 4), samples=noise(4))
    (folder / "zero.mp4").touch()
    os.mkfifo(folder / "pipe.mp4")
    (folder / "letter.mp4").write_text("Dear reader, this is no film.\n" * 50)
    return {
        "missing": (folder / "nowhere.mp4", "missing", "check the path"),
        "a folder": (folder, "missing", "is a folder"),
        "a pipe": (folder / "pipe.mp4", "unreadable", "standard input"),
        "a device": (Path("/dev/null"), "unreadable", "standard input"),
        "zero bytes": (folder / "zero.mp4", "empty", "zero bytes"),
        "text": (folder / "letter.mp4", "unreadable", "cannot be read"),
        "mp4 cut before its index": (cut(index_last, 0.7), "truncated", "lacks its last"),
        "mp4 cut after its index": (cut(whole, 0.5), "truncated", "copy or convert"),
        "mkv cut": (cut(matroska, 0.5), "truncated", "copy or convert"),
        "flv cut": (cut(flash, 0.5), "truncated", "copy or convert"),
        "wav cut": (cut(sound, 0.5), "truncated", "lacks its last"),
        "no video": (sound, "no_video", "no video track"),
        "cover art": (with_cover(folder / "cover.mp4"), "no_video", "no video track"),
        "no audio": (write(folder / "silent.mp4", times=ticks(2, 4)), "no_audio", "no audio track"),
    }


def test_a_file_that_cannot_be_used_raises_one_named_line(broken, capfd) -> None:
    for case, (path, reason, words) in broken.items():
        with pytest.raises(MediaError, match=words) as raised:
            list(FileSource(path, options=SourceOptions(), geometry=geometry()))
        assert (raised.value.reason, raised.value.path) == (reason, path), case
        assert str(raised.value).startswith(str(path)), case
        assert "\n" not in str(raised.value), case
    assert capfd.readouterr().err == ""


def test_a_truncated_box_of_more_than_32_bits_is_noticed(tmp_path) -> None:
    path = tmp_path / "huge.mp4"
    path.write_bytes(struct.pack(">I4s8s", 16, b"ftyp", b"isom") + struct.pack(">I4sQ", 1, b"mdat", 1 << 33))
    with pytest.raises(MediaError, match="lacks its last 8,589,934,576 bytes") as raised:
        probe(path)
    assert raised.value.reason == "truncated"


def test_each_track_of_a_truncated_file_is_noticed(broken) -> None:
    for name in ("mkv cut", "flv cut"):
        path = broken[name][0]
        with pytest.raises(MediaError, match="video ends at") as video:
            list(read_frames(path, fps=1.0))
        with pytest.raises(MediaError, match=r"audio ends at|decoding failed") as audio:
            read_audio(path)
        assert (video.value.reason, audio.value.reason) == ("truncated", "truncated")
        assert shown(path, fps=1.0, end=3.0) == [0, 4, 8]  # what comes before the cut can be used
        assert len(read_audio(path, end=3.0)) == 3 * RATE


def test_a_clip_beyond_the_end_or_without_length_is_empty(film) -> None:
    for start, end in ((20.0, None), (3.0, 3.0), (4.0, 2.0)):
        with pytest.raises(MediaError, match="check start and end") as video:
            list(read_frames(film, fps=1.0, start=start, end=end))
        with pytest.raises(MediaError, match="check start and end") as audio:
            read_audio(film, start=start, end=end)
        assert (video.value.reason, audio.value.reason) == ("empty", "empty")


def test_damaged_bytes_raise_nothing_but_a_media_error(film, tmp_path) -> None:
    content = film.read_bytes()
    refused = 0
    for seed in range(12):
        draw = np.random.default_rng(seed)
        damaged = bytearray(content)
        for place in draw.integers(len(content) // 20, len(content), 40):
            damaged[place] = draw.integers(256)
        path = tmp_path / f"{seed}.mp4"
        path.write_bytes(damaged)
        try:
            list(FileSource(path, options=SourceOptions(), geometry=geometry()))
        except MediaError:
            refused += 1
    assert refused > 0


def seconds_of(segments: list[Segment]) -> list[tuple[float, float]]:
    return [(segment.start, segment.seconds) for segment in segments]


def test_segments_end_on_frame_grids_and_audio_blocks(film) -> None:
    source = FileSource(film, options=SourceOptions(), geometry=geometry())
    segments = list(source)
    *whole, rest = segments
    assert seconds_of(whole) == [(0.0, 2.0), (2.0, 2.0), (4.0, 2.0), (6.0, 2.0)]
    assert all(segment.frames is not None and len(segment.frames) == 2 for segment in whole)
    assert all(segment.mel is not None and segment.mel.shape == (64, 8) for segment in whole)
    assert (rest.frames, rest.mel.shape) == (None, (64, 1))
    heard = len(read_audio(film)) / RATE
    assert (source.seconds, source.frames_seen, source.audio_seconds_heard) == pytest.approx((heard, 8, heard))


def test_the_mel_of_segments_is_the_mel_of_the_clip(film) -> None:
    for start, end in ((0.0, None), (1.5, 6.2)):
        source = FileSource(film, options=SourceOptions(), geometry=geometry(WHISPER), start=start, end=end)
        pieces = [segment.mel for segment in source if segment.mel is not None]
        whole = WHISPER.clip(read_audio(film, start=start, end=end))
        assert (torch.cat(pieces, dim=1) - whole).abs().max() <= 1e-5
        assert {piece.shape[1] for piece in pieces[:-1]} == {200}


def test_no_more_of_the_mel_is_held_of_a_long_file_than_of_a_short_one(folder) -> None:
    largest = []
    for seconds in (40, 160):
        path = write(folder / f"{seconds}.wav", samples=0.1 * noise(seconds), codec="pcm_s16le")
        segments = FileSource(path, options=SourceOptions(tracks="audio"), geometry=geometry(WHISPER))
        mels = [segment.mel for segment in segments if segment.mel is not None]
        assert sum(mel.shape[1] for mel in mels) == 100 * seconds
        largest.append(max(mel.untyped_storage().nbytes() for mel in mels))
    assert largest[1] < 1.5 * largest[0], "a segment is a view of what was made with it: a block, not the clip"


@pytest.mark.parametrize(("held", "readings"), [(1 << 25, 1), (100_000, 2), (0, 2)])
def test_a_clip_in_pieces_is_the_clip_whether_or_not_its_spectrogram_is_held(monkeypatch, held, readings) -> None:
    monkeypatch.setattr("omnimem.media.mel.HELD", held)
    samples = noise(7.3) * torch.linspace(0.2, 1.0, int(7.3 * RATE))  # the maximum comes late
    blocks = samples.split(9001)
    whole, read = WHISPER.clip(samples), []

    def reading() -> list[torch.Tensor]:
        read.append(1)
        return list(blocks)

    pieces = list(WHISPER.pieces(reading, 150))
    assert len(read) == readings
    assert [piece.shape[1] for piece in pieces] == [150] * 4 + [130]
    assert (torch.cat(pieces, dim=1) - whole).abs().max() <= 1e-5
    assert list(WHISPER.pieces(list, 150)) == []


def test_a_clip_begins_its_own_clock(film) -> None:
    whole = list(FileSource(film, options=SourceOptions(tracks="video"), geometry=geometry()))
    clip = list(FileSource(film, options=SourceOptions(tracks="video"), geometry=geometry(), start=4.0, end=7.0))
    assert seconds_of(clip) == [(0.0, 2.0), (2.0, 1.0)]
    assert torch.equal(clip[0].frames, whole[2].frames)
    assert torch.equal(clip[1].frames, whole[3].frames[:1])


def test_the_longer_track_goes_on_alone(folder) -> None:
    sound_goes_on = write(folder / "sound_goes_on.mkv", times=ticks(3, 4), samples=noise(6.5), codec="pcm_s16le")
    source = FileSource(sound_goes_on, options=SourceOptions(), geometry=geometry())
    lacking = [(segment.frames is None, segment.mel is None) for segment in source]
    assert lacking == [(False, False)] * 2 + [(True, False)] * 2
    assert (source.seconds, source.frames_seen, source.audio_seconds_heard) == (6.5, 3, 6.5)
    picture_goes_on = write(folder / "picture_goes_on.mkv", times=ticks(6, 4), samples=noise(2.5), codec="pcm_s16le")
    segments = list(FileSource(picture_goes_on, options=SourceOptions(), geometry=geometry()))
    assert [segment.mel is None for segment in segments] == [False, False, True]
    assert seconds_of(segments)[-1] == (4.0, 2.0)


def test_tracks_choose_what_is_read_and_another_file_can_sound(film, folder) -> None:
    silent = write(folder / "with_other_sound.mp4", times=ticks(4, 4))
    sound = write(folder / "other.wav", samples=noise(4), codec="pcm_s16le")
    both = list(FileSource(silent, sound, options=SourceOptions(), geometry=geometry()))
    alone = list(FileSource(sound, options=SourceOptions(tracks="audio"), geometry=geometry()))
    assert all(torch.equal(a.mel, b.mel) for a, b in zip(both, alone, strict=True))
    assert all(segment.frames is None for segment in alone)
    assert all(s.mel is None for s in FileSource(film, options=SourceOptions(tracks="video"), geometry=geometry()))


def test_frames_are_resized_to_whole_cells_under_the_pixel_cap(folder) -> None:
    path = write(folder / "large.mp4", times=ticks(2, 4), size=(240, 320))
    options = SourceOptions(tracks="video", max_pixels=20000)
    segment = next(iter(FileSource(path, options=options, geometry=geometry())))
    raw = torch.stack([frame for _, frame in read_frames(path, fps=1.0)])
    assert segment.frames.shape == (2, 3, 112, 140)
    assert torch.equal(segment.frames, resize(raw, 112, 140))


def test_a_live_stream_gives_the_frames_and_after_its_maximum_the_mel_of_the_file(film) -> None:
    for log_mel in (TINY, WHISPER):
        file = list(FileSource(film, options=SourceOptions(), geometry=geometry(log_mel)))
        tracks = read_frames(film, fps=4.0), iter(read_audio(film).split(777))
        source = LiveSource(*tracks, options=SourceOptions(), geometry=geometry(log_mel))
        live = list(source)
        assert seconds_of(live) == seconds_of(file)
        assert all(torch.equal(a.frames, b.frames) for a, b in zip(live, file, strict=True) if a.frames is not None)
        assert [a.frames is None for a in live] == [b.frames is None for b in file]
        peaks = [segment.mel.max().item() for segment in file]
        loudest = peaks.index(max(peaks))
        assert 0 < loudest < len(file) - 1  # else the test would show nothing
        floor = max(peaks) - 2.0  # 8 below the maximum, on Whisper's scale
        for index, (a, b) in enumerate(zip(live, file, strict=True)):
            assert (a.mel.clamp(min=floor) - b.mel).abs().max() <= 1e-5
            if index >= loudest:
                assert (a.mel - b.mel).abs().max() <= 1e-5
        assert not torch.equal(live[0].mel, file[0].mel)
        assert source.frames_seen == 8


def test_a_live_segment_comes_as_soon_as_both_tracks_cover_it() -> None:
    pulled = {"frames": 0.0, "audio": 0.0}

    def camera() -> Iterator[tuple[float, Tensor]]:
        for index in range(33):
            pulled["frames"] = index / 4
            yield index / 4, torch.full((3, 56, 56), index, dtype=torch.uint8)

    def microphone() -> Iterator[Tensor]:
        for index in range(85):
            pulled["audio"] = (index + 1) / 10
            yield noise(0.1, seed=index)

    source = LiveSource(camera(), microphone(), options=SourceOptions(), geometry=geometry(WHISPER))
    for segment in source:
        if segment.start < 8.0:
            assert segment.frames is not None
            assert segment.frames[:, 0, 0, 0].tolist() == [4 * segment.start, 4 * segment.start + 4]
            assert pulled["frames"] == segment.start + 1.0  # its last frame, no later one
            assert pulled["audio"] == pytest.approx(segment.start + 2.1)  # half a window past its end, in tenths
    assert source.seconds == 9.0


def test_frames_of_a_segment_are_not_held_in_their_own_size() -> None:
    """A segment may have hundreds of frames, of any size."""
    frames, alive = list[weakref.ref[Tensor]](), []

    def camera() -> Iterator[tuple[float, Tensor]]:
        for index in range(32):
            frame = torch.full((3, 224, 224), index, dtype=torch.uint8)
            frames.append(weakref.ref(frame))
            alive.append(sum(each() is not None for each in frames))
            yield index / 8, frame

    options = SourceOptions(tracks="video", fps=8.0, max_pixels=3136)
    first, second = LiveSource(camera(), None, options=options, geometry=geometry())
    assert first.frames.shape == second.frames.shape == (16, 3, 56, 56)
    assert max(alive) <= 4


def test_a_pipe_that_is_still_written_gives_the_frames_and_the_sound_of_the_file(folder) -> None:
    path = write(folder / "piped.ts", times=ticks(20, 4), samples=noise(20))
    content = path.read_bytes()
    reader, writer = os.pipe()
    first_segment_came = threading.Event()
    half_was_enough = []

    def camera() -> None:
        with os.fdopen(writer, "wb") as out:
            out.write(content[: len(content) // 2])
            out.flush()
            half_was_enough.append(first_segment_came.wait(20))
            out.write(content[len(content) // 2 :])

    thread = threading.Thread(target=camera)
    thread.start()
    live: list[Segment] = []
    with os.fdopen(reader, "rb") as pipe:
        frames, audio = read_live(pipe, fps=1.0)
        for segment in LiveSource(frames, audio, options=SourceOptions(), geometry=geometry()):
            live.append(segment)
            first_segment_came.set()
        thread.join()
    file = list(FileSource(path, options=SourceOptions(), geometry=geometry()))
    floor = max(segment.mel.max().item() for segment in file) - 2.0
    assert half_was_enough == [True]
    assert seconds_of(live) == seconds_of(file)
    for a, b in zip(live, file, strict=True):
        assert (a.frames is None) == (b.frames is None)
        assert a.frames is None or torch.equal(a.frames, b.frames)
        assert (a.mel.clamp(min=floor) - b.mel).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:6.0,\n{film}\n#EXT-X-ENDLIST\n"),
        ("list.ffconcat", "ffconcat version 1.0\nfile {film}\n"),
        ("session.sdp", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"),
        ("text.txt", "plain text\n" * 200),
    ],
)
def test_playlists_sessions_and_text_are_refused_in_files_and_pipes(film, tmp_path, name, content) -> None:
    path = tmp_path / name
    path.write_text(content.format(film=film.name))
    (tmp_path / film.name).write_bytes(film.read_bytes())
    with pytest.raises(MediaError, match="cannot be read") as file:
        probe(path)
    with path.open("rb") as pipe, pytest.raises(MediaError, match="cannot be read") as piped:
        read_live(pipe, fps=1.0)
    assert (file.value.reason, piped.value.reason) == ("unreadable", "unreadable")
    refused = {"list.m3u8": "hls", "list.ffconcat": "concat", "session.sdp": "sdp"}.get(name)
    for error in (file.value, piped.value):
        assert (f"its format {refused} is not read" in str(error)) == (refused is not None)


@pytest.mark.parametrize(
    ("error", "blamed"),
    [
        (ValueError("bad"), True),
        (OverflowError("big"), True),
        (AttributeError("none"), True),
        (av.error.OSError(errno.EIO, "demuxers say so too"), True),
        (PermissionError(errno.EACCES, "denied"), True),
        (MemoryError(), False),
        (OSError(errno.ENOSPC, "disk full"), False),
        (OSError(errno.EIO, "broken disk"), False),
        (av.error.OSError(errno.EMFILE, "too many files"), False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), False),
    ],
)
def test_errors_are_of_the_file_unless_they_are_of_the_machine(film, monkeypatch, error, blamed) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    expected = MediaError if blamed else type(error)
    monkeypatch.setattr("omnimem.media.decode.upright", broken)
    monkeypatch.setattr("omnimem.media.live.upright", broken)
    with pytest.raises(expected):
        list(read_frames(film, fps=1.0))
    with film.open("rb") as pipe, pytest.raises(expected):
        list(read_live(pipe, fps=1.0)[0] or ())
    monkeypatch.setattr("omnimem.media.container.av.open", broken)
    with pytest.raises(expected):
        probe(film)


def test_the_default_track_is_read_then_the_one_with_most_channels(tmp_path) -> None:
    def hertz(*tracks: tuple[int, str, bool]) -> int:
        path = tmp_path / "tracks.mkv"
        with av.open(str(path), "w", options={"default_mode": "passthrough"}) as container:
            streams = [container.add_stream("pcm_s16le", rate=RATE, layout=layout) for _, layout, _ in tracks]
            for stream, (_, _, default) in zip(streams, tracks, strict=True):
                stream.disposition = Disposition.default if default else Disposition(0)
            for stream, (tuning, layout, _) in zip(streams, tracks, strict=True):
                wave = (tone(1, tuning) * 32767).short().repeat_interleave(stream.channels)[None]
                frame = av.AudioFrame.from_ndarray(wave.numpy(), format="s16", layout=layout)
                frame.sample_rate, frame.pts = RATE, 0
                container.mux(stream.encode(frame))
                container.mux(stream.encode(None))
        return int(np.abs(np.fft.rfft(read_audio(path).numpy()[:RATE])).argmax())

    assert hertz((2000, "stereo", False), (440, "mono", True)) == 440
    assert hertz((2000, "mono", False), (440, "stereo", False)) == 440
    assert hertz((440, "mono", False), (2000, "mono", False)) == 440
    assert hertz((2000, "mono", False), (440, "7.1", False)) == 440


@pytest.mark.parametrize(
    ("ending", "codec"),
    [(".mp3", "libmp3lame"), (".aiff", "pcm_s16be"), (".au", "pcm_s16be"), (".caf", "pcm_s16le"), (".w64", "pcm_s16le"),
     (".wv", "wavpack"), (".tta", "tta"), (".flac", "flac"), (".asf", "aac")],
)  # fmt: skip
def test_sound_cut_before_its_declared_length_is_truncated(tmp_path, ending, codec) -> None:
    whole = write(tmp_path / f"whole{ending}", samples=noise(8, rate=44100), rate=44100, codec=codec)
    assert len(read_audio(whole)) == pytest.approx(8 * RATE, abs=0.1 * RATE)
    with pytest.raises(MediaError) as raised:
        read_audio(cut(whole, 0.6))
    assert raised.value.reason == "truncated"


@pytest.mark.parametrize("ending", [".mkv", ".mp4", ".flv", ".mov"])
def test_one_picture_with_sound_is_not_truncated(tmp_path, ending) -> None:
    path = write(tmp_path / f"still{ending}", times=[0.0], samples=noise(8, rate=44100), rate=44100)
    assert len(list(read_frames(path, fps=1.0))) >= 1
    assert len(read_audio(path)) == pytest.approx(8 * RATE, abs=0.1 * RATE)


def test_timestamps_that_jump_by_days_are_refused(film) -> None:
    with av.open(str(film)) as container:
        frames = list(container.decode(audio=0))[:3]
        frames[2].pts = 10**12
        with pytest.raises(ValueError, match="timestamps jump from"):
            list(timed_audio(frames, container))
