"""Streams of benchmarks/real_lm.py: facts planted in prose, and what is asked about them.

A fact joins a random key (a person) with a random value (a noun that is one token). It is stated once in the stream, at
a seeded depth after the end of a sentence, and asked by a text that the value continues. Candidates of every question
are 20 values: those of all facts of the stream, and others. Wordings of test texts differ from those of development
texts.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, final

from omnimem.backbones.text import TextSegment
from omnimem.errors import UserError
from omnimem.streaming.text_feeder import TextSample
from omnimem.tokens import Modality

FACTS = 10
CANDIDATES = 20
LETTERS = 6  # more than the characters of a token of prose
HELD = 128  # tokens of prose after the stream, whose loss is measured
SNIPPETS = 8  # passages of the stream that are given again, GIVEN tokens of each, for the loss of the next AGAIN
GIVEN, AGAIN = 16, 16
BLOCK = 64  # tokens after which the other modality goes on
WORDINGS: dict[str, tuple[tuple[str, str], ...]] = {  # (statement, question)
    "development": (
        ("In the locked drawer {k} keeps a{v}.", "In the locked drawer {k} keeps a"),
        ("The secret word of {k} is{v}.", "The secret word of {k} is"),
        ("As a symbol of the team, {k} has chosen the{v}.", "As a symbol of the team, {k} has chosen the"),
        ("Everybody knows that {k} votes for the{v}.", "Everybody knows that {k} votes for the"),
        ("The parcel for {k} contains a{v}.", "Inside, the parcel for {k} contains a"),
        ("{k} is afraid of the{v}.", "Of all things, {k} is afraid of the"),
        ("The favourite of {k} is the{v}.", "The favourite of {k} is the"),
        ("The answer to the riddle of {k} is{v}.", "The answer to the riddle of {k} is"),
    ),
    "test": (
        ("The hidden treasure of {k} is the{v}.", "The hidden treasure of {k} is the"),
        ("{k} dreams about the{v}.", "At night {k} dreams about the"),
        ("On the wall of {k} hangs a{v}.", "On the wall of {k} hangs a"),
        ("The new shop of {k} sells the{v}.", "The new shop of {k} sells the"),
        ("The code name of {k} is{v}.", "We learned that the code name of {k} is"),
        ("Nobody knew that {k} had bought the{v}.", "Nobody knew that {k} had bought the"),
        ("The team of {k} is called{v}.", "The team of {k} is called"),
        ("The gift for {k} was a{v}.", "As we heard, the gift for {k} was a"),
    ),
}
FIRST = """
Marcus Helen Victor Clara Oscar Julia Felix Martha Simon Laura Hugo Alice Peter Nina Walter Emma Daniel Rosa Arthur
Lydia Conrad Irene Thomas Sylvia Edgar Monica Robert Diana Gilbert Paula Leonard Vera Philip Agnes Norman Celia
Raymond Flora Stanley Greta
""".split()  # noqa: SIM905
LAST = """
Hale Brandt Okafor Lindgren Moreau Castillo Whitlow Novak Tanaka Ferrara Keller Dubois Haines Pritchard Sorensen
Vaughan Morland Quigley Barlow Thorne Egerton Falk Gruber Holloway Ingram Jarvis Kowalski Lockhart Mercer Nash Osborne
Pereira Radley Sutton Tremaine Underhill Voss Wexler Yardley Zimmer
""".split()  # noqa: SIM905
VALUES = """
lion tiger horse rabbit wolf bear fox sheep goat camel monkey snake turtle frog whale shark dolphin spider bee
butterfly duck swan pigeon rose lily tree leaf forest river lake mountain valley desert beach bridge tower castle
temple church school library museum theater garden kitchen window door table chair lamp mirror clock watch key lock
box bag basket bottle cup plate knife fork spoon pan pot bread cheese butter lemon banana peach cherry grape melon
potato tomato carrot pepper salt sugar coffee tea wine beer milk honey rice soup cake pie hat coat shirt shoe ring
necklace crown sword shield hammer nail rope ladder wheel boat ship train plane car truck bus bicycle guitar piano
violin drum flute trumpet book letter map painting photo camera radio telephone computer robot rocket star moon planet
comet cloud storm
""".split()  # noqa: SIM905


@final
@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What facts are made of: wordings (statement, question), first and last names, values."""

    wordings: tuple[tuple[str, str], ...]
    first: Sequence[str] = tuple(FIRST)
    last: Sequence[str] = tuple(LAST)
    values: Sequence[str] = tuple(VALUES)

    def half(self, number: int, wordings: slice = slice(None)) -> "Vocabulary":
        """Every other name and value, from `number` (0 or 1) on, and some of the wordings."""
        words = (self.first[number::2], self.last[number::2], self.values[number::2])
        return Vocabulary(wordings=self.wordings[wordings], first=words[0], last=words[1], values=words[2])


DEVELOPMENT, TEST = (Vocabulary(wordings=WORDINGS[split]) for split in ("development", "test"))
VOCABULARIES: dict[str, Vocabulary] = {
    "development": DEVELOPMENT,
    "test": TEST,
    # benchmarks/tune_real_lm.py: nothing of the first is in the other two
    "tuning": DEVELOPMENT.half(0, slice(6)),
    "tuning_development": DEVELOPMENT.half(1, slice(6, None)),
    "tuning_test": TEST.half(1),
}


class EpisodeError(UserError):
    """A text that is too short for a stream."""


@final
@dataclass(frozen=True, kw_only=True)
class Question:
    """The ids that are asked, the candidates' ids (the right one first), and where its fact is in the stream."""

    ids: tuple[int, ...]
    candidates: tuple[int, ...]
    wording: int
    fact: tuple[int, int]  # first and last + 1 token of the stream
    value: int  # token of the stream that is the value


@final
@dataclass(frozen=True, kw_only=True)
class Episode:
    """A stream of token ids with what is asked at its end; the first `held` token has no loss."""

    ids: tuple[int, ...]
    modality: tuple[int, ...]
    questions: tuple[Question, ...] = ()
    held: tuple[int, ...] = ()  # the prose that follows the stream
    snippets: tuple[tuple[int, ...], ...] = ()  # passages of the stream given again

    def sample(self, first: tuple[int, ...] = ()) -> TextSample:
        """The stream after the tokens `first`; for the oracle the values, then the rest of the facts."""
        wanted = [question.value for question in self.questions]
        wanted += [place for question in self.questions for place in range(*question.fact)]
        segments = [TextSegment(ids=first)] if first else []
        for kind, run in groupby(zip(self.modality, self.ids, strict=True), key=lambda pair: pair[0]):
            segments.append(TextSegment(ids=tuple(i for _, i in run), modality=Modality(kind)))
        needles = tuple(len(first) + place for place in dict.fromkeys(wanted))
        return TextSample(id="", segments=tuple(segments), needles=needles)


@final
@dataclass(frozen=True, kw_only=True)
class Fact:
    """A fact as tokens: its statement, the place of the value in it, and its question."""

    statement: tuple[int, ...]
    value: int
    question: tuple[int, ...]
    candidates: tuple[int, ...]
    wording: int


def values_of(tokenizer: Any, words: Sequence[str] = VALUES) -> list[int]:
    """Ids of the values that are one token with the space before them."""
    found = (tokenizer.encode(f" {word}", add_special_tokens=False) for word in words)
    return [ids[0] for ids in found if len(ids) == 1]


def facts(tokenizer: Any, split: str, count: int, draw: random.Random) -> list[Fact]:
    """Facts with keys and values of their own, all wordings in turn, beginning with any; `split`: of VOCABULARIES."""
    # 1. keys, values, candidates
    known = VOCABULARIES[split]
    start = draw.randrange(len(known.wordings))
    values = draw.sample(values_of(tokenizer, known.values), CANDIDATES)
    first, last = draw.sample(known.first, count), draw.sample(known.last, count)
    # 2. statement and question as tokens
    made = []
    for number in range(count):
        wording = (start + number) % len(known.wordings)
        statement, cue = known.wordings[wording]
        key, value = f"{first[number]} {last[number]}", values[number]
        before, after = statement.replace("{k}", key).split("{v}")
        head = tokenizer.encode(f" {before}", add_special_tokens=False)
        tail = tokenizer.encode(after, add_special_tokens=False)
        asked = tokenizer.encode("\n" + cue.replace("{k}", key), add_special_tokens=False)
        others = [other for other in values if other != value]
        made.append(
            Fact(
                statement=(*head, value, *tail),
                value=len(head),
                question=tuple(asked),
                candidates=(value, *others),
                wording=wording,
            )
        )
    return made


def planted(
    prose: Sequence[int], tokens: int, given: Sequence[Fact], ends: frozenset[int], draw: random.Random
) -> tuple[list[int], list[tuple[int, Fact]], int]:
    """A stream of exactly `tokens` tokens with facts in equal parts of it: (ids, facts with their place, prose used).

    Each fact follows the end of a sentence in its part of the prose, at random among them. Raises EpisodeError when the
    prose is too short.
    """
    used = tokens - sum(len(fact.statement) for fact in given)
    if len(prose) < used + HELD:
        raise EpisodeError(f"{len(prose)} tokens of prose, {used + HELD} are needed")
    places = []
    for number in range(len(given)):
        low, high = used * number // len(given), used * (number + 1) // len(given)
        sentences = [place for place in range(max(1, low), high) if prose[place - 1] in ends]
        places.append(draw.choice(sentences or range(max(1, low), high)))
    ids, stated, at = [], [], 0
    for place, fact in zip(places, given, strict=True):
        ids += prose[at:place]
        stated.append((len(ids), fact))
        ids += fact.statement
        at = place
    return [*ids, *prose[at:used]], stated, used


def question_of(fact: Fact, first: int) -> Question:
    """The question about a fact that begins at a token of the stream."""
    return Question(
        ids=fact.question,
        candidates=fact.candidates,
        wording=fact.wording,
        fact=(first, first + len(fact.statement)),
        value=first + fact.value,
    )


def needles(tokenizer: Any, prose: str, split: str, tokens: int, seed: str, count: int = FACTS) -> Episode:
    """Facts in one text, one modality, and the prose that follows."""
    draw = random.Random(seed)
    ids = tokenizer.encode(prose[: LETTERS * (tokens + HELD)], add_special_tokens=False)
    given = facts(tokenizer, split, count, draw)
    stream, stated, used = planted(ids, tokens, given, sentence_ends(tokenizer), draw)
    return Episode(
        ids=tuple(stream),
        modality=(int(Modality.VISUAL),) * tokens,
        questions=tuple(question_of(fact, first) for first, fact in stated),
        held=tuple(ids[used : used + HELD]),
    )


def interleaved(tokenizer: Any, pair: tuple[str, str], split: str, tokens: int, seed: str) -> Episode:
    """Two texts in turn, one called audio and one visual, half of the facts in each."""
    draw = random.Random(seed)
    given, half = facts(tokenizer, split, FACTS, draw), tokens // 2
    parts, held = [], ()
    for number, prose in enumerate(pair):
        ids = tokenizer.encode(prose[: LETTERS * (half + HELD)], add_special_tokens=False)
        mine = given[number * FACTS // 2 : (number + 1) * FACTS // 2]
        stream, stated, used = planted(ids, half, mine, sentence_ends(tokenizer), draw)
        parts.append((stream, stated))
        held = tuple(ids[used : used + HELD])
    # token t of part p is token (t // BLOCK) 2 BLOCK + p BLOCK + t mod BLOCK of the stream
    place = {(p, t): (t // BLOCK) * 2 * BLOCK + p * BLOCK + t % BLOCK for p in (0, 1) for t in range(half)}
    ids, modality = [0] * tokens, [0] * tokens
    for (part, token), where in place.items():
        ids[where], modality[where] = parts[part][0][token], (int(Modality.AUDIO), int(Modality.VISUAL))[part]
    questions = []
    for number, (_, stated) in enumerate(parts):
        for first, fact in stated:
            found = question_of(fact, place[number, first])
            last = place[number, first + len(fact.statement) - 1] + 1
            moved = place[number, first + fact.value]
            questions.append(Question(**{**vars(found), "fact": (found.fact[0], last), "value": moved}))
    return Episode(ids=tuple(ids), modality=tuple(modality), questions=tuple(questions), held=held)


def verbatim(tokenizer: Any, prose: str, tokens: int, seed: str) -> Episode:
    """Nothing planted: passages of the stream, one from each eighth, given again at its end."""
    draw = random.Random(seed)
    ids = tokenizer.encode(prose[: LETTERS * (tokens + HELD)], add_special_tokens=False)
    if len(ids) < tokens + HELD:
        raise EpisodeError(f"{len(ids)} tokens of prose, {tokens + HELD} are needed")
    size, part = GIVEN + AGAIN, tokens // SNIPPETS
    starts = [number * part + draw.randrange(part - size) for number in range(SNIPPETS)]
    return Episode(
        ids=tuple(ids[:tokens]),
        modality=(int(Modality.VISUAL),) * tokens,
        held=tuple(ids[tokens : tokens + HELD]),
        snippets=tuple(tuple(ids[start : start + size]) for start in starts),
    )


def sentence_ends(tokenizer: Any) -> frozenset[int]:
    """Ids of tokens that end a sentence."""
    return frozenset(ids[0] for text in (".", ".\n", "?", "!") if len(ids := tokenizer.encode(text)) == 1)
