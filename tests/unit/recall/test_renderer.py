"""What a world looks and sounds like, from its pixels and its spectrum, before and after H.264 and AAC."""

from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from omnimem.recall.renderer import (
    CELL,
    EDITION,
    RGB,
    SAMPLE_RATE,
    SPRITE,
    masks,
    render_audio,
    render_frames,
    voice_partials,
    voice_waves,
    word_partials,
    word_waves,
    write_mp4,
)
from omnimem.recall.worlds import COLOURS, GRID, SHAPES, VOICES, WORDS, World, WorldOptions, draw_world

WORLD = draw_world(5, 24, WorldOptions(stray_rate=0.5))


@pytest.fixture(scope="module")
def mp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("renderer") / "world.mp4"
    write_mp4(WORLD, path)
    return path


def decode(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Frames [frames, 3, height, width] and samples of a file, by PyAV alone."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with av.open(str(path)) as container:
        samples = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
    return np.stack(frames).transpose(0, 3, 1, 2), np.concatenate(samples)


def symbol_in(frame: np.ndarray, cell: int) -> tuple[str, str]:
    """The shape and colour that match a cell best, tried at every position: a decoder that knows no world."""
    row, column = (CELL * i for i in divmod(cell, GRID))
    templates = masks().reshape(len(SHAPES), -1)
    templates = templates - templates.mean(axis=1, keepdims=True)
    templates /= np.linalg.norm(templates, axis=1, keepdims=True)
    best = (-np.inf, "", "")
    for top in range(row, row + CELL - SPRITE + 1):
        for left in range(column, column + CELL - SPRITE + 1):
            patch = frame[:, top : top + SPRITE, left : left + SPRITE].reshape(3, -1).astype(float)
            for colour in COLOURS:
                near = 1 - np.clip(abs(patch - np.array(RGB[colour])[:, None]).max(axis=0) / 110, 0, 1)
                scores = templates @ (near - near.mean())
                best = max(best, (scores.max(), SHAPES[scores.argmax()], colour))
    return best[1:]


def heard(samples: np.ndarray, second: int) -> tuple[str, str]:
    """The voice and the word whose partials are strongest in a second of sound."""
    wave = samples[second * SAMPLE_RATE : (second + 1) * SAMPLE_RATE]

    def power(hertz: float, start: float, end: float) -> float:
        time = np.arange(int(start * SAMPLE_RATE), int(end * SAMPLE_RATE)) / SAMPLE_RATE
        piece = wave[int(start * SAMPLE_RATE) : int(end * SAMPLE_RATE)] * np.hanning(len(time))
        return abs((piece * np.exp(-2j * np.pi * hertz * time)).mean())

    voices = [sum(power(hertz, 0.1, 0.9) for hertz in voice_partials(i)) for i in range(len(VOICES))]
    words = [
        sum(power(hertz, 0.125 + p / 4, 0.375 + p / 4) for p, hertz in enumerate(word_partials(i)))
        for i in range(len(WORDS))
    ]
    return VOICES[int(np.argmax(voices))], WORDS[int(np.argmax(words))]


def shown_symbols(world: World, frames: np.ndarray, rate: int) -> list[tuple[bool, int]]:
    """For each second of each symbol: whether it is recognised in the frame of that second."""
    seen = []
    for event in world.events:
        for second, cell in zip(event.span, event.cells, strict=True):
            seen.append((symbol_in(frames[second * rate], cell) == (event.shape, event.colour), second))
    return seen


def test_every_symbol_is_recognised_after_h264(mp4) -> None:
    symbols = shown_symbols(WORLD, decode(mp4)[0], 4)
    assert all(right for right, _ in symbols)


def test_every_voice_and_word_is_recognised_before_and_after_aac(mp4) -> None:
    rendered, decoded = render_audio(WORLD), decode(mp4)[1]
    assert len(WORLD.utterances) >= 5
    for spoken in WORLD.utterances:
        assert heard(rendered, spoken.at) == (spoken.voice, spoken.word)
        assert heard(decoded, spoken.at) == (spoken.voice, spoken.word)


def test_the_same_world_gives_the_same_file_and_another_seed_another(mp4, tmp_path) -> None:
    again, other = tmp_path / "again.mp4", tmp_path / "other.mp4"
    write_mp4(WORLD, again)
    write_mp4(draw_world(6, 24), other)
    assert again.read_bytes() == mp4.read_bytes()
    assert other.read_bytes() != mp4.read_bytes()


def test_the_edition_is_raised_when_pictures_or_sounds_change() -> None:
    scene = replace(draw_world(0, 16, WorldOptions()), events=(), flickers=(), utterances=())
    means = (render_frames(scene).mean(), 1000 * masks().mean(), 1000 * render_audio(scene).std())
    sounds = (1000 * voice_waves(SAMPLE_RATE).std(), 1000 * word_waves(SAMPLE_RATE).std())
    recorded = {1: (99.975, 470.05, 49.871, 110.590, 76.681)}  # edition: the numbers of its worlds
    assert (*means, *sounds) == pytest.approx(recorded[EDITION], abs=0.01)
