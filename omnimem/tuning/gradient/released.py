"""The gradient of the paper's release, and of the paper's text where the two differ.

See docs/paper.md, "Gradient in the release" and "Differences between paper and release".
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from omnimem.attention.blocked import Every, attend
from omnimem.errors import UserError
from omnimem.memory import Memory
from omnimem.policies.base import Policy, ScoredPolicy
from omnimem.scoring import Perturbation
from omnimem.streaming.attach import StreamedAttention
from omnimem.streaming.chunk_pass import ChunkStep, ReadConfig
from omnimem.tokens import Tokens
from omnimem.tuning.gradient.full import FullGradient
from omnimem.tuning.gradient.horizon import ChunkRecord, RandomState
from omnimem.view import LayerView, Measures


class GradientError(UserError):
    """A gradient mode that does not work with this model; the message gives the reason and the fix."""


def by_similarity(policy: Policy) -> Policy:
    """A policy with the same slots and measures whose score is redundancy alone (the release at lambda = 0)."""
    scorer = Perturbation(sharpness=0.0)
    return ScoredPolicy(name=policy.name, budget=policy.budget, measures=policy.measures, scorer=scorer)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class _LastChunk:
    """The latest chunk at the stop layer, and the record to read it again from the first layer on."""

    step: ChunkStep
    pool: Tokens  # [carrier ; chunk], before the eviction
    record: ChunkRecord | None


@final
@dataclass(frozen=True, kw_only=True)
class ReleasedGradient:
    """`gradient: released`: chunks run the layers below `stop_layer` alone, each on a detached input; the inputs that
    `stop_layer` keeps (the carrier) represent the past for the layers above, which run on the last chunk and the
    question.

    So the layer below `stop_layer` learns from every chunk, the layers from `stop_layer` on from the last chunk, and
    all layers from the question. On the last chunk `stop_layer` reads [carrier ; chunk] as one sequence, and its output
    is evicted as its input was; every layer above reads the kept outputs as a sequence without history and keeps its
    own budget of them. So the actual budget above is min(B[stop_layer], B[l]), and the stream differs from evaluation.

    With `whole_last_chunk` (`gradient: paper`), all layers learn from the last chunk, as the paper's text says.
    """

    stop_layer: int
    whole_last_chunk: bool = False
    each: FullGradient = field(default_factory=FullGradient)  # how the chunks with gradient are kept for backward
    last: _LastChunk | None = None  # of this stream

    def __call__(self, step: ChunkStep, memory: Memory, embeddings: Tensor) -> tuple[Memory, "ReleasedGradient"]:
        """The memory after the chunk: below `stop_layer` constants, at it the carrier, above it nothing.

        Raises GradientError when visual features are added above `stop_layer`.
        """
        # 1. the memory at the positions of this chunk
        stop, before, random = self.stop_layer, step.compacted(memory), RandomState.now(embeddings)
        levels = 0 if step.deepstack is None else len(step.deepstack.features)
        if levels > stop:
            raise GradientError(
                f"tuning.stop_layer = {stop}: this model adds visual features up to layer {levels - 1}; "
                f"raise it to at least {levels}"
            )
        # 2. the layers below the stop layer: the last of them in the graph, on constants
        fixed = step if step.deepstack is None else replace(step, deepstack=step.deepstack.detached())
        with torch.no_grad():
            states, kept = fixed.layers(dict(enumerate(before.layers[: stop - 1])), embeddings.detach())
        entering, top = self._run_in_graph(fixed, {stop - 1: before.layers[stop - 1]}, states)
        kept = [*kept, *(tokens.detached() for tokens in top)]
        # 3. the stop layer keeps inputs by their redundancy
        pool = _pool(step, before.layers[stop], entering)
        carrier = _kept_inputs(pool, by_similarity(step.config.policy).keep(stop, _view_of_inputs(pool, step)))
        if step.config.padded(carrier):
            raise GradientError(
                "tuning.gradient = released or paper reads what a layer keeps as one sequence, and markers: with_group "
                "keeps unequal numbers of text tokens in a batch; set the batch size to 1, or markers: keep"
            )
        # 4. the memory, and the last chunk for `read`
        record = None
        if self.whole_last_chunk:
            record = ChunkRecord(step=step, embeddings=embeddings, before=before, random=random)
        memory = Memory(layers=(*kept, carrier, *before.layers[stop + 1 :]))
        return memory, replace(
            self, last=_LastChunk(step=step, pool=pool, record=record if self.whole_last_chunk else None)
        )

    def read(self, loss: Callable[[Memory], Tensor], memory: Memory) -> Tensor:
        """`loss` of the memory once the layers from `stop_layer` on have read the carrier and the last chunk."""
        last = self.last
        if last is None:  # no chunk was fed
            return self.each.read(loss, memory)
        below, pool = memory.layers[: self.stop_layer], last.pool
        if last.record is not None:
            below, pool = self._read_again(last.step, last.record)
        return self.each.read(loss, Memory(layers=(*below, *self._above(last.step, pool))))

    def _run_in_graph(
        self, step: ChunkStep, memory: dict[int, Tokens], states: Float[Tensor, "batch tokens width"]
    ) -> tuple[Float[Tensor, "batch tokens width"], list[Tokens]]:
        """Consecutive layers in the graph; their weights learn from keys and values of the memory too."""
        layers = tuple(memory)  # the closure must hold no tensor, which would stay until backward

        def flat(states: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            given = dict(zip(layers, Memory.of(tensors).layers, strict=True))
            passed, kept = step.layers(given, states, recompute_kv=True)
            return passed, *Memory(layers=tuple(kept)).tensors()

        inputs = Memory(layers=tuple(memory.values())).tensors()
        passed, *kept = self.each.hold(flat, states, *inputs)
        return passed, list(Memory.of(kept).layers)

    def _read_again(self, step: ChunkStep, record: ChunkRecord) -> tuple[tuple[Tokens, ...], Tokens]:
        """The last chunk with all layers below `stop_layer` in the graph: their memory, the pool of `stop_layer`."""
        stop, before = self.stop_layer, record.before
        with record.random.restored():
            entering, kept = self._run_in_graph(step, dict(enumerate(before.layers[:stop])), record.embeddings)
        # their keys and values are in the graph already
        below = tuple(replace(tokens, states=tokens.states[..., :0]) for tokens in kept)
        return below, _pool(step, before.layers[stop], entering)

    def _above(self, step: ChunkStep, pool: Tokens) -> tuple[Tokens, ...]:
        """Memory of the layers from `stop_layer` on as the question reads it, keys and values in the graph."""
        attached, config, new, fed = step.attached, step.config, step.modality.shape[1], step.fed
        stop = self.stop_layer  # the closure must not hold `self`, whose last chunk has tensors

        def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
            tokens, kept = Tokens.of(tensors), []
            states, tokens = tokens.states, replace(tokens, states=tokens.states[..., :0])
            for layer in range(stop, attached.shape.layers):
                fresh = new if layer == stop else None
                states, own = _sequence(attached, SequenceAttention(config, fresh, fed), layer, tokens, states)
                kept.append(own)
                if layer == stop:
                    states = _kept_inputs(replace(tokens, states=states), own).states
                    tokens = tokens.gather(_places(tokens, own))
            return Memory(layers=tuple(kept)).tensors()

        return Memory.of(self.each.hold(flat, *pool.tensors())).layers


@final
class SequenceAttention:
    """A layer step: attend within one sequence without history, then keep the layer's budget of it."""

    def __init__(self, config: ReadConfig, new: int | None, fed: int) -> None:
        """The last `new` tokens (None: all) are new to the layer; `fed` arrived before the chunk."""
        self.config, self.new, self.fed = config, new, fed
        self._kept: list[Tokens] | None = []

    def __call__(
        self, layer: int, states: Tensor, queries: Tensor, keys: Tensor, values: Tensor, scale: float, *memory: Tensor
    ) -> Tensor:
        config = self.config
        pool = replace(Tokens.of(memory), keys=keys, values=values, feature=config.feature(states.detach()))
        view = LayerView(
            pool=pool,
            new=self.new or pool.count,
            queries=queries,
            scale=scale,
            measures=config.policy.measures,
            every=Every.drawn(config.policy.measures.query_stride, queries.shape[2], self.fed, layer),
            arrived=_arrived(states, self.new or pool.count, config.policy.measures),
            gradient="none",
        )
        kept = config.policy.keep(layer, view)
        if self._kept is not None:
            self._kept.append(kept)
        return attend(queries, keys, values, scale=scale)

    def take_results(self) -> list[Tokens]:
        """The tokens that the layer kept; the step drops them and notes no more."""
        kept, self._kept = self._kept, None
        return kept or []


def _sequence(
    attached: StreamedAttention, attention: SequenceAttention, layer: int, tokens: Tokens, states: Tensor
) -> tuple[Tensor, Tokens]:
    """Output and kept tokens of one layer over `tokens`."""
    try:
        states = attached.layers(attention, states, tokens.positions, None, {layer: tokens.tensors()})
    finally:  # a recomputation ends by an exception
        kept = attention.take_results()
    return states, kept[0]


def _pool(step: ChunkStep, carrier: Tokens, entering: Float[Tensor, "batch tokens width"]) -> Tokens:
    """[carrier ; chunk] as inputs of the stop layer: states in the graph, keys and values zero."""
    shape, (batch, count) = step.attached.shape, step.modality.shape
    none = torch.zeros(batch, shape.kv_heads, count, shape.dim, dtype=entering.dtype, device=entering.device)
    fresh = replace(step.arriving(entering.detach(), none, none), states=entering)
    if not carrier.count:
        carrier = replace(carrier, states=entering[:, :0])
    return carrier.cat(fresh)


def _view_of_inputs(pool: Tokens, step: ChunkStep) -> LayerView:
    """The view of a layer that is not run: only redundancy can be measured, on the exact inputs where the policy
    carries no feature.
    """
    measures, new = step.config.policy.measures, step.modality.shape[1]
    feature = pool.feature if pool.feature.shape[-1] else pool.states.detach()
    arrived = _arrived(pool.states, new, measures)
    bare = replace(pool, states=pool.states[..., :0], feature=feature)
    return LayerView(
        pool=bare, new=new, queries=pool.keys, scale=1.0, measures=measures, arrived=arrived, gradient="none"
    )


def _arrived(states: Tensor, new: int, measures: Measures) -> Tensor | None:
    """The last `new` layer inputs, where redundancy reads them and no feature (`LayerView.arrived`)."""
    return states[:, states.shape[1] - new :] if measures.sketch else None


def _places(pool: Tokens, kept: Tokens) -> Int[Tensor, "batch kept"]:
    """Indices of kept tokens in the pool; both are in order of arrival."""
    return torch.searchsorted(pool.order.contiguous(), kept.order.contiguous())


def _kept_inputs(pool: Tokens, kept: Tokens) -> Tokens:
    """The kept tokens with states and feature of the pool; unlike `gather`, indexing saves no pool for backward."""
    rows, places = torch.arange(pool.states.shape[0], device=pool.states.device)[:, None], _places(pool, kept)
    return replace(kept, states=pool.states[rows, places], feature=pool.feature[rows, places])
