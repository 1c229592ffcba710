"""Pictures and words: the scenes of a stream of named pictures and spoken English words, and the questions about it.

A stream is cut into scenes of four or six seconds with a moving texture and a background noise. Most scenes show one
picture in a corner, and in most a word is spoken, in one second. Pictures without a word, and words without a picture,
are decoys. A picture and a word occur at most once in a stream, so that no question is ambiguous; a stream of more
than ten minutes has scenes with neither.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, final

import numpy as np

from omnimem.recall.worlds import Kind, Question

# every word is one token of SmolLM2 with a space before it; pictures are characters of the font Noto Color Emoji
PICTURES: dict[str, dict[str, str]] = {
    "animal": {
        **{
            "dog": "🐕",
            "cat": "🐈",
            "horse": "🐎",
            "cow": "🐄",
            "pig": "🐖",
            "sheep": "🐑",
            "rabbit": "🐇",
            "mouse": "🐁",
        },
        **{"bear": "🐻", "monkey": "🐒", "elephant": "🐘", "tiger": "🐅", "fox": "🦊", "deer": "🦌", "camel": "🐫"},
        **{"giraffe": "🦒", "zebra": "🦓", "penguin": "🐧", "duck": "🦆", "owl": "🦉", "chicken": "🐔", "snake": "🐍"},
        **{"frog": "🐸", "whale": "🐳", "fish": "🐟", "octopus": "🐙", "snail": "🐌", "butterfly": "🦋", "spider": "🕷"},
        **{"crab": "🦀", "shark": "🦈", "turtle": "🐢"},
    },
    "food": {
        **{
            "apple": "🍎",
            "banana": "🍌",
            "lemon": "🍋",
            "strawberry": "🍓",
            "cherry": "🍒",
            "peach": "🍑",
            "tomato": "🍅",
        },
        **{"corn": "🌽", "carrot": "🥕", "bread": "🍞", "cheese": "🧀", "egg": "🥚", "pizza": "🍕", "cookie": "🍪"},
        **{"cake": "🍰", "milk": "🥛", "mushroom": "🍄", "pineapple": "🍍", "broccoli": "🥦", "cucumber": "🥒"},
        **{"coconut": "🥥", "pear": "🍐", "beer": "🍺", "rice": "🍚"},
    },
    "vehicle": {
        **{"car": "🚗", "bus": "🚌", "truck": "🚚", "train": "🚂", "bicycle": "🚲", "ship": "🚢", "rocket": "🚀"},
        **{"airplane": "✈", "tractor": "🚜", "helicopter": "🚁", "ambulance": "🚑", "motorcycle": "🏍"},
    },
    "thing": {
        **{"hammer": "🔨", "key": "🔑", "clock": "⏰", "phone": "📱", "camera": "📷", "book": "📕", "umbrella": "☔"},
        **{"lamp": "💡", "chair": "🪑", "door": "🚪", "guitar": "🎸", "piano": "🎹", "drum": "🥁", "trumpet": "🎺"},
        **{"hat": "🎩", "shirt": "👕", "shoe": "👞", "crown": "👑", "ball": "⚽", "balloon": "🎈", "gift": "🎁"},
        **{"candle": "🕯", "flag": "🚩", "sword": "🗡", "anchor": "⚓", "robot": "🤖", "ghost": "👻", "skull": "💀"},
        **{"tree": "🌳", "rose": "🌹", "cactus": "🌵", "volcano": "🌋", "moon": "🌙", "star": "⭐", "cloud": "☁"},
    },
}
SPOKEN: dict[str, tuple[str, ...]] = {
    "number": (*("one", "two", "three", "four", "five", "six"), *("seven", "eight", "nine", "ten", "eleven", "twelve")),
    "color": (*("red", "green", "blue", "yellow", "purple", "pink"), *("black", "white", "brown", "golden", "silver")),
    "month": (
        *("January", "February", "March", "April", "May", "June"),
        *("July", "August", "September", "October", "November", "December"),
    ),
    "country": (
        *("France", "Germany", "China", "Japan", "India", "Canada", "Mexico"),
        *("Brazil", "Egypt", "Spain", "Italy", "Russia", "Greece", "Kenya"),
    ),
    "job": (
        *("doctor", "teacher", "farmer", "lawyer", "pilot", "sailor", "nurse"),
        *("writer", "artist", "dancer", "soldier", "priest", "engineer", "scientist"),
    ),
    "other": (
        *("river", "garden", "window", "winter", "summer", "music", "market", "village", "kitchen", "letter"),
        *("history", "science", "weather", "morning", "evening", "money", "water", "danger", "freedom", "simple"),
        *("quiet", "energy", "library", "hospital", "city", "language", "basket", "mirror", "thunder", "velvet"),
        *("sugar", "captain", "engine", "pocket", "blanket", "pillow", "carpet", "bottle", "forest", "valley"),
        *("ocean", "jungle", "harbor"),
    ),
}
NAMES: tuple[str, ...] = tuple(name for group in PICTURES.values() for name in group)
WORDS: tuple[str, ...] = tuple(word for group in SPOKEN.values() for word in group)
GLYPHS: dict[str, str] = {name: glyph for group in PICTURES.values() for name, glyph in group.items()}
TEXTURES: tuple[str, ...] = ("stripes", "brick", "grass", "waves", "dots", "clouds", "sand", "tiles")
COLOURS: tuple[str, ...] = ("red", "green", "blue", "yellow", "purple", "orange", "white", "brown")
NOISES: tuple[str, ...] = ("rain", "wind", "voices", "hum", "engine", "static")

STEP = 2  # seconds: a segment of the encoders; scenes last whole steps
CORNERS = 4  # top left, top right, bottom left, bottom right

Media = Literal["fit", "adapter", "test"]  # disjoint renderings and voices: of projectors, adapter, evaluation
MEDIA: tuple[Media, ...] = ("fit", "adapter", "test")

Direction = Literal["shown_kind", "spoken_kind", "spoken_with", "shown_with"]
KIND_OF: dict[Direction, Kind] = {
    "shown_kind": "visual",
    "spoken_kind": "auditory",
    "spoken_with": "cross_modal",
    "shown_with": "cross_modal",
}
WORDINGS: dict[Direction, tuple[str, ...]] = {
    "shown_kind": ("Which {key} was shown?", "What {key} appeared in the video?", "Name the {key} that you saw."),
    "spoken_kind": ("Which {key} was spoken?", "What {key} did you hear?", "Name the {key} that was said."),
    "spoken_with": (
        "Which word was spoken while the {key} was shown?",
        "What did you hear when you saw the {key}?",
        "Which word came with the picture of the {key}?",
    ),
    "shown_with": (
        "What was shown while the word {key} was spoken?",
        "What did you see when you heard {key}?",
        "Which picture came with the word {key}?",
    ),
}
ASKED_SHOWN = ("animal", "food", "vehicle")  # kinds of ten members or more, so that a guess is rarely right
ASKED_SPOKEN = ("number", "color", "month", "country", "job")


def direction_of(question: Question) -> Direction:
    """What a question names, and what it asks for."""
    if question.kind == "cross_modal":
        return "spoken_with" if question.key in GLYPHS else "shown_with"
    return "shown_kind" if question.kind == "visual" else "spoken_kind"


@final
@dataclass(frozen=True, kw_only=True)
class Word:
    """A word spoken in the second [at, at + 1)."""

    at: int
    text: str


@final
@dataclass(frozen=True, kw_only=True)
class Scene:
    """A part of the stream between two cuts; `seed` determines all of its rendering that is not named here."""

    start: int
    seconds: int
    texture: str
    colours: tuple[str, str]
    noise: str
    picture: str | None
    corner: int
    words: tuple[Word, ...]
    seed: int


@final
@dataclass(frozen=True, kw_only=True)
class PictureWorld:
    """The scenes of a stream, and the questions about it in order, each with the seconds that hold its answer."""

    seed: int
    seconds: int
    media: Media  # which renderings of pictures and which voices
    scenes: tuple[Scene, ...]
    questions: tuple[Question, ...]
    evidence: tuple[tuple[int, int], ...]


@final
@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """Density of a stream, and the number of its questions."""

    lengths: tuple[int, ...] = (2, 3)  # steps of a scene, drawn with equal probability
    picture_rate: float = 0.9  # probability that a scene shows a picture
    word_rate: float = 0.75  # probability that a word is spoken in a scene
    dense: bool = False  # every step may hold a word, and all names are equally likely: for the fit of projectors
    kind_questions: int = 2  # at most, per modality
    pair_questions: int = 6  # at most, both directions together


@final
@dataclass(kw_only=True)
class _Supply:
    """Names in random order, of which each is used once; the first of some kinds is the only one of its kind."""

    groups: dict[str, list[str]]
    unique: tuple[str, ...]
    order: list[str] = field(default_factory=list)

    @classmethod
    def draw(cls, rng: np.random.Generator, groups: dict[str, Sequence[str]], asked: Sequence[str]) -> "_Supply":
        """Half of the asked kinds (rounded up), drawn by lot, have one member in the stream."""
        shuffled = {kind: [names[int(i)] for i in rng.permutation(len(names))] for kind, names in groups.items()}
        unique = tuple(asked[int(i)] for i in rng.permutation(len(asked))[: (len(asked) + 1) // 2])
        singles = [shuffled[kind][0] for kind in unique]
        rest = [name for kind, names in shuffled.items() if kind not in unique for name in names]
        return cls(
            groups=shuffled, unique=unique, order=[*singles, *(rest[int(i)] for i in rng.permutation(len(rest)))]
        )


def draw_pictures(seed: int, seconds: int, media: Media, options: PictureOptions | None = None) -> PictureWorld:
    """The world of a seed, deterministic for given arguments on every machine.

    Raises ValueError for less than the longest scene, or a length that is not a multiple of STEP.
    """
    # 1. draw the cuts, and which scenes show and say something
    options = options or PictureOptions()
    if seconds < STEP * max(options.lengths) or seconds % STEP:
        raise ValueError(f"seconds = {seconds} must be a multiple of {STEP}, at least {STEP * max(options.lengths)}")
    rng = np.random.default_rng([seed, seconds, 9])
    steps = _cut(rng, seconds // STEP, options.lengths)
    shown = rng.random(len(steps)) < options.picture_rate
    spoken = [_spoken_at(rng, length, options) for length in steps]
    # 2. deal names to them in random order
    names = _names(rng, PICTURES, () if options.dense else ASKED_SHOWN, int(shown.sum()))
    words = _names(rng, SPOKEN, () if options.dense else ASKED_SPOKEN, sum(map(len, spoken)))
    # 3. the scenes
    scenes, at, before = [], 0, ("", "")
    for length, has_picture, offsets in zip(steps, shown, spoken, strict=True):
        picture = names.pop() if has_picture and names else None
        said = tuple(Word(at=at + offset, text=words.pop()) for offset in offsets if words)
        scene = _scene(rng, at, STEP * length, picture, said, before)
        scenes.append(scene)
        before, at = (scene.texture, scene.noise), at + STEP * length
    # 4. the questions
    questions, evidence = _questions(rng, scenes, options)
    return PictureWorld(
        seed=seed, seconds=seconds, media=media, scenes=tuple(scenes), questions=questions, evidence=evidence
    )


def _cut(rng: np.random.Generator, steps: int, lengths: Sequence[int]) -> list[int]:
    """Lengths of scenes that sum to `steps`; the last takes what is left, if that is too short for a scene."""
    found: list[int] = []
    while (left := steps - sum(found)) > 0:
        length = int(rng.choice(lengths))
        found.append(length if left - length >= min(lengths) else left)
    return found


def _spoken_at(rng: np.random.Generator, length: int, options: PictureOptions) -> list[int]:
    """Seconds of a scene, from its start, in which a word is spoken."""
    if options.dense:
        return [STEP * step + int(rng.integers(STEP)) for step in range(length) if rng.random() < options.word_rate]
    return [int(rng.integers(STEP * length))] if rng.random() < options.word_rate else []


def _names(
    rng: np.random.Generator, groups: Mapping[str, Iterable[str]], asked: Sequence[str], count: int
) -> list[str]:
    """`count` names (or all there are) in random order, among them single members of half of the asked kinds."""
    supply = _Supply.draw(rng, {kind: tuple(names) for kind, names in groups.items()}, asked)
    taken = supply.order[:count]
    return [taken[i] for i in rng.permutation(len(taken))]


def _scene(
    rng: np.random.Generator,
    start: int,
    seconds: int,
    picture: str | None,
    words: tuple[Word, ...],
    before: tuple[str, str],
) -> Scene:
    """A scene with another texture and another noise than the one before."""
    textures = [each for each in TEXTURES if each != before[0]]
    noises = [each for each in NOISES if each != before[1]]
    first, second = (COLOURS[i] for i in rng.permutation(len(COLOURS))[:2])
    return Scene(
        start=start,
        seconds=seconds,
        texture=textures[int(rng.integers(len(textures)))],
        colours=(first, second),
        noise=noises[int(rng.integers(len(noises)))],
        picture=picture,
        corner=int(rng.integers(CORNERS)),
        words=words,
        seed=int(rng.integers(2**31)),
    )


def _questions(
    rng: np.random.Generator, scenes: Sequence[Scene], options: PictureOptions
) -> tuple[tuple[Question, ...], tuple[tuple[int, int], ...]]:
    # 1. kinds with one member
    asked: list[tuple[Direction, str, str, tuple[int, int]]] = []
    shown = {scene.picture: (scene.start, scene.start + scene.seconds) for scene in scenes if scene.picture}
    said = {word.text: (word.at, word.at + 1) for scene in scenes for word in scene.words}
    rounds: tuple[tuple[Direction, Mapping[str, Iterable[str]], Sequence[str], dict[str, tuple[int, int]]], ...] = (
        ("shown_kind", PICTURES, ASKED_SHOWN, shown),
        ("spoken_kind", SPOKEN, ASKED_SPOKEN, said),
    )
    for direction, groups, kinds, there in rounds:
        single = [(kind, found[0]) for kind in kinds if len(found := [n for n in groups[kind] if n in there]) == 1]
        chosen = [single[i] for i in rng.permutation(len(single))[: options.kind_questions]]
        for kind, name in chosen:
            asked.append((direction, kind, name, there[name]))
    # 2. pairs of a picture and a word
    pairs = [(scene, scene.words[0]) for scene in scenes if scene.picture and len(scene.words) == 1]
    both = [(each, way) for each in pairs for way in ("spoken_with", "shown_with")]
    for index in rng.permutation(len(both))[: options.pair_questions]:
        (scene, word), way = both[index]
        span = (scene.start, scene.start + scene.seconds)
        key, answer = (scene.picture, word.text) if way == "spoken_with" else (word.text, scene.picture)
        asked.append((way, str(key), str(answer), span))
    # 3. wordings, in random order
    rows = [asked[i] for i in rng.permutation(len(asked))]
    questions = tuple(
        Question(kind=KIND_OF[way], text=str(rng.choice(WORDINGS[way])).format(key=key), answer=answer, key=key)
        for way, key, answer, _ in rows
    )
    return questions, tuple(span for _, _, _, span in rows)
