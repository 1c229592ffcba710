"""Small files that ask for much time or memory are refused from their header, or after what was decoded so far."""

import struct
import time
import wave
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from support.fuzzing import peak_bytes, reset_peak

from omnimem.limits import RAISED
from omnimem.media import MediaError
from omnimem.media.decode import read_audio_blocks, read_frames


def wav(path: Path, rate: int, seconds: int = 3000) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(rate)
        file.writeframes(bytes(min(seconds * rate, 200_000)))
    return path


def png(path: Path, side: int) -> Path:
    """A picture of one colour, compressed to a few kB."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1 + 3 * side)) for _ in range(side)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", packed), chunk(b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def video(path: Path, times: list[int], side: int = 32, last: int = 0) -> Path:
    """Frames at these seconds; the last one is shown for `last` seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=1, width=side, height=side)
        stream.time_base = Fraction(1, 1)
        packets = []
        for at in times:
            frame = av.VideoFrame.from_ndarray(np.zeros((side, side, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = at, Fraction(1, 1)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        for packet in packets:
            if packet is packets[-1] and last:
                packet.duration = last
            container.mux(packet)
    return path


def audio_with_gaps(path: Path, gap: int, blocks: int) -> Path:
    """Blocks of 1024 samples at 16 kHz, with so many seconds between them."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        for block in range(blocks):
            frame = av.AudioFrame.from_ndarray(np.ones((1, 1024), np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts = 16000, block * (gap * 16000 + 1024)
            frame.time_base = Fraction(1, 16000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def frames_of(path: Path) -> int:
    return sum(1 for _ in read_frames(path, fps=1.0))


def audio_of(path: Path) -> int:
    return sum(len(block) for block in read_audio_blocks(path))


SPREAD = [number * 20_000 for number in range(20)]  # seconds
BOMBS: dict[str, tuple[str, Callable[[Path], Path], Callable[[Path], int]]] = {
    "wav of 1 Hz": ("resampling|sparse_seconds", lambda at: wav(at / "a.wav", 1), audio_of),
    "wav of 10 Hz": ("resampling", lambda at: wav(at / "a.wav", 10), audio_of),
    "large picture": ("frame_pixels", lambda at: png(at / "a.png", 16_000), frames_of),
    "a frame of a million seconds": (
        "sparse_seconds",
        lambda at: video(at / "a.mkv", [0, 1], last=1_000_000),
        frames_of,
    ),
    "gaps between frames": (
        "sparse_seconds",
        lambda at: video(at / "a.mkv", [n * 20_000 for n in range(20)]),
        frames_of,
    ),
    "gaps between frames of mp4": ("sparse_seconds", lambda at: video(at / "a.mp4", SPREAD), frames_of),
    "gaps in the audio": ("sparse_seconds", lambda at: audio_with_gaps(at / "a.mkv", 20_000, 40), audio_of),
    "gaps in the audio of nut": ("sparse_seconds", lambda at: audio_with_gaps(at / "a.nut", 20_000, 40), audio_of),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_cannot_ask_for_much(name, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv(RAISED, raising=False)
    known, write, read = BOMBS[name]
    clean = video(tmp_path / "clean.mkv", list(range(10)))
    frames_of(clean)
    path = write(tmp_path)
    reset_peak()
    frames_of(clean)
    most, began = 2 * peak_bytes(), time.monotonic()
    reset_peak()
    with pytest.raises(MediaError, match=known) as refused:
        read(path)
    assert peak_bytes() <= most
    assert time.monotonic() - began < 30
    assert "--limit" in str(refused.value)


def test_what_cameras_and_recorders_write_is_read(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv(RAISED, raising=False)
    assert frames_of(video(tmp_path / "still.mkv", [0, 1], last=600)) == 601
    assert frames_of(video(tmp_path / "slides.mp4", [0, 300, 900])) >= 900
    assert audio_of(wav(tmp_path / "telephone.wav", 8000, 2)) == 32_000
    assert frames_of(png(tmp_path / "a.png", 2000)) == 1
    monkeypatch.setenv(RAISED, "sparse_seconds=20000")
    assert frames_of(video(tmp_path / "raised.mkv", [0, 7000])) >= 7000
