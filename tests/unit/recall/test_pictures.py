"""Worlds of pictures and words: names are used once, questions are unambiguous, the evidence holds the answer."""

from collections import Counter
from itertools import pairwise

import pytest

from omnimem.recall.pictures import (
    ASKED_SHOWN,
    ASKED_SPOKEN,
    GLYPHS,
    KIND_OF,
    MEDIA,
    NAMES,
    PICTURES,
    SPOKEN,
    WORDINGS,
    WORDS,
    PictureOptions,
    direction_of,
    draw_pictures,
)

SEEDS = range(30)


def test_pictures_and_words_share_no_name_and_no_glyph_stands_for_two() -> None:
    assert len({*NAMES, *WORDS}) == len(NAMES) + len(WORDS)
    assert len(set(GLYPHS.values())) == len(NAMES)
    assert all(len(PICTURES[kind]) >= 10 for kind in ASKED_SHOWN)
    assert all(len(SPOKEN[kind]) >= 10 for kind in ASKED_SPOKEN)


@pytest.mark.parametrize("seconds", [6, 12, 64, 600])
def test_scenes_fill_the_stream_and_every_name_is_used_once(seconds) -> None:
    for seed in SEEDS:
        world = draw_pictures(seed, seconds, "test")
        ends = [scene.start + scene.seconds for scene in world.scenes]
        assert [0, *ends[:-1]] == [scene.start for scene in world.scenes]
        assert ends[-1] == seconds
        assert all(a.texture != b.texture and a.noise != b.noise for a, b in pairwise(world.scenes))
        used = [scene.picture for scene in world.scenes if scene.picture]
        used += [word.text for scene in world.scenes for word in scene.words]
        assert max(Counter(used).values(), default=1) == 1
        for scene in world.scenes:
            assert all(scene.start <= word.at < scene.start + scene.seconds for word in scene.words)


def test_the_evidence_holds_the_answer_and_the_answer_is_the_only_one() -> None:
    asked = Counter()
    for seed in SEEDS:
        world = draw_pictures(seed, 64, "adapter")
        shown = {scene.picture for scene in world.scenes if scene.picture}
        said = {word.text for scene in world.scenes for word in scene.words}
        for question, (start, end) in zip(world.questions, world.evidence, strict=True):
            way = direction_of(question)
            asked[way] += 1
            assert question.kind == KIND_OF[way]
            assert question.text in [wording.format(key=question.key) for wording in WORDINGS[way]]
            scene = next(each for each in world.scenes if each.start <= start < each.start + each.seconds)
            assert end <= scene.start + scene.seconds
            spoken = [word.text for word in scene.words]
            match way:
                case "shown_kind":
                    assert {question.answer} == shown & set(PICTURES[question.key]) == {scene.picture}
                case "spoken_kind":
                    assert {question.answer} == said & set(SPOKEN[question.key])
                    assert spoken == [question.answer]
                case "spoken_with":
                    assert (scene.picture, spoken) == (question.key, [question.answer])
                case "shown_with":
                    assert (scene.picture, spoken) == (question.answer, [question.key])
    assert asked.keys() == KIND_OF.keys()
    assert min(asked.values()) > len(SEEDS)


def test_there_are_decoys_and_scenes_without_a_picture() -> None:
    scenes = [scene for seed in SEEDS for scene in draw_pictures(seed, 64, "test").scenes]
    kinds = Counter((scene.picture is not None, bool(scene.words)) for scene in scenes)
    assert min(kinds[key] for key in ((True, True), (True, False), (False, True))) > 5


def test_a_world_is_a_function_of_its_arguments() -> None:
    world = draw_pictures(3, 64, "test")
    assert draw_pictures(3, 64, "test") == world
    assert draw_pictures(4, 64, "test") != world
    assert {draw_pictures(3, 64, media).scenes for media in MEDIA} == {world.scenes}  # media change the rendering alone


def test_dense_worlds_show_all_names_equally_often() -> None:
    options = PictureOptions(dense=True, lengths=(1,))
    worlds = [draw_pictures(seed, 66, "fit", options) for seed in range(60)]
    counts = Counter(scene.picture for world in worlds for scene in world.scenes)
    assert all(5 < counts[name] < 35 for name in NAMES)


@pytest.mark.parametrize("seconds", [0, 4, 7, 65])
def test_a_length_that_cannot_be_drawn_is_refused(seconds) -> None:
    with pytest.raises(ValueError, match=f"seconds = {seconds}"):
        draw_pictures(1, seconds, "test")
