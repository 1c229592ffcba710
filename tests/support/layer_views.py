"""Made-up pools of one layer: what a view shows, drawn from a seed, without a model."""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from omnimem.policies.base import Policy
from omnimem.selection import Softness
from omnimem.tokens import Tokens, place_of
from omnimem.view import LayerView, Measures, ScoreGradient

SCALE = 0.35
LAYOUT = (0, 2, 2, 2, 1, 2, 2, 1, 2)  # text, audio and visual tokens as they arrive, over and over


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A chunk at one layer: its queries, its keys, and the states that enter the layer."""

    queries: Tensor
    keys: Tensor
    states: Tensor
    modality: Tensor


def arrivals(lengths: list[int], *, batch: int = 1, seed: int = 0, width: int = 12, layout=LAYOUT) -> list[Arrival]:
    """Chunks of these lengths with 4 query heads on 2 key heads; neighbours are alike, with cosines near 0.8."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    states = torch.randn(batch, count, width, generator=generator)
    for k in range(1, count):
        states[:, k] = 0.8 * states[:, k - 1] + 0.6 * states[:, k]
    queries = torch.randn(batch, 4, count, 6, generator=generator) * 2
    keys = torch.randn(batch, 2, count, 6, generator=generator)
    kinds = torch.tensor((layout * count)[:count], dtype=torch.int8).expand(batch, count)
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return [
        Arrival(queries=queries[:, :, a:b], keys=keys[:, :, a:b], states=states[:, a:b], modality=kinds[:, a:b])
        for a, b in pairwise(ends)
    ]


def tokens_of(arrival: Arrival, fed: int = 0) -> Tokens:
    """A chunk as a layer remembers it, `fed` tokens after the start of the stream."""
    batch, count = arrival.modality.shape
    zeros = torch.zeros(batch, count)
    order = torch.arange(fed, fed + count).expand(batch, count)
    return Tokens(
        keys=arrival.keys,
        values=arrival.keys * 0.5,
        positions=order[:, None].expand(batch, 3, count),
        place=place_of(order[:, None].expand(batch, 3, count))[:, :3],
        group=place_of(order[:, None].expand(batch, 3, count))[:, 3],
        modality=arrival.modality,
        order=order,
        importance=zeros,
        novelty=zeros,
        feature=arrival.states,
        gate=zeros,
        states=zeros[..., None][..., :0],
        owner=arrival.modality[:, None][:, :0],
    )


def view_of(
    arrival: Arrival,
    measures: Measures | None = None,
    memory: Tokens | None = None,
    fed: int = 0,
    gradient: ScoreGradient = "redundancy",
) -> LayerView:
    """What a scorer sees when `arrival` meets `memory`."""
    fresh = tokens_of(arrival, fed)
    return LayerView(
        pool=fresh if memory is None else memory.cat(fresh),
        new=fresh.count,
        queries=arrival.queries,
        scale=SCALE,
        measures=measures or Measures(),
        gradient=gradient,
    )


def with_states(arrival: Arrival, states: Tensor) -> Arrival:
    return replace(arrival, states=states)


LENGTHS = [18, 7, 25, 1, 30, 12]


def run(policy: Policy, chunks, softness: Softness | None = None):
    """The memory of layer 0 after each chunk."""
    memory, fed, after = None, 0, []
    for chunk in chunks:
        view = view_of(chunk, policy.measures, memory, fed)
        memory = policy.keep(0, view, softness)
        fed += view.new
        after.append(memory)
    return after
