"""Made files, the same bytes to decode on every machine, on which our layout is compared with Qwen2_5OmniProcessor."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from omnimem.media import FileSource, Geometry, SourceOptions, read_audio, read_frames
from omnimem.tokens import Tracks

RATE, NATIVE = 16000, 4  # samples and frames per second
HEIGHT, WIDTH, PIXELS = 50, 90, (3 * 28 * 28, 4 * 28 * 28)  # above the limit
QUESTION = "what colour was the star ?"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A file of `frames` frames at NATIVE per second and `samples` audio samples, read at `fps`."""

    name: str
    frames: int
    samples: int
    fps: float

    @property
    def tracks(self) -> Tracks:
        return "both" if self.frames and self.samples else "video" if self.frames else "audio"


CASES = (
    Case(name="equal", frames=24, samples=6 * RATE, fps=1.0),
    Case(name="odd_samples", frames=24, samples=6 * RATE + 1, fps=1.0),
    Case(name="audio_longer", frames=16, samples=116_803, fps=1.0),
    Case(name="audio_shorter", frames=32, samples=51_437, fps=1.0),
    Case(name="audio_longer_by_a_token", frames=24, samples=6 * RATE + 800, fps=2.0),
    Case(name="two_frames_a_second", frames=21, samples=80_079, fps=2.0),
    Case(name="half_a_frame_a_second", frames=32, samples=8 * RATE, fps=0.5),
    Case(name="no_audio", frames=20, samples=0, fps=1.0),
    Case(name="no_audio_odd_frames", frames=10, samples=0, fps=2.0),
    Case(name="no_audio_half_a_frame", frames=40, samples=0, fps=0.5),
    Case(name="audio_alone", frames=0, samples=69_921, fps=1.0),
    Case(name="short_audio", frames=8, samples=330, fps=1.0),
    Case(name="audio_longer_by_1_s", frames=16, samples=5 * RATE, fps=2.0),
    Case(name="audio_longer_by_3_s_odd", frames=10, samples=5 * RATE + RATE // 2 + 7, fps=1.0),
    Case(name="audio_shorter_by_1_s", frames=24, samples=5 * RATE, fps=2.0),
    Case(name="audio_shorter_by_2_s", frames=24, samples=4 * RATE, fps=1.0),
    Case(name="audio_shorter_by_3_s_odd", frames=30, samples=4 * RATE + RATE // 2 - 3, fps=2.0),
    Case(name="half_a_frame_audio_shorter", frames=48, samples=5 * RATE + 79, fps=0.5),
    Case(name="half_a_frame_audio_longer", frames=16, samples=7 * RATE, fps=0.5),
)


def write_case(case: Case, folder: Path) -> Path:
    """Lossless codecs only: what is decoded does not depend on the version of an encoder."""
    path, draw = folder / f"{case.name}.mkv", np.random.default_rng(sum(map(ord, case.name)))
    with av.open(str(path), "w") as container:
        video = container.add_stream("ffv1", rate=NATIVE) if case.frames else None
        audio = container.add_stream("pcm_s16le", rate=RATE, layout="mono") if case.samples else None
        if video is not None:
            video.height, video.width, video.pix_fmt = HEIGHT, WIDTH, "bgr0"
            for _ in range(case.frames):
                pixels = draw.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
                pixels[: HEIGHT // 2, : WIDTH // 3], pixels[HEIGHT // 2 :, : WIDTH // 3] = 0, 255
                container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="bgr0")))
            container.mux(video.encode(None))
        if audio is not None:
            swell = np.sin(np.arange(case.samples) / 20_000) ** 2
            samples = (draw.integers(-12_000, 12_000, case.samples) * swell).astype(np.int16)
            for first in range(0, case.samples, 1024):
                block = np.ascontiguousarray(samples[None, first : first + 1024])
                frame = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = RATE, first, Fraction(1, RATE)
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return path


def decoded(case: Case, path: Path) -> tuple[Tensor | None, Tensor | None]:
    """The frames at `fps` and the waveform, from which both sides start."""
    frames = torch.stack([frame for _, frame in read_frames(path, fps=case.fps)]) if case.frames else None
    return frames, read_audio(path) if case.samples else None


def source(case: Case, path: Path, geometry: Geometry) -> FileSource:
    options = SourceOptions(fps=case.fps, min_pixels=PIXELS[0], max_pixels=PIXELS[1], tracks=case.tracks)
    return FileSource(path, options=options, geometry=geometry)


def summary(name: str, values: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Shape, and about 4,000 values: all of them would be megabytes."""
    yield f"{name}.shape", torch.tensor(values.shape)
    flat = values.flatten()
    yield f"{name}.values", flat[:: max(1, len(flat) // 4001)].clone()
