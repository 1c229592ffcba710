"""Audio-visual recall: the events of a stream and the questions about it, drawn from a seed (see `renderer`).

A stream shows a panning background with cuts, a static logo, flicker, and in most slots of four seconds one symbol: a
coloured shape that stays for two or three seconds and may move. Its audio is babble and words, each spoken by one
voice in one second. There are questions about symbols during which a word is spoken; the other symbols are decoys.

A shape and a voice occur at most once in a stream, so that no question is ambiguous. A stream longer than about a
minute therefore has no more symbols than one of a minute, only more background between them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, final

import numpy as np

SHAPES: tuple[str, ...] = (
    *("circle", "square", "triangle", "star", "heart", "cross", "moon", "ring"),
    *("arrow", "diamond", "bolt", "ladder", "tree", "house", "hourglass", "wave"),
)
COLOURS: tuple[str, ...] = ("red", "green", "blue", "yellow", "purple", "orange", "white", "cyan")
VOICES: tuple[str, ...] = (
    *("robot", "giant", "child", "king", "queen", "witch", "ghost", "pirate"),
    *("doctor", "baby", "monk", "clown", "wizard", "farmer", "sailor", "pilot"),
)
WORDS: tuple[str, ...] = (
    *("apple", "river", "candle", "winter", "pepper", "garden", "basket", "window"),
    *("piano", "mirror", "rocket", "sugar", "thunder", "velvet", "tiger", "copper"),
)
GRID = 4  # cells along a side of a frame
CELLS = GRID * GRID
SLOT = 4  # seconds; a symbol never leaves its slot, so two symbols never share a 2-s visual token
TOKEN_SECONDS = 2  # span of one visual token; words outside events and symbols never share one

Kind = Literal["visual", "auditory", "cross_modal"]
KINDS: tuple[Kind, ...] = ("visual", "auditory", "cross_modal")
TEMPLATES: dict[Kind, str] = {
    "visual": "what colour was the {key} ?",
    "auditory": "what word did the {key} say ?",
    "cross_modal": "what word was heard during the {key} ?",
}


@final
@dataclass(frozen=True, kw_only=True)
class Utterance:
    """A word spoken in the second [at, at + 1)."""

    at: int
    voice: str
    word: str


@final
@dataclass(frozen=True, kw_only=True)
class Event:
    """A symbol on screen during [start, start + seconds), in `cells[i]` during its i-th second."""

    start: int
    seconds: int
    cells: tuple[int, ...]
    shape: str
    colour: str
    utterance: Utterance | None  # None: a decoy

    @property
    def span(self) -> range:
        """The whole seconds in which the symbol is on screen."""
        return range(self.start, self.start + self.seconds)


@final
@dataclass(frozen=True, kw_only=True)
class Flicker:
    """A random pattern that fills one cell in the second `at`."""

    at: int
    cell: int
    seed: int


@final
@dataclass(frozen=True, kw_only=True)
class Question:
    """A question after the stream; `key` is the shape or voice it names."""

    kind: Kind
    text: str
    answer: str
    key: str


@final
@dataclass(frozen=True, kw_only=True)
class World:
    """The events of a stream, and the questions about it in order."""

    seed: int
    seconds: int
    scenes: tuple[tuple[int, int], ...]  # (second of the cut, seed of the scene), the first at 0
    events: tuple[Event, ...]
    utterances: tuple[Utterance, ...]  # all spoken words in order of time, including those of events
    flickers: tuple[Flicker, ...]
    logo_cell: int
    questions: tuple[Question, ...]


@final
@dataclass(frozen=True, kw_only=True)
class WorldOptions:
    """Density of events in a stream."""

    event_rate: float = 0.8  # probability of a symbol in a slot, while unused shapes are left
    spoken_share: float = 0.45  # probability that a word is spoken during a symbol
    stray_rate: float = 0.15  # probability of a word in a second without a symbol in its visual token
    cut_rate: float = 0.1  # probability that a slot starts with a new scene
    move_rate: float = 0.5  # probability that a symbol moves to a neighbouring cell after a second
    flickers_per_second: float = 2.0


def draw_world(seed: int, seconds: int, options: WorldOptions | None = None) -> World:
    """The world of a seed, deterministic for given arguments on every machine.

    Raises ValueError for less than one slot of four seconds.
    """
    # 1. draw the events
    if seconds < SLOT:
        raise ValueError(f"seconds = {seconds} is too short for a symbol; use at least {SLOT} seconds")
    options = options or WorldOptions()
    rng = np.random.default_rng([seed, seconds])
    logo_cell = int(rng.integers(CELLS))
    voices = [VOICES[i] for i in rng.permutation(len(VOICES))]
    events = _draw_events(rng, seconds, logo_cell, voices, options)
    utterances = _draw_strays(rng, seconds, events, voices, options)
    utterances += [event.utterance for event in events if event.utterance is not None]
    utterances.sort(key=lambda utterance: utterance.at)
    # 2. draw scenes, flicker and questions
    return World(
        seed=seed,
        seconds=seconds,
        scenes=_draw_scenes(rng, seconds, options),
        events=tuple(events),
        utterances=tuple(utterances),
        flickers=tuple(_draw_flickers(rng, seconds, events, logo_cell, options)),
        logo_cell=logo_cell,
        questions=_draw_questions(rng, events, utterances),
    )


def _draw_scenes(rng: np.random.Generator, seconds: int, options: WorldOptions) -> tuple[tuple[int, int], ...]:
    cuts = [at for at in range(SLOT, seconds, SLOT) if rng.random() < options.cut_rate]
    return tuple((at, _draw_seed(rng)) for at in (0, *cuts))


def _draw_events(
    rng: np.random.Generator, seconds: int, logo_cell: int, voices: list[str], options: WorldOptions
) -> list[Event]:
    """The symbols; removes the voices that speak during them from the end of `voices`."""
    # 1. choose the slots
    slots = [slot for slot in range(seconds // SLOT) if rng.random() < options.event_rate]
    if len(slots) > len(SHAPES):  # in a long stream, spread the shapes over its whole length
        slots = sorted(int(slot) for slot in rng.choice(slots, len(SHAPES), replace=False))
    # 2. draw one symbol per slot
    shapes = [SHAPES[i] for i in rng.permutation(len(SHAPES))]
    events = []
    for slot in slots:
        length = int(rng.integers(2, 4))
        start = slot * SLOT + int(rng.integers(SLOT - length + 1))
        at = start + int(rng.integers(length))
        spoken = rng.random() < options.spoken_share and len(voices) > 0
        event = Event(
            start=start,
            seconds=length,
            cells=_draw_path(rng, length, logo_cell, options),
            shape=shapes.pop(),
            colour=_pick(rng, COLOURS),
            utterance=Utterance(at=at, voice=voices.pop(), word=_pick(rng, WORDS)) if spoken else None,
        )
        events.append(event)
    return events


def _draw_path(rng: np.random.Generator, length: int, logo_cell: int, options: WorldOptions) -> tuple[int, ...]:
    """Cells of a random walk that never enters the cell of the logo."""
    path = [int(rng.choice([cell for cell in range(CELLS) if cell != logo_cell]))]
    while len(path) < length:
        moves = [cell for cell in _neighbours(path[-1]) if cell != logo_cell]
        path.append(int(rng.choice(moves)) if rng.random() < options.move_rate else path[-1])
    return tuple(path)


def _draw_strays(
    rng: np.random.Generator, seconds: int, events: list[Event], voices: list[str], options: WorldOptions
) -> list[Utterance]:
    """Words outside events, spoken by the remaining voices, spread over the whole stream when those are too few."""
    shown = {second // TOKEN_SECONDS for event in events for second in event.span}
    free = [second for second in range(seconds) if second // TOKEN_SECONDS not in shown]
    times = [second for second in free if rng.random() < options.stray_rate]
    if len(times) > len(voices):
        times = [int(second) for second in rng.choice(times, len(voices), replace=False)]
    return [Utterance(at=at, voice=voices.pop(), word=_pick(rng, WORDS)) for at in times]


def _draw_flickers(
    rng: np.random.Generator, seconds: int, events: list[Event], logo_cell: int, options: WorldOptions
) -> Iterator[Flicker]:
    """Flicker in cells without symbol and logo, at most once per cell and second."""
    taken = {second: cell for event in events for second, cell in zip(event.span, event.cells, strict=True)}
    for second in range(seconds):
        free = [cell for cell in range(CELLS) if cell not in (logo_cell, taken.get(second))]
        count = min(int(rng.poisson(options.flickers_per_second)), len(free))
        for cell in rng.choice(free, count, replace=False):
            yield Flicker(at=second, cell=int(cell), seed=_draw_seed(rng))


def _draw_questions(rng: np.random.Generator, events: list[Event], utterances: list[Utterance]) -> tuple[Question, ...]:
    """Colour and word of every symbol with a word, and half as many questions about voices, drawn from all speakers."""
    questions = []
    for event in events:
        if event.utterance is not None:
            questions.append(_question("visual", event.shape, event.colour))
            questions.append(_question("cross_modal", event.shape, event.utterance.word))
    count = min(len(utterances), max(1, len(questions) // 2))
    for i in rng.choice(len(utterances), count, replace=False):
        questions.append(_question("auditory", utterances[i].voice, utterances[i].word))
    return tuple(questions[i] for i in rng.permutation(len(questions)))


def _question(kind: Kind, key: str, answer: str) -> Question:
    return Question(kind=kind, text=TEMPLATES[kind].format(key=key), answer=answer, key=key)


def _neighbours(cell: int) -> list[int]:
    row, column = divmod(cell, GRID)
    around = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
    return [r * GRID + c for r, c in around if 0 <= r < GRID and 0 <= c < GRID]


def _pick(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[int(rng.integers(len(names)))]


def _draw_seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))
