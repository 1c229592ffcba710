"""Rendering of picture worlds: emoji on moving textures, speech of espeak-ng and flite over noise, as an mp4 file.

Rendering is a function of the world, the font and the versions of both synthesizers. The three media sets share no
rendering of a picture (its angle in degrees and its size in pixels are congruent to the number of the set modulo 3)
and no voice.
"""

import shutil
import subprocess
import wave
from collections.abc import Callable
from functools import cache, lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from omnimem.errors import UserError
from omnimem.extras import optional
from omnimem.recall.pictures import GLYPHS, MEDIA, Media, PictureWorld, Scene, Word
from omnimem.recall.renderer import MP4_FRAME_RATE, SAMPLE_RATE, Bytes, Floats, write_stream

Image = optional("PIL.Image")
ImageDraw = optional("PIL.ImageDraw")
ImageFont = optional("PIL.ImageFont")

EDITION = 1  # version of the rendering; data sets of different editions must not be mixed
SIZE = 224  # pixels along a side of a frame
PERIOD = 256  # pixels after which a texture repeats
FONT_SIZE = 109  # the only size of the font's bitmaps
FONTS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts", "~/Library/Fonts")
FONT = "NotoColorEmoji.ttf"
SIDES = (64, 104)  # of a picture, in pixels
TURN = 24  # degrees

RGB: dict[str, tuple[int, int, int]] = {
    **{"red": (200, 60, 60), "green": (70, 150, 80), "blue": (70, 100, 190), "yellow": (215, 200, 90)},
    **{"purple": (140, 80, 160), "orange": (220, 140, 60), "white": (225, 225, 225), "brown": (130, 95, 65)},
}


class ToolError(UserError):
    """A program or a font of the operating system that is not installed; the message says how to install it."""


# ---------------------------------------------------------------------------------------------------------------- video


def render_frames(world: PictureWorld, fps: float, start: float, end: float) -> Bytes:
    """The frames at start, start + 1/fps, ... before `end`: uint8 [frames, 3, 224, 224]."""
    count = max(0, int(np.ceil((end - start) * fps - 1e-6)))
    frames = np.empty((count, 3, SIZE, SIZE), np.uint8)
    for number in range(count):
        time = start + number / fps
        scene = next(each for each in reversed(world.scenes) if each.start <= time + 1e-9)
        frames[number] = _frame(scene, world.media, time - scene.start)
    return frames


def _frame(scene: Scene, media: Media, time: float) -> Bytes:
    """The frame at `time` seconds after the cut: a window that moves over the texture, and the picture on it."""
    # 1. the background
    rng = np.random.default_rng([scene.seed, 1])
    place, speed = rng.uniform(0, PERIOD, 2), rng.uniform(-12, 12, 2)
    top, left = (int(each) % PERIOD for each in place + speed * time)
    frame = _texture(scene.seed, scene.texture, scene.colours)[:, top : top + SIZE, left : left + SIZE].copy()
    if scene.picture is None:
        return frame.astype(np.uint8)
    # 2. the picture, whose centre drifts within its corner
    glyph = _picture(scene.seed, scene.picture, MEDIA.index(media))
    height, width = glyph.shape[1:]
    centre = np.array(divmod(scene.corner, 2)) * SIZE // 2 + SIZE // 4
    drift, slack = rng.uniform(-3, 3, 2) * time, np.maximum(0, SIZE // 4 - np.array([height, width]) / 2)
    offset = np.clip(rng.uniform(-8, 8, 2) + drift, -slack - 4, slack + 4)
    row, column = (centre + offset - np.array([height, width]) / 2).astype(int).clip(0, (SIZE - height, SIZE - width))
    patch, alpha = frame[:, row : row + height, column : column + width], glyph[3:] / 255
    patch += alpha * (glyph[:3] - patch)
    return frame.astype(np.uint8)


@lru_cache(maxsize=8)
def _picture(seed: int, name: str, number: int) -> Floats:
    """A picture with its opacity, mirrored, resized, turned and brightened: float32 [4, height, width] in 0..255."""
    rng = np.random.default_rng([seed, 2])
    angle = _congruent(rng, -TURN, TURN, number)
    side = _congruent(rng, *SIDES, number)
    image = _glyph(GLYPHS[name])
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = side / max(image.size)
    image = image.resize([max(1, round(scale * each)) for each in image.size], Image.Resampling.LANCZOS)
    image = image.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1).copy()
    pixels[:3] = np.clip(pixels[:3] * rng.uniform(0.7, 1.2), 0, 255)
    return pixels


def _congruent(rng: np.random.Generator, low: int, high: int, number: int) -> int:
    """A random whole number from low to high that is congruent to `number` modulo the number of media sets."""
    choices = [each for each in range(low, high + 1) if each % len(MEDIA) == number]
    return int(rng.choice(choices))


@lru_cache(maxsize=256)
def _glyph(character: str) -> Any:
    """A character of the emoji font, cropped to what is drawn.

    Raises ToolError when the font is not installed or lacks the character.
    """
    canvas = Image.new("RGBA", (2 * FONT_SIZE, 2 * FONT_SIZE))
    font = ImageFont.truetype(str(font_file()), FONT_SIZE)
    ImageDraw.Draw(canvas).text((20, 20), character, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise ToolError(
            f"{font_file()}: does not draw {character!r}; install the current font (fonts-noto-color-emoji)"
        )
    return canvas.crop(box)


@lru_cache(maxsize=1)
def font_file() -> Path:
    """The emoji font; raises ToolError when it is not installed."""
    for folder in FONTS:
        found = sorted(Path(folder).expanduser().rglob(FONT))
        if found:
            return found[0]
    raise ToolError(f"the font {FONT} is not installed; apt install fonts-noto-color-emoji")


@lru_cache(maxsize=8)
def _texture(seed: int, name: str, colours: tuple[str, str]) -> Floats:
    """Two tiles of a texture in both directions: float32 [3, 512, 512]."""
    # 1. the pattern, 0..1, with a period of PERIOD pixels
    rng = np.random.default_rng([seed, 3])
    ramp = np.arange(PERIOD) * 2 * np.pi / PERIOD
    y, x = np.meshgrid(ramp, ramp, indexing="ij")
    pattern = PATTERNS[name](rng, y, x)
    # 2. blend both colours, with a little noise
    low, high = (np.array(RGB[colour], np.float32)[:, None, None] * rng.uniform(0.6, 1.1) for colour in colours)
    tile = low + pattern.astype(np.float32) * (high - low) + rng.normal(0, 4, (1, PERIOD, PERIOD)).astype(np.float32)
    return np.tile(np.clip(tile, 0, 255), (1, 2, 2)).astype(np.float32)


Plane = npt.NDArray[np.float64]


def _stripes(rng: np.random.Generator, y: Plane, x: Plane) -> Plane:
    waves = [(5, 0), (0, 5), (5, 5), (5, -5), (8, 3), (3, 8), (9, 0)][int(rng.integers(7))]
    return (np.sin(waves[0] * y + waves[1] * x) > 0).astype(np.float64)


def _brick(rng: np.random.Generator, y: Plane, x: Plane) -> Plane:
    rows = int(rng.choice([8, 16]))
    row = np.floor(y / (2 * np.pi) * rows)
    along = (x / (2 * np.pi) * rows / 2 + 0.5 * (row % 2)) % 1
    return ((along > 0.08) & ((y / (2 * np.pi) * rows) % 1 > 0.15)).astype(np.float64)


def _filtered(rng: np.random.Generator, rows: float, columns: float) -> Plane:
    """Noise smoothed over `rows` and `columns` pixels, scaled to 0..1."""
    fy, fx = np.fft.fftfreq(PERIOD)[:, None], np.fft.rfftfreq(PERIOD)[None]
    gain = np.exp(-2 * np.pi**2 * ((rows * fy) ** 2 + (columns * fx) ** 2))
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((PERIOD, PERIOD))) * gain, s=(PERIOD, PERIOD))
    return np.clip(0.5 + noise / (4 * noise.std()), 0, 1)


def _grass(rng: np.random.Generator, y: Plane, x: Plane) -> Plane:
    return _filtered(rng, 8, 0.8)


def _clouds(rng: np.random.Generator, y: Plane, x: Plane) -> Plane:
    return _filtered(rng, 14, 14)


def _sand(rng: np.random.Generator, y: Plane, x: Plane) -> Plane:
    return _filtered(rng, 0.7, 0.7)


def _waves(rng: np.random.Generator, y: Plane, x: Plane) -> Plane:
    return 0.5 + 0.5 * np.sin(int(rng.integers(5, 9)) * y + 2 * np.sin(int(rng.integers(2, 5)) * x))


def _dots(rng: np.random.Generator, y: Plane, x: Plane) -> Plane:
    count = int(rng.integers(5, 10))
    return (np.cos(count * y) + np.cos(count * x) > 0.8).astype(np.float64)


def _tiles(rng: np.random.Generator, y: Plane, x: Plane) -> Plane:
    count = int(rng.integers(3, 6))
    return ((np.sin(count * y) > 0) ^ (np.sin(count * x) > 0)).astype(np.float64)


PATTERNS: dict[str, Callable[[np.random.Generator, Plane, Plane], Plane]] = {
    "stripes": _stripes,
    "brick": _brick,
    "grass": _grass,
    "waves": _waves,
    "dots": _dots,
    "clouds": _clouds,
    "sand": _sand,
    "tiles": _tiles,
}

# ---------------------------------------------------------------------------------------------------------------- audio

VOICES: dict[Media, tuple[str, ...]] = {
    "fit": (
        *("en-us+m1", "en-us+f1", "en-us+m7", "en-gb+m3", "en-gb+f2", "en-gb-x-rp+m4", "en-gb-scotland", "en-us+f5"),
        *("flite:kal16", "flite:rms", "flite:slt"),
    ),
    "adapter": ("en-us+m2", "en-us+f3", "en-gb+m8", "en-us", "en-gb+f4", "flite:awb"),
    "test": ("en-us+m3", "en-gb+m5", "en-us+f4", "en-gb+f1"),
}
BABBLERS = ("en-gb+m6", "en-gb+f5", "en-us+klatt3")  # of the noise "voices"; they speak no word of a stream
SENTENCES = (
    "I have never been to this part of the town before, but my friends told me so much about it.",
    "If you turn left after the old church, you will find the place that we talked about.",
    "They would rather stay at home and read than go out again in such a cold and rainy night.",
)
LEVEL = 0.1  # root mean square of a word; full scale is 1
SIGNAL_TO_NOISE = (15.0, 25.0)  # decibels
LONGEST = 0.95  # seconds of a word
EDGE = 0.02  # seconds of fade


def render_audio(world: PictureWorld, start: int, end: int) -> Floats:
    """The audio of the seconds [start, end): mono float32 samples at 16 kHz in [-1, 1]."""
    samples = np.zeros((end - start) * SAMPLE_RATE, np.float32)
    for scene in world.scenes:
        first, last = max(start, scene.start), min(end, scene.start + scene.seconds)
        if first < last:
            whole = _scene_audio(scene, world.media)
            part = whole[(first - scene.start) * SAMPLE_RATE : (last - scene.start) * SAMPLE_RATE]
            samples[(first - start) * SAMPLE_RATE : (last - start) * SAMPLE_RATE] = part
    return np.clip(samples, -1, 1)


@lru_cache(maxsize=4)
def _scene_audio(scene: Scene, media: Media) -> Floats:
    rng = np.random.default_rng([scene.seed, 4])
    loudness = LEVEL * 10 ** (-rng.uniform(*SIGNAL_TO_NOISE) / 20)
    noise = NOISES[scene.noise](rng, scene.seconds * SAMPLE_RATE)
    samples = _faded(loudness * noise / np.sqrt((noise**2).mean())).astype(np.float32)
    for word in scene.words:
        spoken, begin = _utterance(rng, word, media)
        begin += (word.at - scene.start) * SAMPLE_RATE
        samples[begin : begin + len(spoken)] += spoken
    return samples


def _utterance(rng: np.random.Generator, word: Word, media: Media) -> tuple[Floats, int]:
    """A word by a voice of the set, and the sample of its second at which it starts."""
    voice = VOICES[media][int(rng.integers(len(VOICES[media])))]
    spoken = speak(voice, word.text) * np.float32(rng.uniform(0.8, 1.25))
    return spoken, int(rng.integers(SAMPLE_RATE - len(spoken) + 1))


def _faded(samples: Plane) -> Plane:
    count = int(EDGE * SAMPLE_RATE)
    ramp = np.linspace(0, 1, count)
    samples[:count] *= ramp
    samples[-count:] *= ramp[::-1]
    return samples


@cache
def speak(voice: str, text: str) -> Floats:
    """A word at 16 kHz, without the silence around it, at most LONGEST seconds; `flite:NAME` is a voice of flite.

    Raises ToolError when the synthesizer is not installed.
    """
    samples = _synthesized(voice, text)
    loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
    samples = samples[loud[0] : loud[-1] + 1][: int(LONGEST * SAMPLE_RATE)]
    samples = _faded(samples * LEVEL / np.sqrt((samples**2).mean()))
    return samples.astype(np.float32)


def _synthesized(voice: str, text: str) -> Plane:
    engine, _, name = voice.rpartition(":")
    program, package = ("flite", "flite") if engine else ("espeak-ng", "espeak-ng")
    if shutil.which(program) is None:
        raise ToolError(f"{program} is not installed; apt install {package}")
    if engine:
        command = [program, "-voice", name, "-t", text, "-o", "/dev/stdout"]
    else:
        command = [program, "-v", name, "-s", "150", "--stdout", text]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode or not done.stdout:
        reason = done.stderr.decode(errors="replace").strip().splitlines() or ["no output"]
        raise ToolError(f"{' '.join(command)}: {reason[0]}; install {package} with its English voices")
    with wave.open(BytesIO(done.stdout)) as file:
        rate = file.getframerate()
    data = done.stdout[done.stdout.index(b"data") + 8 :]
    samples = np.frombuffer(data[: len(data) // 2 * 2], "<i2").astype(np.float64) / 32768
    return _resampled(samples, rate)


def _resampled(samples: Plane, rate: int) -> Plane:
    """At SAMPLE_RATE, through the Fourier transform; padded, so that the end does not wrap to the start."""
    padded = np.pad(samples, (0, rate - len(samples) % rate))
    count = len(padded) // rate * SAMPLE_RATE
    spectrum = np.fft.rfft(padded)
    return np.fft.irfft(spectrum[: count // 2 + 1], count) * count / len(padded)


@cache
def _track(voice: str) -> Plane:
    """All sentences by one voice."""
    return np.concatenate([_synthesized(voice, sentence) for sentence in SENTENCES])


def _voices(rng: np.random.Generator, count: int) -> Plane:
    tracks = [_track(voice) for voice in BABBLERS]
    return np.sum([np.resize(np.roll(track, int(rng.integers(len(track)))), count) for track in tracks], axis=0)


def _coloured(rng: np.random.Generator, count: int, low: float, high: float) -> Plane:
    """Noise between two frequencies in Hz, with soft edges."""
    hertz = np.maximum(np.fft.rfftfreq(count, 1 / SAMPLE_RATE), 1)
    gain = 1 / np.sqrt((1 + (low / hertz) ** 4) * (1 + (hertz / high) ** 4))
    return np.fft.irfft(np.fft.rfft(rng.standard_normal(count)) * gain, count)


def _rain(rng: np.random.Generator, count: int) -> Plane:
    drops = _coloured(rng, count, 3000, 7000) * (1 + 6 * (rng.random(count) < 0.002))
    return drops + 0.3 * _coloured(rng, count, 800, 4000)


def _wind(rng: np.random.Generator, count: int) -> Plane:
    time = np.arange(count) / SAMPLE_RATE
    gust = 1 + 0.6 * np.sin(2 * np.pi * rng.uniform(0.2, 0.5) * time + rng.uniform(0, 6))
    return gust * _coloured(rng, count, 80, rng.uniform(300, 600))


def _harmonics(rng: np.random.Generator, count: int, hertz: float, tilt: float) -> Plane:
    time = np.arange(count) / SAMPLE_RATE
    parts = range(1, int(3000 / hertz))
    return np.sum([np.sin(2 * np.pi * hertz * n * time + rng.uniform(0, 6)) / n**tilt for n in parts], axis=0)


def _hum(rng: np.random.Generator, count: int) -> Plane:
    return _harmonics(rng, count, float(rng.uniform(95, 130)), 1.5)


def _engine(rng: np.random.Generator, count: int) -> Plane:
    time = np.arange(count) / SAMPLE_RATE
    beat = 1 + 0.8 * np.sin(2 * np.pi * rng.uniform(8, 16) * time)
    return beat * (_harmonics(rng, count, float(rng.uniform(35, 60)), 0.8) + 0.5 * _coloured(rng, count, 100, 900))


def _static(rng: np.random.Generator, count: int) -> Plane:
    return _coloured(rng, count, 20, 7500)


NOISES: dict[str, Callable[[np.random.Generator, int], Plane]] = {
    "rain": _rain,
    "wind": _wind,
    "voices": _voices,
    "hum": _hum,
    "engine": _engine,
    "static": _static,
}

# ----------------------------------------------------------------------------------------------------------------- file


def write_pictures(world: PictureWorld, path: Path, frame_rate: int = MP4_FRAME_RATE) -> None:
    """Write the world as H.264 and AAC in an mp4 file."""

    def frames(start: int, end: int) -> Bytes:
        return render_frames(world, frame_rate, start, end)

    def samples(start: int, end: int) -> Floats:
        return render_audio(world, start, end)

    write_stream(path, world.seconds, frames, samples, size=SIZE, frame_rate=frame_rate)
