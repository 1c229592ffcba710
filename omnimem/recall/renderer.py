"""Rendering of recall worlds: video frames, audio samples, and both as an mp4 file.

Rendering is a pure function of the world, so a part of a stream can be rendered alone and equals the same part of the
whole. Video: scenes of moving, nearly grey waves; one symbol at a time in a cell of a 4 x 4 grid, a static logo,
flickering cells. Audio: one-second utterances over babble; an utterance is a voice (three sustained partials below
1.3 kHz) plus a word (three syllables, each one partial above 1.3 kHz).
"""

from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache, lru_cache
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

from omnimem.recall.worlds import GRID, SHAPES, VOICES, WORDS, Event, Flicker, World

EDITION = 1  # version of the rendering; data sets of different editions must not be mixed
FRAME_SIZE = 112  # pixels along a side of a frame
CELL = FRAME_SIZE // GRID
SPRITE = 24  # pixels along a side of a symbol; the margin of its cell lets it move
SAMPLE_RATE = 16000
MP4_FRAME_RATE = 4  # frames per second: enough for motion, and fast to encode

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

RGB: dict[str, tuple[int, int, int]] = {
    "red": (215, 15, 25),
    "green": (15, 165, 35),
    "blue": (25, 50, 235),
    "yellow": (252, 228, 15),
    "purple": (150, 25, 190),
    "orange": (250, 128, 0),
    "white": (252, 252, 252),
    "cyan": (0, 212, 228),
}

# ---------------------------------------------------------------------------------------------------------------- video


def render_frames(world: World, fps: float = 1.0, start: float = 0.0, end: float | None = None) -> Bytes:
    """The frames shown at start, start + 1/fps, … before `end` (the end of the stream): uint8 [frames, 3, 112, 112].

    A frame at time t shows the cells of second floor(t); pan and symbols move in between.
    """
    # 1. frame times
    stop = world.seconds if end is None else end
    count = max(0, int(np.ceil((stop - start) * fps - 1e-6)))
    times = start + np.arange(count) / fps
    if count == 0:
        return np.empty((0, 3, FRAME_SIZE, FRAME_SIZE), np.uint8)
    # 2. background, logo, flicker, symbols
    frames = _background(world, times)
    _paint(frames, slice(None), world.logo_cell, _logo(world.seed))
    for flicker in world.flickers:
        shown = _shown(times, flicker.at, flicker.at + 1)
        if shown.stop > shown.start:
            _paint(frames, shown, flicker.cell, _flicker(flicker))
    for event in world.events:
        _draw_event(frames, times, event, world.seed)
    return (frames + 0.5).astype(np.uint8)  # all values are inside [0, 255] by construction


def _shown(times: npt.NDArray[np.float64], start: float, end: float) -> slice:
    """The frames with start <= time < end."""
    first, last = np.searchsorted(times, (start - 1e-9, end - 1e-9))
    return slice(int(first), int(last))


def _background(world: World, times: npt.NDArray[np.float64]) -> Floats:
    """Travelling waves of each scene: float32 [frames, 3, height, width] between 25 and 165."""
    frames = np.empty((len(times), 3, FRAME_SIZE, FRAME_SIZE), np.float32)
    cuts = [at for at, _ in world.scenes] + [world.seconds + 1]
    for (at, seed), until in zip(world.scenes, cuts[1:], strict=True):
        shown = _shown(times, at, until)
        if shown.stop > shown.start:
            frames[shown] = _scene(seed, times[shown] - at)
    return frames


def _scene(seed: int, times: npt.NDArray[np.float64]) -> Floats:
    """base + Σ_k tint_k cos(k·(x + pan t) + ω t + φ), each of three waves with its own length, direction and speed."""
    # 1. draw the waves
    rng = np.random.default_rng([seed, 1])
    base = rng.uniform(80, 108) + rng.uniform(-8, 8, size=3)
    pan = rng.uniform(-14, 14, size=2)  # pixels per second
    length, angle = rng.uniform(24, 120, size=3), rng.uniform(0, 2 * np.pi, size=3)
    speed, phase = rng.uniform(-0.5, 0.5, size=3), rng.uniform(0, 2 * np.pi, size=3)
    tint = rng.uniform(9, 13, size=(3, 1)) + rng.uniform(-2.5, 2.5, size=(3, 3))
    # 2. sum them
    wave = 2 * np.pi / length[:, None] * np.stack([np.sin(angle), np.cos(angle)], axis=1)
    ramp = np.arange(FRAME_SIZE)
    drift = (wave @ pan + speed)[:, None] * times + phase[:, None]
    rows = (drift[:, :, None] + wave[:, 0, None, None] * ramp).astype(np.float32)  # waves frames height
    columns = (wave[:, 1, None] * ramp).astype(np.float32)[:, None, :]  # waves 1 width
    # cos(a + b) as products, so that cosines are computed along rows and columns only
    left = np.stack([np.cos(rows), -np.sin(rows)], axis=-1)  # waves frames height 2
    right = np.stack([np.cos(columns), np.sin(columns)], axis=-2)  # waves 1 2 width
    mixed = np.einsum("kc,kn->cn", tint.astype(np.float32), (left @ right).reshape(3, -1))
    mixed = mixed.reshape(3, len(times), FRAME_SIZE, FRAME_SIZE) + base.astype(np.float32)[:, None, None, None]
    return mixed.transpose(1, 0, 2, 3)


def _paint(frames: Floats, shown: slice, cell: int, patch: Floats) -> None:
    """Fill `cell` of the shown frames with a [3, CELL, CELL] patch."""
    row, column = (CELL * i for i in divmod(cell, GRID))
    frames[shown, :, row : row + CELL, column : column + CELL] = patch


@lru_cache(maxsize=16)
def _logo(seed: int) -> Floats:
    """A mirrored pattern of two muted colours, constant during a stream."""
    rng = np.random.default_rng([seed, 2])
    half = rng.random((7, 4)) < 0.5
    pattern = np.concatenate([half, half[:, 2::-1]], axis=1)
    ink, paper = rng.uniform(120, 220, size=3), rng.uniform(20, 90, size=3)
    return _blocks(np.where(pattern, ink[:, None, None], paper[:, None, None]))


def _flicker(flicker: Flicker) -> Floats:
    """A random mosaic."""
    return _blocks(np.random.default_rng([flicker.seed, 3]).uniform(0, 255, size=(3, 4, 4)))


def _blocks(mosaic: npt.NDArray[np.float64]) -> Floats:
    """A square mosaic enlarged to a cell."""
    size = CELL // mosaic.shape[1]
    return mosaic.repeat(size, axis=1).repeat(size, axis=2).astype(np.float32)


def _draw_event(frames: Floats, times: npt.NDArray[np.float64], event: Event, seed: int) -> None:
    """Blend the symbol into its cell of each second; between whole seconds it moves up and down by a pixel."""
    alpha = masks()[SHAPES.index(event.shape)]
    colour = np.array(RGB[event.colour], np.float32)[:, None, None]
    nudge = np.random.default_rng([seed, 4, event.start]).integers(-1, 2, size=2)
    for second, cell in zip(event.span, event.cells, strict=True):
        shown = _shown(times, second, second + 1)
        for frame in range(shown.start, shown.stop):
            bob = int(np.rint(np.sin(2 * np.pi * (times[frame] - second))))
            row, column = divmod(cell, GRID)
            top = CELL * row + (CELL - SPRITE) // 2 + int(nudge[0]) + bob
            left = CELL * column + (CELL - SPRITE) // 2 + int(nudge[1])
            patch = frames[frame, :, top : top + SPRITE, left : left + SPRITE]
            patch += alpha * (colour - patch)


@cache
def masks() -> Floats:
    """Coverage of each pixel by each shape, averaged over 8 x 8 points per pixel: [shapes, SPRITE, SPRITE]."""
    fine = 8 * SPRITE
    ramp = (np.arange(fine) + 0.5) / fine * 2 - 1
    y, x = np.meshgrid(ramp, ramp, indexing="ij")
    inside = np.stack([_inside(shape, x, y) for shape in SHAPES]).astype(np.float32)
    return inside.reshape(len(SHAPES), SPRITE, 8, SPRITE, 8).mean(axis=(2, 4))


Plane = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

OUTLINES: dict[str, tuple[tuple[float, float], ...]] = {
    "triangle": ((0, -0.95), (1, 0.9), (-1, 0.9)),
    "cross": (
        *((-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3)),
        *((0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)),
    ),
    "arrow": ((-1, -0.28), (0, -0.28), (0, -0.85), (1, 0), (0, 0.85), (0, 0.28), (-1, 0.28)),
    "diamond": ((0, -0.75), (1, 0), (0, 0.75), (-1, 0)),
    "bolt": ((0.35, -1), (-0.75, 0.2), (-0.05, 0.2), (-0.35, 1), (0.75, -0.25), (0.05, -0.25), (0.75, -1)),
    "house": (
        *((0, -1), (1, -0.1), (0.72, -0.1), (0.72, 1), (0.25, 1), (0.25, 0.3)),
        *((-0.25, 0.3), (-0.25, 1), (-0.72, 1), (-0.72, -0.1), (-1, -0.1)),
    ),
    "hourglass": ((-0.85, -1), (0.85, -1), (0.12, 0), (0.85, 1), (-0.85, 1), (-0.12, 0)),
    "tree": (
        *((0, -1), (0.6, -0.35), (0.3, -0.35), (0.9, 0.45), (0.17, 0.45), (0.17, 1)),
        *((-0.17, 1), (-0.17, 0.45), (-0.9, 0.45), (-0.3, -0.35), (-0.6, -0.35)),
    ),
    "star": tuple(
        (radius * np.sin(np.pi * i / 5), -radius * np.cos(np.pi * i / 5)) for i, radius in enumerate((1.05, 0.42) * 5)
    ),
}


def _inside(shape: str, x: Plane, y: Plane) -> Mask:
    """Whether a point of [-1, 1]² belongs to the shape; y points down."""
    radius = np.hypot(x, y)
    match shape:
        case "circle":
            return radius < 0.78
        case "square":
            return np.maximum(abs(x), abs(y)) < 0.94
        case "ring":
            return (radius < 1) & (radius > 0.55)
        case "moon":
            return (radius < 1) & (np.hypot(x - 0.5, y + 0.1) > 0.78)
        case "heart":
            u, v = 1.2 * x, 0.15 - 1.2 * y
            return (u**2 + v**2 - 1) ** 3 < u**2 * v**3
        case "ladder":
            rails = (abs(abs(x) - 0.62) < 0.17) & (abs(y) < 1)
            rungs = (abs(x) < 0.62) & (abs((y + 1) % 0.66 - 0.33) < 0.13)
            return rails | rungs
        case "wave":
            return abs(abs(y - 0.25 * np.sin(2 * np.pi * x)) - 0.45) < 0.2
        case _:
            return _in_polygon(OUTLINES[shape], x, y)


def _in_polygon(corners: tuple[tuple[float, float], ...], x: Plane, y: Plane) -> Mask:
    """Even-odd rule: a ray to the right crosses the outline an odd number of times."""
    inside = np.zeros(x.shape, bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if y0 != y1:
            inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return inside


# ---------------------------------------------------------------------------------------------------------------- audio

VOICE_LEVEL = 0.10  # amplitude of one partial; full scale is 1
WORD_LEVEL = 0.14
BABBLE_LEVEL = 0.05  # root mean square
SYLLABLES = 3
LETTERS = 4  # partials to choose from; any two of 16 names differ in at least 2 of 3 choices
FADE = 0.04  # seconds


def render_audio(world: World, rate: int = SAMPLE_RATE, start: int = 0, end: int | None = None) -> Floats:
    """The audio of the seconds [start, end): mono float32 samples in [-1, 1]."""
    stop = world.seconds if end is None else end
    samples = _babble(world.seed, start, stop, rate)
    for spoken in world.utterances:
        if start <= spoken.at < stop:
            loudness = np.random.default_rng([world.seed, 5, spoken.at]).uniform(0.8, 1.25)
            wave = voice_waves(rate)[VOICES.index(spoken.voice)] + word_waves(rate)[WORDS.index(spoken.word)]
            samples[(spoken.at - start) * rate : (spoken.at - start + 1) * rate] += np.float32(loudness) * wave
    return np.clip(samples, -1, 1)


def code(index: int) -> tuple[int, int, int]:
    """Three choices among four letters for each of 16 names: (a, b, a + b mod 4) differs in two places or more."""
    first, second = divmod(index, LETTERS)
    return first, second, (first + second) % LETTERS


def voice_partials(index: int) -> tuple[float, ...]:
    """Frequencies in Hz of a voice, one in each of three bands below 1.3 kHz, sustained during the utterance."""
    return tuple(190 + 92.0 * (LETTERS * band + letter) for band, letter in enumerate(code(index)))


def word_partials(index: int) -> tuple[float, ...]:
    """Frequency in Hz of each syllable, from 1.55 to 6.2 kHz; frequencies of different syllables differ."""
    return tuple(1550 * 4 ** ((SYLLABLES * letter + place) / 11) for place, letter in enumerate(code(index)))


@cache
def voice_waves(rate: int) -> Floats:
    """One second of each voice with its own tremolo rate: [voices, rate]."""
    time = np.arange(rate) / rate
    envelope = _envelope(time, 0.08, 0.92)
    waves = [
        envelope
        * (1 + 0.25 * np.sin(2 * np.pi * (5 + 0.5 * index) * time))
        * sum(np.sin(2 * np.pi * hertz * time + place) for place, hertz in enumerate(voice_partials(index)))
        for index in range(len(VOICES))
    ]
    return (VOICE_LEVEL * np.stack(waves)).astype(np.float32)


@cache
def word_waves(rate: int) -> Floats:
    """One second of each word: [words, rate]. Syllables are centred at 0.25, 0.5 and 0.75 s, like mel frames."""
    time = np.arange(rate) / rate
    waves = [
        sum(
            _envelope(time, 0.25 * place + 0.125, 0.25 * place + 0.375) * np.sin(2 * np.pi * hertz * time)
            for place, hertz in enumerate(word_partials(index))
        )
        for index in range(len(WORDS))
    ]
    return (WORD_LEVEL * np.stack(waves)).astype(np.float32)


def _envelope(time: Plane, start: float, end: float) -> Plane:
    """1 inside [start, end], 0 outside, with raised-cosine edges of FADE seconds inside."""
    rise = np.clip(np.minimum(time - start, end - time) / FADE, 0, 1)
    return 0.5 - 0.5 * np.cos(np.pi * rise)


def _babble(seed: int, start: int, end: int, rate: int) -> Floats:
    """Overlapping one-second grains of noise, each with its own random formants."""
    first, last = 2 * start - 1, 2 * end  # grain g fills the second that begins at g / 2
    grains = _grains(seed, range(first, last), rate)
    half = rate // 2
    halves = grains.reshape(last - first, 2, half)
    return (halves[:-1, 1] + halves[1:, 0]).reshape(-1)


def _grains(seed: int, numbers: range, rate: int) -> Floats:
    """Grains under a sine window (equal power where two overlap): [grains, rate]."""
    # 1. draw formants and noise
    bands = 24
    draws = [np.random.default_rng([seed, 6, number + 1]) for number in numbers]
    formants = np.stack([rng.standard_normal(bands, np.float32) for rng in draws])
    noise = np.stack([rng.standard_normal(rate + 2, np.float32) for rng in draws])
    # 2. shape the spectrum
    hertz = np.fft.rfftfreq(rate, 1 / rate)
    band = np.clip(np.log2(np.maximum(hertz, 60) / 60) / np.log2(8000 / 60), 0, 1) * (bands - 1)
    low = np.minimum(band.astype(np.int64), bands - 2)
    part = (band - low).astype(np.float32)
    gain = np.exp(0.7 * ((1 - part) * formants[:, low] + part * formants[:, low + 1]))
    gain *= ((np.maximum(hertz, 60) / 60) ** -0.5 * (hertz < 7600)).astype(np.float32)
    gain *= BABBLE_LEVEL * rate / np.sqrt(4 * (gain**2).sum(axis=1, keepdims=True))
    window = np.sin(np.pi * (np.arange(rate, dtype=np.float32) + 0.5) / rate)
    return np.fft.irfft(gain * noise.view(np.complex64), n=rate, axis=1).astype(np.float32) * window


# ----------------------------------------------------------------------------------------------------------------- file

BLOCK = 8  # seconds rendered at a time
VIDEO_CRF = 23
AUDIO_BITS = 64_000


def write_mp4(world: World, path: Path) -> None:
    """Write a recall world with 4 frames per second (`write_stream`)."""

    def frames(start: int, end: int) -> Bytes:
        return render_frames(world, MP4_FRAME_RATE, start, end)

    def samples(start: int, end: int) -> Floats:
        return render_audio(world, SAMPLE_RATE, start, end)

    write_stream(path, world.seconds, frames, samples)


def write_stream(
    path: Path,
    seconds: int,
    frames: Callable[[int, int], Bytes],
    samples: Callable[[int, int], Floats],
    *,
    size: int = FRAME_SIZE,
    frame_rate: int = MP4_FRAME_RATE,
) -> None:
    """Write H.264 (crf 23, yuv420p) and AAC (64 kb/s), rendered and encoded block by block.

    `frames` and `samples` give those of the seconds [start, end): uint8 [frames, 3, size, size] and float32 at 16 kHz.
    Each encoder uses one thread, so that equal library versions write equal bytes.
    """
    with av.open(str(path), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=frame_rate)
        video.width = video.height = size
        video.pix_fmt = "yuv420p"
        video.thread_count = 1
        video.gop_size = BLOCK * frame_rate
        # x264's macroblock tree is not deterministic for frames this small
        video.options = {"crf": str(VIDEO_CRF), "preset": "veryfast", "mbtree": "0"}
        audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        audio.bit_rate = AUDIO_BITS
        for start in range(0, seconds, BLOCK):
            end = min(start + BLOCK, seconds)
            for video_frame in _video_frames(frames(start, end), start * frame_rate, frame_rate):
                container.mux(video.encode(video_frame))
            for audio_frame in _audio_frames(samples(start, end), start * SAMPLE_RATE):
                container.mux(audio.encode(audio_frame))
        container.mux(video.encode(None))
        container.mux(audio.encode(None))


def _video_frames(frames: Bytes, first: int, frame_rate: int) -> Iterator[av.VideoFrame]:
    for number, pixels in enumerate(frames.transpose(0, 2, 3, 1), first):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        frame.pts, frame.time_base = number, Fraction(1, frame_rate)
        yield frame


def _audio_frames(samples: Floats, first: int) -> Iterator[av.AudioFrame]:
    """Audio in frames of 1,024 samples, as the AAC encoder requires; BLOCK seconds are a whole number of them."""
    for offset in range(0, len(samples), 1024):
        frame = av.AudioFrame.from_ndarray(samples[None, offset : offset + 1024], format="fltp", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        frame.pts, frame.time_base = first + offset, Fraction(1, SAMPLE_RATE)
        yield frame
