"""Training batches for the tiny checkpoint: a stream and all its questions in one pass.

A row holds the stream, followed by one block of tokens per question. A block attends to the stream and itself; its
positions continue from the end of the stream, as if it were the only question.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, final

import numpy as np
import torch
from torch import Tensor

from omnimem.recall.worlds import CELLS, KINDS, SHAPES, TOKEN_SECONDS, Question, World
from omnimem.tiny.base import Layout, TinyBase

ANSWER_PROMPT = "<|im_end|>\n<|im_start|>assistant\n"
IGNORE = -100  # target without loss

Style = Literal["key_last", "chat"]


@final
@dataclass(frozen=True, kw_only=True)
class Questions:
    """Blocks of question tokens, padded on the right, with next-token targets."""

    ids: Tensor  # batch blocks block_tokens
    targets: Tensor  # batch blocks block_tokens: the answer word, at the position that predicts it
    key_targets: Tensor  # batch blocks block_tokens: the answer word at the key word, an auxiliary target
    end_targets: Tensor  # batch blocks block_tokens: the token after the answer
    kinds: Tensor  # batch blocks: index into KINDS, or IGNORE

    @property
    def blocks(self) -> int:
        """Number of questions per stream, including padding."""
        return self.ids.shape[1]

    @property
    def block_tokens(self) -> int:
        """Tokens of the longest question."""
        return self.ids.shape[2]


def pack_questions(base: TinyBase, asked: Sequence[Sequence[Question]], style: Style) -> Questions:
    """Pack all questions of a batch of streams into padded tensors."""
    # 1. tokenize
    blocks = [[_encode(base, question, style) for question in questions] for questions in asked]
    count = max(len(row) for row in blocks)
    length = max(len(ids) for row in blocks for ids, _, _ in row)
    # 2. fill the tensors
    ids = torch.full((len(blocks), count, length), base.id("<|endoftext|>"))
    targets, key_targets, end_targets = (torch.full_like(ids, IGNORE) for _ in range(3))
    kinds = torch.full(ids.shape[:2], IGNORE)
    for b, row in enumerate(blocks):
        for n, (tokens, key, answer) in enumerate(row):
            word = base.id(asked[b][n].answer)
            ids[b, n, : len(tokens)] = torch.tensor(tokens)
            targets[b, n, answer] = word
            kinds[b, n] = KINDS.index(asked[b][n].kind)
            if style == "chat":
                key_targets[b, n, key] = word
                end_targets[b, n, answer + 1] = base.id("<|im_end|>")
    return Questions(ids=ids, targets=targets, key_targets=key_targets, end_targets=end_targets, kinds=kinds)


def _encode(base: TinyBase, question: Question, style: Style) -> tuple[list[int], int, int]:
    """Tokens of a question, the index of its key word and the index at which the answer is predicted."""
    text = base.before_question + question.text
    # the last occurrence: "during the ring" contains "ring" twice
    stem = base.tokenizer(text[: text.rindex(question.key) + len(question.key)]).input_ids
    key = len(stem) - 1
    if style == "key_last":
        return stem, key, key
    ids = base.tokenizer(text + ANSWER_PROMPT + question.answer).input_ids
    return ids, key, len(ids) - 2


@final
@dataclass(frozen=True, kw_only=True)
class Streams:
    """A batch of streams: token ids, positions, and media features."""

    ids: Tensor  # batch tokens
    positions: Tensor  # axes batch tokens
    visual: Tensor  # levels batch visual_tokens width
    audio: Tensor  # batch seconds width
    shown: Tensor  # batch seconds: index of the shape shown at each audio token, len(SHAPES) for none
    next_position: int


class Concepts:
    """Target features of the towers: a symbol is the sum of the embeddings of its words, level by level.

    The embeddings are a frozen copy of the initial ones. Cells and seconds without content have the embedding of the
    placeholder token.
    """

    def __init__(self, base: TinyBase) -> None:
        self._base, self.table = base, base.table.detach().clone()
        self.visual_nothing, self.audio_nothing = (self.table[token] for token in base.placeholders)

    def word(self, name: str) -> Tensor:
        """The embedding of a word of the task (spelled with a leading space, as in a question)."""
        return self.table[self._base.id("Ġ" + name)]

    def targets(self, worlds: Sequence[World]) -> tuple[Tensor, Tensor]:
        """Target features without noise: (levels streams grids cells width) and (streams seconds width)."""
        seconds, levels = worlds[0].seconds, self._base.levels
        visual = self.visual_nothing.repeat(len(levels), len(worlds), seconds // TOKEN_SECONDS, CELLS, 1)
        audio = self.audio_nothing.repeat(len(worlds), seconds, 1)
        for b, world in enumerate(worlds):
            for event in world.events:
                for level, names in enumerate(levels):
                    symbol = torch.stack([self.word(getattr(event, name)) for name in names]).sum(0)
                    for second, cell in zip(event.span, event.cells, strict=True):
                        visual[level, b, second // TOKEN_SECONDS, cell] = symbol
            for utterance in world.utterances:
                audio[b, utterance.at] = self.word(utterance.voice) + self.word(utterance.word)
        return visual, audio


NOISE = 0.3  # standard deviation per dimension; that of a symbol is about 1


def imagine(concepts: Concepts, worlds: Sequence[World], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Simulated features of imperfect towers: targets with noise, a drifting scene, random flicker and logo vectors."""
    visual, audio = concepts.targets(worlds)
    tokens = _imperfect(visual[0], concepts.visual_nothing, worlds, rng)
    audio = audio + NOISE * _normal(rng, audio.shape)
    deeper = [_imperfect(level, concepts.visual_nothing, worlds, rng) for level in visual[1:]]
    return torch.stack([tokens, *deeper]), audio


def _imperfect(visual: Tensor, nothing: Tensor, worlds: Sequence[World], rng: np.random.Generator) -> Tensor:
    """One level of visual features."""
    scene, unlike = _scenes(visual, worlds, rng)
    background = (visual == nothing).all(-1, keepdim=True)
    visual = torch.where(background, visual + scene, visual)
    visual = torch.where(unlike.isnan(), visual, unlike)
    return visual + NOISE * _normal(rng, visual.shape)


def _scenes(visual: Tensor, worlds: Sequence[World], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Background of every cell, and the distractors that replace it (NaN elsewhere)."""
    scene = torch.empty_like(visual)
    unlike = torch.full_like(visual, float("nan"))
    width = visual.shape[-1]
    for b, world in enumerate(worlds):
        # 1. a drifting background per scene
        cuts = [at // TOKEN_SECONDS for at, _ in world.scenes] + [visual.shape[1]]
        for start, end in pairwise(cuts):
            drift = 0.1 * _normal(rng, (end - start, 1, width)).cumsum(0)
            scene[b, start:end] = 0.5 * _normal(rng, (1, 1, width)) + 0.4 * _normal(rng, (1, CELLS, width)) + drift
        # 2. flicker and logo
        for flicker in world.flickers:
            if flicker.at < world.seconds:
                unlike[b, flicker.at // TOKEN_SECONDS, flicker.cell] = _normal(rng, (width,))
        unlike[b, :, world.logo_cell] = _normal(rng, (width,))
        for event in world.events:  # a flicker in one frame does not hide a symbol in the other
            for second, cell in zip(event.span, event.cells, strict=True):
                unlike[b, second // TOKEN_SECONDS, cell] = float("nan")
    return scene, unlike


def _normal(rng: np.random.Generator, shape: Sequence[int]) -> Tensor:
    return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))


def assemble(
    layout: Layout, worlds: Sequence[World], visual: Tensor, audio: Tensor, kept: Tensor, *, name_silent: bool
) -> Streams:
    """Streams with only the `kept` (batch grids n) cells of each grid, at their original positions."""
    batch = len(worlds)
    columns = layout.visual[None].expand(batch, -1, -1).gather(2, kept).flatten(1)
    text = torch.ones_like(layout.ids, dtype=torch.bool)
    text[layout.visual.flatten()] = False
    rest = text.nonzero()[:, 0].expand(batch, -1)
    order = torch.cat([rest, columns], dim=1).sort(dim=1).values
    index = kept[None, ..., None].expand(len(visual), -1, -1, -1, visual.shape[-1])
    features = visual.gather(3, index).flatten(2, 3)
    return Streams(
        ids=layout.ids[order],
        positions=layout.positions[:, order],
        visual=features,
        audio=audio,
        shown=_shown(worlds, name_silent=name_silent),
        next_position=layout.next_position,
    )


def choose_cells(worlds: Sequence[World], count: int, rng: np.random.Generator) -> Tensor:
    """Random `count` cells of every grid in raster order, always including those with a symbol."""
    grids = worlds[0].seconds // TOKEN_SECONDS
    rank = rng.random((len(worlds), grids, CELLS))
    for b, world in enumerate(worlds):
        for event in world.events:
            for second, cell in zip(event.span, event.cells, strict=True):
                rank[b, second // TOKEN_SECONDS, cell] = -1
    return torch.from_numpy(np.sort(rank.argsort(-1)[..., :count], axis=-1))


def _shown(worlds: Sequence[World], *, name_silent: bool) -> Tensor:
    """The shape on screen in every second; without `name_silent` only in seconds with a spoken word."""
    shown = torch.full((len(worlds), worlds[0].seconds), len(SHAPES))
    for b, world in enumerate(worlds):
        for event in world.events:
            if name_silent:
                shown[b, event.start : event.start + event.seconds] = SHAPES.index(event.shape)
            elif event.utterance is not None:
                shown[b, event.utterance.at] = SHAPES.index(event.shape)
    return shown


def attention_mask(stream_tokens: int, questions: Questions) -> Tensor:
    """Additive mask (1 1 tokens tokens): causal, without attention between different blocks."""
    asked = questions.blocks * questions.block_tokens
    block = torch.full((stream_tokens + asked,), -1)
    block[stream_tokens:] = torch.arange(asked) // questions.block_tokens
    visible = (block[None] == -1) | (block[None] == block[:, None])
    visible = visible.tril()
    return torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))[None, None]
