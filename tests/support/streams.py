"""Streams over a random text model: policies by name, chunk lengths, packed questions, kept arrival numbers."""

from collections.abc import Sequence

import torch

from omnimem.budget import Budget
from omnimem.policies import ControlOptions, DistinctOptions, PerturbationOptions
from omnimem.policies.base import Policy
from omnimem.streaming.attach import StreamedAttention
from omnimem.streaming.prompt_pass import PADDING, Prompt
from omnimem.streaming.stream import Stream
from omnimem.tokens import Chunk

LENGTHS = [20, 31, 1, 15, 29]  # of 96 tokens: 3 of text, then 4 visual, 1 audio and 1 of text over and over
UNEQUAL = ((1, 1), (3, 20), (9, 4), (2, 7))  # audio, visual slots of the four layers
POLICIES = ("distinct", "omnimem", "paper", "released", "random", "recency", "uniform")


def policy_of(name: str, slots: Sequence[tuple[int, int]] = UNEQUAL, *, split: bool = True) -> Policy:
    budget = Budget(slots=tuple(slots), split=split)
    if name in ("random", "recency", "uniform"):
        return ControlOptions(name=name).build(budget)
    return DistinctOptions().build(budget) if name == "distinct" else PerturbationOptions(name=name).build(budget)


def levels_of(family: str) -> int:
    return 2 if family.startswith("qwen3") else 0


def fed(attached: StreamedAttention, policy: Policy, chunks: Sequence[Chunk], **options: object) -> Stream:
    stream = Stream(attached, policy, batch=len(chunks[0].modality), **options)
    for chunk in chunks:
        stream.feed(chunk)
    return stream


def prompt_of(rows: Sequence[Sequence[Sequence[int]]]) -> Prompt:
    """Packed questions: for each stream, for each question its token ids; shorter rows are padded."""
    width = max(sum(len(question) for question in row) for row in rows)
    packed = []
    for row in rows:
        ids = [number for question in row for number in question]
        segments = [n for n, question in enumerate(row) for _ in question]
        offsets = [place for question in row for place in range(len(question))]
        fill = width - len(ids)
        packed.append([ids + [0] * fill, segments + [PADDING] * fill, offsets + [0] * fill])
    ids, segments, offsets = torch.tensor(packed).unbind(1)
    return Prompt(ids=ids, segments=segments, offsets=offsets)


def orders(stream: Stream) -> list[list[list[int]]]:
    """Arrival numbers kept, [layer][stream]."""
    return [layer.order.tolist() for layer in stream.memory.layers]
