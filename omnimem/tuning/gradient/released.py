"""What the paper's release does (method 2 and 8.10), and what the paper says where the two differ."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from omnimem.attention.blocked import attend
from omnimem.errors import UserError
from omnimem.memory import Memory
from omnimem.policies.base import Policy, ScoredPolicy
from omnimem.scoring import Perturbation
from omnimem.streaming.attach import StreamedAttention
from omnimem.streaming.chunk_pass import ChunkStep, ReadConfig
from omnimem.tokens import Tokens
from omnimem.tuning.gradient.full import FullGradient
from omnimem.tuning.gradient.horizon import Draws, Link
from omnimem.view import LayerView


class GradientError(UserError):
    """A gradient mode that this model cannot be tuned with; the message says why and how to repair it."""


def by_similarity(policy: Policy) -> Policy:
    """The same slots and the same measure of redundancy, which alone decides (the release at lambda = 0)."""
    scorer = Perturbation(sharpness=0.0)
    return ScoredPolicy(name=policy.name, budget=policy.budget, measures=policy.measures, scorer=scorer)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class _Last:
    """The latest chunk at the stop layer, and what is needed to read it once more from its first layer on."""

    step: ChunkStep
    pool: Tokens  # [carrier ; chunk], before the cut
    link: Link | None


@final
@dataclass(frozen=True, kw_only=True)
class ReleasedGradient:
    """`gradient: released`: chunks run the layers below `stop_layer` alone, each from an input without a past; what
    `stop_layer` keeps of its inputs carries the past to the layers above, which the last chunk and the question run.

    So of a chunk the layer below `stop_layer` learns, of the last chunk also the layers from there on, of the question
    all. On the last chunk `stop_layer` reads [carrier ; chunk] as one sequence, its output is cut as its input was, and
    every layer above reads that cut as a sequence without history and keeps its own share of it; so the real budget
    above is min(B[stop_layer], B[l]), and the stream is another one than in evaluation.

    With `whole_last_chunk` (`gradient: paper`), as the paper words it, all layers learn from the last chunk.
    """

    stop_layer: int
    whole_last_chunk: bool = False
    each: FullGradient = field(default_factory=FullGradient)  # how what is learned from is kept for backward

    def __call__(self, step: ChunkStep, memory: Memory, embeddings: Tensor) -> Memory:
        """The memory after the chunk: below `stop_layer` constants, at it the carrier, above it nothing.

        Raises GradientError when visual features are added above `stop_layer`.
        """
        stop, before, draws = self.stop_layer, step.compacted(replace(memory, note=None)), Draws.now(embeddings)
        levels = 0 if step.deepstack is None else len(step.deepstack.features)
        if levels > stop:
            raise GradientError(
                f"tuning.stop_layer = {stop}: this model adds visual features up to layer {levels - 1}; "
                f"raise it to at least {levels}"
            )
        with torch.no_grad():
            states, kept = step.layers(dict(enumerate(before.layers[: stop - 1])), embeddings)
        entering, top = self._learned(step, {stop - 1: before.layers[stop - 1]}, states)
        kept = [*kept, *(Tokens.of([tensor.detach() for tensor in tokens.tensors()]) for tokens in top)]
        pool = _pool(step, before.layers[stop], entering)
        carrier = _cut(pool, by_similarity(step.manner.policy).keep(stop, _unread(pool, step)))
        link = Link(step=step, embeddings=embeddings, before=before, draws=draws) if self.whole_last_chunk else None
        layers = (*kept, carrier, *before.layers[stop + 1 :])
        return Memory(layers=layers, note=_Last(step=step, pool=pool, link=link))

    def read(self, loss: Callable[[Memory], Tensor], memory: Memory) -> Tensor:
        """`loss` of the memory once the layers from `stop_layer` on have read the carrier and the last chunk."""
        match memory.note:
            case _Last() as last:
                below, pool = memory.layers[: self.stop_layer], last.pool
                if last.link is not None:
                    below, pool = self._once_more(last.step, last.link)
                above = self._above(last.step, pool)
                return self.each.read(loss, Memory(layers=(*below, *above)))
        return self.each.read(loss, memory)  # nothing was fed

    def _learned(
        self, step: ChunkStep, memory: dict[int, Tokens], states: Float[Tensor, "batch tokens width"]
    ) -> tuple[Float[Tensor, "batch tokens width"], list[Tokens]]:
        """Consecutive layers in the graph; keys and values of their memory learn."""
        layers = tuple(memory)  # no tensor in the closure, where it would stay until backward

        def flat(states: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            given = dict(zip(layers, Memory.of(tensors).layers, strict=True))
            passed, kept = step.layers(given, states, recompute_kv=True)
            return passed, *Memory(layers=tuple(kept)).tensors()

        inputs = Memory(layers=tuple(memory.values())).tensors()
        passed, *kept = self.each.hold(flat, states, *inputs)
        return passed, list(Memory.of(kept).layers)

    def _once_more(self, step: ChunkStep, link: Link) -> tuple[tuple[Tokens, ...], Tokens]:
        """The last chunk with all layers below `stop_layer` in the graph: what they keep, and what enters it."""
        stop, before = self.stop_layer, link.before
        with link.draws.again():
            entering, kept = self._learned(step, dict(enumerate(before.layers[:stop])), link.embeddings)
        # their keys and values are in the graph already
        below = tuple(replace(tokens, states=tokens.states[..., :0]) for tokens in kept)
        return below, _pool(step, before.layers[stop], entering)

    def _above(self, step: ChunkStep, pool: Tokens) -> tuple[Tokens, ...]:
        """What the layers from `stop_layer` on keep for the question, keys and values in the graph."""
        attached, manner, new = step.attached, step.manner, step.modality.shape[1]

        def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
            tokens, kept = Tokens.of(tensors), []
            states, tokens = tokens.states, replace(tokens, states=tokens.states[..., :0])
            for layer in range(self.stop_layer, attached.shape.layers):
                fresh = new if layer == self.stop_layer else None
                states, mine = _sequence(attached, manner, layer, tokens, states, fresh)
                kept.append(mine)
                if layer == self.stop_layer:
                    states = _cut(replace(tokens, states=states), mine).states
                    tokens = tokens.gather(_places(tokens, mine))
            return Memory(layers=tuple(kept)).tensors()

        return Memory.of(self.each.hold(flat, *pool.tensors())).layers


@final
class _ReadSequence:
    """A layer step: tokens read as one sequence without history, of which the layer keeps its budget."""

    def __init__(self, manner: ReadConfig, new: int | None) -> None:
        self.manner, self.new = manner, new
        self._kept: list[Tokens] | None = []

    def __call__(
        self, layer: int, states: Tensor, queries: Tensor, keys: Tensor, values: Tensor, scale: float, *memory: Tensor
    ) -> Tensor:
        manner = self.manner
        pool = replace(Tokens.of(memory), keys=keys, values=values, feature=manner.feature(states.detach()))
        view = LayerView(
            pool=pool,
            new=self.new or pool.count,
            queries=queries,
            scale=scale,
            measures=manner.policy.measures,
            gradient="none",
        )
        kept = manner.policy.keep(layer, view)
        if self._kept is not None:
            self._kept.append(kept)
        return attend(queries, keys, values, scale=scale)

    def take_results(self) -> list[Tokens]:
        """What the layer kept; the step forgets it, and notes no more."""
        kept, self._kept = self._kept, None
        return kept or []


def _sequence(
    attached: StreamedAttention, manner: ReadConfig, layer: int, tokens: Tokens, states: Tensor, new: int | None
) -> tuple[Tensor, Tokens]:
    """One layer over `tokens`, of which the `new` last ones (None: all) come to it now: output, and what it keeps."""
    reader = _ReadSequence(manner, new)
    try:
        states = attached.layers(reader, states, tokens.positions, None, {layer: tokens.tensors()})
    finally:  # a recomputation ends by an exception
        kept = reader.take_results()
    return states, kept[0]


def _pool(step: ChunkStep, carrier: Tokens, entering: Float[Tensor, "batch tokens width"]) -> Tokens:
    """[carrier ; chunk] as inputs of the stop layer: their states in the graph, no keys and values yet."""
    shape, (batch, count) = step.attached.shape, step.modality.shape
    none = torch.zeros(batch, shape.kv_heads, count, shape.dim, dtype=entering.dtype, device=entering.device)
    fresh = replace(step.arriving(entering.detach(), none, none), states=entering)
    if not carrier.count:
        carrier = replace(carrier, states=entering[:, :0])
    return carrier.cat(fresh)


def _unread(pool: Tokens, step: ChunkStep) -> LayerView:
    """The pool of a layer that is not run: its redundancy alone can be judged, on the very inputs where the policy
    carries no feature.
    """
    measures, new = step.manner.policy.measures, step.modality.shape[1]
    feature = pool.feature if pool.feature.shape[-1] else pool.states.detach()
    bare = replace(pool, states=pool.states[..., :0], feature=feature)
    return LayerView(pool=bare, new=new, queries=pool.keys, scale=1.0, measures=measures, gradient="none")


def _places(pool: Tokens, kept: Tokens) -> Int[Tensor, "batch kept"]:
    """Where kept tokens stood in the pool: both are in order of arrival."""
    return torch.searchsorted(pool.order.contiguous(), kept.order.contiguous())


def _cut(pool: Tokens, kept: Tokens) -> Tokens:
    """The kept tokens with states and feature of the pool; unlike `gather`, an index saves no pool for backward."""
    rows, places = torch.arange(pool.states.shape[0], device=pool.states.device)[:, None], _places(pool, kept)
    return replace(kept, states=pool.states[rows, places], feature=pool.feature[rows, places])
