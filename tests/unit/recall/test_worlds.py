"""Recall worlds: what is drawn, and that every question has one answer that only the stream tells."""

from collections import Counter
from dataclasses import replace

import pytest
from scipy.stats import chisquare

from omnimem.recall.worlds import (
    CELLS,
    COLOURS,
    SHAPES,
    SLOT,
    TOKEN_SECONDS,
    WORDS,
    Event,
    Question,
    World,
    WorldOptions,
    draw_world,
)

WORLDS = [draw_world(seed, 64) for seed in range(400)]
ALL = WORLDS[:100] + [draw_world(seed, seconds) for seed in range(20) for seconds in (4, 5, 16, 128, 600)]


def answers_of(world: World, question: Question) -> list[str]:
    """All answers that a careful observer of both tracks could give."""
    if question.kind == "auditory":
        return [spoken.word for spoken in world.utterances if spoken.voice == question.key]
    shown = [event for event in world.events if event.shape == question.key]
    if question.kind == "visual":
        return [event.colour for event in shown]
    return [spoken.word for event in shown for spoken in world.utterances if spoken.at in event.span]


def test_a_world_is_a_function_of_its_arguments() -> None:
    assert draw_world(3, 64) == draw_world(3, 64)
    assert draw_world(3, 64) != draw_world(4, 64)
    assert draw_world(3, 64).events != draw_world(3, 68).events
    assert draw_world(3, 64) != draw_world(3, 64, WorldOptions(event_rate=0.1))


def test_every_question_has_exactly_one_answer() -> None:
    for world in ALL:
        for question in world.questions:
            assert answers_of(world, question) == [question.answer]
            assert question.key in question.text.split()
        assert len({question.text for question in world.questions}) == len(world.questions)


def test_symbols_stay_in_their_slot_and_away_from_logo_and_flicker() -> None:
    for world in ALL:
        for event in world.events:
            assert event.seconds in (2, 3)
            assert event.start // SLOT == (event.start + event.seconds - 1) // SLOT
            assert event.start + event.seconds <= world.seconds
            assert len(event.cells) == event.seconds
            assert world.logo_cell not in event.cells
        places = {
            (second, cell) for event in world.events for second, cell in zip(event.span, event.cells, strict=True)
        }
        flickers = [(flicker.at, flicker.cell) for flicker in world.flickers]
        assert len(set(flickers)) == len(flickers)
        assert places.isdisjoint(flickers)
        assert all(0 <= at < world.seconds and 0 <= cell < CELLS and cell != world.logo_cell for at, cell in flickers)


def test_words_outside_events_share_no_visual_token_with_a_symbol() -> None:
    for world in ALL:
        inside = {event.utterance for event in world.events if event.utterance is not None}
        shown = {second // TOKEN_SECONDS for event in world.events for second in event.span}
        assert inside <= set(world.utterances)
        assert all(spoken.at // TOKEN_SECONDS not in shown for spoken in world.utterances if spoken not in inside)
        assert [spoken.at for spoken in world.utterances] == sorted({spoken.at for spoken in world.utterances})
        assert all(event.utterance is None or event.utterance.at in event.span for event in world.events)


@pytest.mark.parametrize(("kind", "names"), [("visual", COLOURS), ("auditory", WORDS), ("cross_modal", WORDS)])
def test_a_blind_guesser_stays_at_chance(kind, names) -> None:
    """Answers are uniform overall, and whatever the key, its commonest answer is no better a guess."""
    asked = [question for world in WORLDS for question in world.questions if question.kind == kind]
    counts = Counter(question.answer for question in asked)
    assert chisquare([counts[name] for name in names]).pvalue > 1e-3
    keys = sorted({question.key for question in asked})
    table = Counter((question.key, question.answer) for question in asked)
    pvalues = [chisquare([table[key, name] for name in names]).pvalue for key in keys]
    assert min(pvalues) > 1e-3 / len(keys)


def test_a_cross_modal_answer_needs_both_tracks() -> None:
    """The same sound with symbols at exchanged times, or the same picture with exchanged words: the answer changes."""
    world = next(world for world in WORLDS if len(_spoken(world)) >= 2 and len(_words(world)) >= 2)
    first, second = _spoken(world)[:2]
    question = Question(kind="cross_modal", text="", answer="", key=first.shape)
    truth = answers_of(world, question)
    picture = {first: replace(first, shape=second.shape), second: replace(second, shape=first.shape)}
    other_picture = replace(world, events=tuple(picture.get(event, event) for event in world.events))
    sound = {
        first.utterance: replace(first.utterance, word=second.utterance.word),
        second.utterance: replace(second.utterance, word=first.utterance.word),
    }
    other_sound = replace(world, utterances=tuple(sound.get(spoken, spoken) for spoken in world.utterances))
    assert answers_of(other_picture, question) != truth
    assert answers_of(other_sound, question) != truth


def _spoken(world: World) -> list[Event]:
    return [event for event in world.events if event.utterance is not None]


def _words(world: World) -> set[str]:
    return {event.utterance.word for event in _spoken(world)[:2]}


def test_one_track_alone_leaves_several_candidate_words() -> None:
    """An ear without eyes knows the words of the stream but not which belongs to the symbol."""
    candidates = [len({spoken.word for spoken in world.utterances}) for world in WORLDS if world.questions]
    guess = sum(1 / count for count in candidates) / len(candidates)
    assert guess < 0.2


def test_a_long_stream_spreads_its_symbols_over_all_of_it() -> None:
    starts = [event.start for seed in range(20) for event in draw_world(seed, 600).events]
    assert len(starts) == 20 * len(SHAPES)
    thirds = Counter(start // 200 for start in starts)
    assert chisquare([thirds[third] for third in range(3)]).pvalue > 1e-3
