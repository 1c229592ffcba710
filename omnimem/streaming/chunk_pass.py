"""The chunk pass: every layer attends to [memory ; chunk], then evicts tokens until its budget holds."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float, Int, Int8, Shaped
from torch import Tensor
from torch.nn import functional as F

from omnimem.attention.blocked import Every, attend, attend_measured
from omnimem.lazy import Once
from omnimem.memory import Memory
from omnimem.per_head import head_rows, merge_query_rows, packed, query_rows, rows_of
from omnimem.policies.base import JointPolicy, Policy, ProbePrompt
from omnimem.positions import Rotary, earlier, ranks, rotate
from omnimem.selection import Softness
from omnimem.sketches import References, encoded, stored
from omnimem.streaming.attach import StreamedAttention
from omnimem.tokens import ABSENT, HIDDEN, Counts, DeepStack, Tokens
from omnimem.view import LayerView, Probed

Recorder = Callable[[int, LayerView], None]  # sees every layer's number and view before its eviction


@runtime_checkable
class MemoryStep(Protocol):
    """How the memory of one stream passes a chunk, and how a loss reads it; the gradient modes of `tuning.gradient`.

    A value, as the memory is: the call returns the memory after the chunk and the memory step of the next chunk, which
    holds what the mode remembers of the stream. So a fork of the stream shares nothing with it.
    """

    def __call__(self, step: "ChunkStep", memory: Memory, embeddings: Tensor) -> tuple[Memory, "MemoryStep"]: ...

    def read(self, loss: Callable[[Memory], Tensor], memory: Memory) -> Tensor:
        """`loss(memory)`, with the gradient of this mode."""
        ...


@final
@dataclass(frozen=True)
class DirectStep:
    """The chunk step itself, nothing recomputed: evaluation, and plain autograd in training."""

    def __call__(self, step: "ChunkStep", memory: Memory, embeddings: Tensor) -> tuple[Memory, "DirectStep"]:
        """The memory after the chunk."""
        return step(memory, embeddings), self

    def read(self, loss: Callable[[Memory], Tensor], memory: Memory) -> Tensor:
        """`loss(memory)`."""
        return loss(memory)


@final
@dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """How a stream reads every chunk.

    It holds no memory: a step that waits in the autograd graph for backward must not refer to tensors of that graph,
    or neither is ever freed.
    """

    policy: Policy
    softness: Softness | None
    recorder: Recorder | None
    projection: Tensor | None
    probe_ids: tuple[Int[Tensor, " _"], ...] = ()  # token ids of the policy's probe prompts
    # attention and its mass in one pass, whose output differs in the last bits: never in training, where a chunk is
    # read with and without gradients
    together: bool = False
    references: References = field(default_factory=References, compare=False, repr=False)

    @property
    def per_head(self) -> bool:
        """Whether every key-value head keeps tokens of its own: layers are then processed as rows."""
        return self.policy.traits.per_head

    @property
    def joint(self) -> JointPolicy | None:
        """The policy, if its layers decide together after all have read the chunk: their pools live until then."""
        return self.policy if isinstance(self.policy, JointPolicy) and self.policy.budget is not None else None

    def padded(self, tokens: Tokens) -> bool:
        """Whether streams or heads keep unequal numbers of text tokens, and some of these are padding."""
        return self.policy.markers == "with_group" and self.policy.budget is not None and tokens.padded

    def gated(self, *, padded: bool) -> bool:
        """Whether attention must apply the gates of the memory, of which some rows may be `padded`."""
        return padded or self.softness is not None or self.policy.traits.ragged

    @property
    def probes(self) -> list[tuple[ProbePrompt, Int[Tensor, " _"]]]:
        """The policy's probe prompts and their token ids."""
        return list(zip(self.policy.traits.probes, self.probe_ids, strict=True))

    @property
    def learns(self) -> bool:
        """Whether scores have gradient."""
        return self.softness is not None and self.softness.gradient != "none"

    def feature(
        self, layer: int, states: Float[Tensor, "batch tokens width"], modality: Int8[Tensor, "batch tokens"]
    ) -> Shaped[Tensor, "batch tokens feature"]:
        """The vectors of these inputs of a layer that are carried: for redundancy, or a sketch for coverage."""
        if self.projection is None:
            return states
        bits = self.policy.measures.sketch
        if not bits:
            return states @ self.projection
        if not self.projection.shape[1]:  # nothing is compared
            return states.new_empty(*states.shape[:2], 0, dtype=stored(0, bits, learns=self.learns)[1])
        with torch.autocast(states.device.type, enabled=False):
            vector = (states.to(self.projection.dtype) @ self.projection).float()
            if bits == 2:
                vector = self.references.beyond(layer, vector, modality)
            return encoded(vector, bits, learns=self.learns)


@final
@dataclass(frozen=True, kw_only=True)
class Compaction:
    """Moves kept audio and visual tokens up to ranks that end before `end`, and rotates their keys accordingly.

    See docs/paper.md, "Positions".
    """

    opening: int  # positions below this do not move
    end: tuple[int, ...]  # of each stream, the same in all layers
    still: frozenset[int] = frozenset()  # the streams of the batch that do not move

    def __call__(self, memory: Memory, rotary: Rotary) -> Memory:
        """The memory at its new positions."""
        return Memory(layers=tuple(self.moved(layer, rotary) for layer in memory.layers))

    def moved(self, layer: Tokens, rotary: Rotary) -> Tokens:
        """The tokens of one layer at their new positions."""
        ends = [None if row in self.still else end for row, end in enumerate(self.end)]
        time = ranks(layer.positions[:, 0], layer.modality, self.opening, ends)
        positions = earlier(layer.positions, layer.modality, layer.positions[:, 0] - time)
        cos, sin = rotary((positions - layer.positions).transpose(0, 1))
        return replace(layer, positions=positions, keys=rotate(layer.keys, cos, sin))


class Numbers(NamedTuple):
    """Fields of `Tokens`, in its types."""

    positions: Int[Tensor, "batch axes tokens"]
    place: Int[Tensor, "batch places tokens"]
    group: Int[Tensor, "batch tokens"]
    order: Int[Tensor, "batch tokens"]


@final
@dataclass(frozen=True, kw_only=True)
class ChunkStep:
    """Reading a chunk as a function of the memory and the chunk's embeddings.

    It holds neither of them: it stays in the autograd graph and may run again in backward, after more chunks.
    """

    attached: StreamedAttention
    config: ReadConfig
    positions: Int[Tensor, "batch axes tokens"]
    place: Int[Tensor, "batch places tokens"]
    modality: Int8[Tensor, "batch tokens"]
    deepstack: DeepStack | None
    order: Int[Tensor, "batch tokens"]  # arrival numbers
    fed: int = 0  # tokens that arrived before the chunk, in every stream
    held: Numbers = field(init=False, repr=False)  # the whole numbers of the chunk as every layer holds them
    compaction: Compaction | None = None  # before the chunk is read
    counts: Counts | None = None  # of the chunk, where all streams of the batch hold equal numbers
    once: Once | None = None  # of a chunk that is computed again in backward: what it measures without gradient

    def __post_init__(self) -> None:  # not when first read: a captured pass may not write to it
        parts = 3 if self.config.policy.traits.needs_place else 0
        numbers = Numbers(
            positions=self.positions.int(),
            place=self.place[:, :parts].int(),
            group=self.place[:, 3].int(),
            order=self.order.int(),
        )
        object.__setattr__(self, "held", numbers)

    @property
    def appends(self) -> bool:
        """Whether the memory after the chunk is the one before it, unchanged, followed by the chunk."""
        policy = self.config.policy
        changed = policy.traits.per_head or policy.traits.ragged or policy.traits.merges
        return policy.budget is None and self.compaction is None and not changed

    def __call__(
        self, memory: Memory, embeddings: Float[Tensor, "batch tokens width"], *, states: bool = False
    ) -> Memory:
        """The memory after the chunk; with `states`, it carries the layer inputs of its tokens."""
        memory = self.compacted(memory)
        attention = ChunkAttention(self, [layer.counts for layer in memory.layers], states=states)
        return self._read(attention, embeddings, layer_tensors(memory))

    def consume(self, held: list[Memory], embeddings: Float[Tensor, "batch tokens width"]) -> Memory:
        """The memory after the chunk, given the only reference to the memory before it, in a list that is emptied.

        Each layer drops its part before it evicts, or appends the chunk to it in place: old and new tokens never exist
        together. Outside the autograd graph only.
        """
        consumed = dict(enumerate(held.pop().layers))
        if self.compaction is not None:
            for layer in consumed:
                consumed[layer] = self.compaction.moved(consumed[layer], self.attached.rotary)
        return self._read(ChunkAttention(self, (), states=False, consumed=consumed), embeddings)

    def _read(
        self,
        attention: "ChunkAttention",
        embeddings: Float[Tensor, "batch tokens width"],
        memories: Sequence[tuple[Tensor, ...]] = (),
    ) -> Memory:
        # 1. append the probe prompts to the chunk
        layers = range(self.attached.shape.layers)
        embeddings, positions, deepstack = self._with_probes(embeddings)
        # 2. run all layers: each attends to [memory ; chunk], then evicts (`ChunkAttention`)
        try:
            self.attached.run(attention, embeddings, positions, deepstack, memories)
        finally:  # a recomputation ends by an exception, as soon as backward has the tensors that it needs
            kept, views = attention.take_results()
        # 3. evict in all layers at once, if the policy decides over them together
        if (policy := self.config.joint) is not None:
            kept = self._selected(policy, [views.pop(layer) for layer in layers])
        return Memory(layers=tuple(self._settled([kept[layer] for layer in layers])))

    def _settled(self, kept: list[Tokens]) -> list[Tokens]:
        """The kept tokens without absent ones; those whose number only the device knows, in one transfer."""
        unknown = [] if self.counts is None else [layer for layer, tokens in enumerate(kept) if tokens.counts is None]
        if unknown:
            found = Counts.of_each([(kept[layer].modality, kept[layer].group) for layer in unknown])
            for layer, counts in zip(unknown, found, strict=True):
                alone = len(kept[layer].modality) == 1  # streams of a batch may hold unequal numbers of a modality
                kept[layer] = kept[layer].settled(counts if alone else counts._replace(audio=None))
        return kept

    def _selected(self, policy: JointPolicy, views: list[LayerView]) -> dict[int, Tokens]:
        """The tokens that the layers keep, decided together; `views` holds the only references to the pools."""
        kept, heads = policy.select_joint(views, self.config.softness), self.attached.shape.kv_heads
        if self.config.per_head:
            kept = [packed(kept.pop(0), heads) for _ in range(len(kept))]
        return dict(enumerate(kept))

    def _with_probes(self, embeddings: Tensor) -> tuple[Tensor, Tensor, DeepStack | None]:
        """Embeddings, positions and deepstack of the pass: the chunk, right after it each probe with a full pass."""
        read = [ids for probe, ids in self.config.probes if probe.full_pass]
        if not read:
            return embeddings, self.positions, self.deepstack
        rows = torch.cat([self.probe_embeddings(ids) for ids in read], dim=1)
        places = torch.cat([self.probe_positions(ids) for ids in read], dim=2)
        deepstack = self.deepstack
        if deepstack is not None:
            plain = torch.zeros(rows.shape[:2], dtype=torch.bool, device=rows.device)
            deepstack = replace(deepstack, mask=torch.cat([deepstack.mask, plain], dim=1))
        return torch.cat([embeddings, rows], dim=1), torch.cat([self.positions, places], dim=2), deepstack

    def probe_embeddings(self, ids: Int[Tensor, " tokens"]) -> Float[Tensor, "batch tokens width"]:
        """Embeddings of a probe, the same for every stream."""
        return self.attached.embed(ids[None]).expand(self.modality.shape[0], -1, -1)

    def probe_positions(self, ids: Int[Tensor, " tokens"]) -> Int[Tensor, "batch axes tokens"]:
        """Positions of a probe: those that follow the chunk."""
        last = self.positions.amax(dim=(1, 2))[:, None]
        places = last + 1 + torch.arange(len(ids), device=last.device)
        return places[:, None].expand(-1, self.positions.shape[1], -1)

    def compacted(self, memory: Memory) -> Memory:
        """The memory at the positions at which the chunk reads it."""
        return memory if self.compaction is None else self.compaction(memory, self.attached.rotary)

    def layers(
        self, memory: Mapping[int, Tokens], states: Float[Tensor, "batch tokens width"], *, recompute_kv: bool = False
    ) -> tuple[Float[Tensor, "batch tokens width"], list[Tokens]]:
        """Output of the consecutive layers whose memory is given, and the tokens that each keeps, with layer inputs.

        With `recompute_kv`, keys and values of the memory are computed from its layer inputs, so that the weights
        learn from them.
        """
        counts = {layer: tokens.counts for layer, tokens in memory.items()}
        attention = ChunkAttention(self, counts, states=True, recompute_kv=recompute_kv)
        flat = {layer: tokens.tensors() for layer, tokens in memory.items()}
        try:
            states = self.attached.layers(attention, states, self.positions, self.deepstack, flat)
        finally:  # as in `__call__`
            kept, _ = attention.take_results()
        return states, self._settled([kept[layer] for layer in memory])

    def arriving(
        self,
        layer: int,
        states: Float[Tensor, "batch tokens width"],
        keys: Float[Tensor, "batch kv_heads tokens dim"],
        values: Float[Tensor, "batch kv_heads tokens dim"],
    ) -> Tokens:
        """The chunk as entries of a layer, with its inputs, keys and values."""
        zeros = torch.zeros(self.modality.shape, dtype=torch.float32, device=keys.device)
        return Tokens(
            keys=keys,
            values=values,
            positions=self.held.positions,
            place=self.held.place,
            group=self.held.group,
            modality=self.modality,
            order=self.held.order,
            importance=zeros,
            novelty=zeros,
            feature=self.config.feature(layer, states, self.modality),
            gate=torch.where(self.modality == ABSENT, HIDDEN, zeros) if self.config.policy.traits.ragged else zeros,
            states=states[..., :0],
            owner=self.modality[:, None, :][:, :0],
            counts=self.counts,
        )


@final
class ChunkAttention:
    """A layer step: attend to [memory ; chunk], then evict until the layer's budget holds.

    Layers that are recomputed in backward refer to their step, so the step holds neither memory nor embeddings.
    Probes follow the chunk: each attends to [memory ; chunk] and its own past; the chunk attends to no probe.
    """

    def __init__(
        self,
        chunk: ChunkStep,
        counts: Sequence[Counts | None] | Mapping[int, Counts | None],
        *,
        states: bool,
        recompute_kv: bool = False,
        consumed: dict[int, Tokens] | None = None,
    ) -> None:
        """`counts` are those of the memory that each layer will be given, where they are known.

        `consumed`, outside the autograd graph, is the memory itself, which nobody else refers to: layers take it from
        there, and are given none.
        """
        self.chunk, self.counts, self.states, self.recompute_kv = chunk, counts, states, recompute_kv
        self._consumed = consumed
        self._kept: dict[int, Tokens] | None = {}
        self._views: dict[int, LayerView] = {}

    def __call__(
        self, layer: int, states: Tensor, queries: Tensor, keys: Tensor, values: Tensor, scale: float, *memory: Tensor
    ) -> Tensor:
        chunk, config, heads = self.chunk, self.chunk.config, keys.shape[1]
        policy, softness, count = config.policy, config.softness, chunk.modality.shape[1]
        # 1. pool = [memory ; chunk]; where heads keep tokens of their own, each head is a row from here on
        fresh = chunk.arriving(layer, states[:, :count], keys[:, :, :count], values[:, :, :count])
        if self._consumed is None:
            pool = self._pool(layer, replace(Tokens.of(memory), counts=self.counts[layer]), states[:, :count], fresh)
        else:
            pool = self._pool(layer, self._consumed.pop(layer), states[:, :count], fresh)
        if config.per_head:
            queries, keys, values = query_rows(queries, heads), head_rows(keys), head_rows(values)
        # 2. the chunk attends to the pool; where its policy measures that, both in one pass if that is faster
        padded = config.padded(pool)
        gate, measured, asking = pool.gate if config.gated(padded=padded) else None, None, queries[:, :, :count]
        every, both = Every.drawn(policy.measures.query_stride, count, chunk.fed, layer), None
        if config.together and policy.traits.needs_mass and policy.budget is not None:
            both = attend_measured(asking, pool.keys, pool.values, scale=scale, gate=gate, every=every)
        if both is None:
            output = attend(asking, pool.keys, pool.values, scale=scale, gate=gate)
        else:
            output, measured = both
        # 3. the probes attend to the pool and to themselves
        view = LayerView(
            pool=pool,
            new=count,
            queries=asking,
            measured=measured,
            every=every,
            scale=scale,
            measures=policy.measures,
            gradient="none" if softness is None else softness.gradient,
            rotary=chunk.attached.rotary,
            probes=self._probed(layer, queries, keys),
            heads=heads if config.per_head else 1,
            arrived=self._arrived(states[:, :count], heads),
            once=None if chunk.once is None else chunk.once.of(layer),
            settles=chunk.counts is not None,
            padded=padded,
        )
        if queries.shape[2] > count:
            output = torch.cat([output, *self._probe_outputs(view, gate, queries, keys, values)], dim=2)
        # 4. evict: keep the layer's budget of the pool
        self._evict(layer, view, heads)
        return merge_query_rows(output, heads) if config.per_head else output

    def _arrived(self, states: Tensor, heads: int) -> Tensor | None:
        """The layer inputs of the chunk, of every row, where the vectors that are carried are not enough."""
        config = self.chunk.config
        if not config.policy.measures.sketch:
            return None
        return states.repeat_interleave(heads, dim=0) if config.per_head else states

    def _pool(self, layer: int, old: Tokens, states: Tensor, fresh: Tokens) -> Tokens:
        """The memory followed by the chunk, with layer inputs where they are carried."""
        attached = self.chunk.attached
        if self.chunk.config.per_head:
            heads = attached.shape.kv_heads
            return rows_of(old, heads).cat(rows_of(fresh, heads))
        if self.states:
            fresh = replace(fresh, states=states)
            if not old.count:  # the states of an empty memory have width 0
                old = replace(old, states=states[:, :0])
        if self.recompute_kv and old.count:
            old = kv_from_states(old, attached, layer)
        return old.extended(fresh) if self._consumed is not None and self.chunk.appends else old.cat(fresh)

    def _evict(self, layer: int, view: LayerView, heads: int) -> None:
        """Note the tokens that the layer keeps, or its view where all layers decide together after the pass."""
        config = self.chunk.config
        if config.recorder is not None:
            config.recorder(layer, view)
        if config.joint is not None:
            if self._kept is not None:
                self._views[layer] = view
            return
        kept = config.policy.keep(layer, view, config.softness)
        if self._kept is not None:
            self._kept[layer] = packed(kept, heads) if config.per_head else kept

    def _spans(self) -> Iterator[slice]:
        """Which queries of the pass belong to each probe with a full pass."""
        first = self.chunk.modality.shape[1]
        for probe, ids in self.chunk.config.probes:
            if probe.full_pass:
                yield slice(first, first + len(ids))
                first += len(ids)

    def _probed(self, layer: int, queries: Tensor, keys: Tensor) -> tuple[Probed, ...]:
        """Queries and keys of every probe in this layer."""
        chunk, spans, found = self.chunk, self._spans(), []
        for probe, ids in chunk.config.probes:
            if probe.full_pass:
                span = next(spans)
                found.append(Probed(queries=queries[:, :, span], keys=keys[:, :, span]))
                continue
            probe_queries, probe_keys, _ = chunk.attached.project(
                layer, chunk.probe_embeddings(ids), chunk.probe_positions(ids)
            )
            if chunk.config.per_head:
                probe_queries, probe_keys = query_rows(probe_queries, probe_keys.shape[1]), head_rows(probe_keys)
            found.append(Probed(queries=probe_queries, keys=probe_keys))
        return tuple(found)

    def _probe_outputs(
        self, view: LayerView, gate: Tensor | None, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Iterator[Tensor]:
        """Attention output of the probes with a full pass."""
        pool = view.pool
        for span in self._spans():
            yield attend(
                queries[:, :, span],
                torch.cat([pool.keys, keys[:, :, span]], dim=2),
                torch.cat([pool.values, values[:, :, span]], dim=2),
                scale=view.scale,
                gate=gate if gate is None else F.pad(gate, (0, span.stop - span.start)),
            )

    def take_results(self) -> tuple[dict[int, Tokens], dict[int, LayerView]]:
        """Kept tokens and views by layer; the step drops them and notes no more, as a layer may be recomputed alone."""
        kept, views, self._kept, self._views = self._kept, self._views, None, {}
        return kept or {}, views


def kv_from_states(tokens: Tokens, attached: StreamedAttention, layer: int) -> Tokens:
    """The tokens with the gradient of keys and values recomputed from their states; the values do not change.

    x + (y - stop(y)) equals x to the bit: rounding of another matrix shape or other dropout masks have no effect.
    """
    _, keys, values = attached.project(layer, tokens.states, tokens.positions)
    keys, values = tokens.keys + (keys - keys.detach()), tokens.values + (values - values.detach())
    return replace(tokens, keys=keys, values=values)


def layer_tensors(memory: Memory) -> list[tuple[Tensor, ...]]:
    """The flat tensors of each layer."""
    return [layer.tensors() for layer in memory.layers]
