"""Rendering of picture worlds: parts equal the whole, media sets are disjoint, missing tools are one line."""

import shutil
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from omnimem.recall import pictures_renderer as renderer
from omnimem.recall.pictures import MEDIA, NOISES, TEXTURES, draw_pictures
from omnimem.recall.pictures_renderer import BABBLERS, SIZE, VOICES, ToolError, render_audio, render_frames

RATE = renderer.SAMPLE_RATE


@pytest.fixture
def tools(monkeypatch) -> None:
    """A square as every picture and a tone as every word: neither font nor synthesizer is needed."""
    image = pytest.importorskip("PIL.Image")

    def glyph(character: str):
        return image.new("RGBA", (100, 80), (255, 255, 255, 255))

    def tone(voice: str, text: str) -> np.ndarray:
        return np.sin(np.arange(RATE // 2) * (0.1 + len(text) / 50))

    monkeypatch.setattr(renderer, "_glyph", glyph)
    monkeypatch.setattr(renderer, "_synthesized", tone)
    for cached in (renderer._picture, renderer.speak, renderer._track, renderer._scene_audio):
        cached.cache_clear()
    yield
    for cached in (renderer._picture, renderer.speak, renderer._track, renderer._scene_audio):
        cached.cache_clear()


@pytest.mark.usefixtures("tools")
def test_a_part_rendered_alone_equals_the_same_part_of_the_whole() -> None:
    world = draw_pictures(1, 12, "test")
    frames, samples = render_frames(world, 2, 0, 12), render_audio(world, 0, 12)
    assert frames.shape == (24, 3, SIZE, SIZE)
    assert samples.shape == (12 * RATE,)
    assert np.abs(samples).max() <= 1
    for start, end in ((0, 5), (5, 8), (8, 12)):
        assert np.array_equal(render_frames(world, 2, start, end), frames[2 * start : 2 * end])
        assert np.array_equal(render_audio(world, start, end), samples[start * RATE : end * RATE])


@pytest.mark.usefixtures("tools")
def test_the_picture_is_in_its_corner_and_moves_with_the_background() -> None:
    for seed in range(8):
        world = draw_pictures(seed, 12, "test")
        for scene in world.scenes:
            first, second = render_frames(world, 1, scene.start, scene.start + 2)
            assert not np.array_equal(first, second)
            if scene.picture is not None:
                bare = renderer._frame(replace(scene, picture=None), "test", 0.0)
                changed = np.argwhere((first != bare).any(0)) // (SIZE // 2)
                corner = 2 * changed[:, 0] + changed[:, 1]
                assert (corner == scene.corner).mean() > 0.9


@pytest.mark.usefixtures("tools")
def test_a_word_is_inside_its_second_and_louder_than_the_noise() -> None:
    for seed in range(5):
        world = draw_pictures(seed, 64, "fit")
        samples = render_audio(world, 0, 64).reshape(64, RATE)
        loud = np.sqrt((samples**2).mean(1))
        spoken = {word.at for scene in world.scenes for word in scene.words}
        assert min(loud[s] for s in spoken) > max(loud[s] for s in range(64) if s not in spoken)


def test_media_sets_share_no_voice_and_no_rendering() -> None:
    for one, other in combinations([*VOICES.values(), BABBLERS], 2):
        assert not set(one) & set(other)
    draws = {
        number: {
            (renderer._congruent(rng, -24, 24, number), renderer._congruent(rng, 64, 104, number))
            for rng in map(np.random.default_rng, range(200))
        }
        for number in range(len(MEDIA))
    }
    for one, other in combinations(draws.values(), 2):
        assert not {angle for angle, _ in one} & {angle for angle, _ in other}
        assert not {side for _, side in one} & {side for _, side in other}


@pytest.mark.parametrize("name", TEXTURES)
def test_a_texture_repeats_and_differs_by_seed(name) -> None:
    one, other = (renderer._texture(seed, name, ("red", "white")) for seed in (1, 2))
    assert np.array_equal(one[:, :256, :256], one[:, 256:, 256:])
    assert not np.array_equal(one, other)
    assert one.std() > 5


@pytest.mark.parametrize("name", [name for name in NOISES if name != "voices"])
def test_a_noise_is_finite_and_not_silent(name) -> None:
    noise = renderer.NOISES[name](np.random.default_rng(1), 4 * RATE)
    assert noise.shape == (4 * RATE,)
    assert np.isfinite(noise).all()
    assert noise.std() > 0


@pytest.mark.parametrize("voice", ["en-us+m1", "flite:slt"])
def test_a_missing_synthesizer_is_one_line_with_its_package(monkeypatch, voice) -> None:
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(ToolError, match="apt install") as caught:
        renderer._synthesized(voice, "river")
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_font_is_one_line_with_its_package(monkeypatch, tmp_path) -> None:
    renderer.font_file.cache_clear()
    monkeypatch.setattr(renderer, "FONTS", (str(tmp_path),))
    with pytest.raises(ToolError, match="fonts-noto-color-emoji"):
        renderer.font_file()


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")
def test_espeak_speaks_a_word_within_a_second() -> None:
    spoken = renderer.speak("en-us+m1", "river")
    assert 0.2 * RATE < len(spoken) <= renderer.LONGEST * RATE
    assert np.sqrt((spoken**2).mean()) == pytest.approx(renderer.LEVEL, rel=0.1)
