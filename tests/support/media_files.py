"""Small media files: images, videos of given frames, and audio."""

from pathlib import Path
from typing import Any

import av
import numpy as np

CODECS = {".png": ("png", "rgb24"), ".bmp": ("bmp", "bgr24"), ".jpg": ("mjpeg", "yuvj444p")}


def write_frames(path: Path, codec: str, layout: str, frames: list[np.ndarray], rate: int = 1, **how: Any) -> None:
    with av.open(str(path), "w", **how) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], layout
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode(None))


def write_image(path: Path, frame: np.ndarray) -> None:
    write_frames(path, *CODECS[path.suffix], [frame], format="image2")


def write_wav(path: Path, samples: np.ndarray) -> None:
    """Mono, 16 kHz, 32-bit floats."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("pcm_f32le", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
        frame.sample_rate = 16000
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
