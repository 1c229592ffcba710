"""The chunk pass: every layer attends to [memory ; chunk], then keeps its budget of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor
from torch.nn import functional as F

from omnimem.attention.blocked import attend
from omnimem.memory import Memory
from omnimem.per_head import of_rows, packed, query_rows, rows_of
from omnimem.policies.base import Policy, ProbePrompt
from omnimem.positions import Rotary, earlier, ranks, rotate
from omnimem.selection import Softness
from omnimem.streaming.attach import StreamedAttention
from omnimem.tokens import ABSENT, HIDDEN, DeepStack, Tokens
from omnimem.view import LayerView, Probed

Recorder = Callable[[int, LayerView], None]


@runtime_checkable
class MemoryStep(Protocol):
    """How a memory passes from chunk to chunk; `tuning.gradient` has the ways that matter in training."""

    def __call__(self, step: "ChunkStep", memory: Memory, embeddings: Tensor) -> Memory: ...


def step_directly(step: Callable[[Memory, Tensor], Memory], memory: Memory, embeddings: Tensor) -> Memory:
    """The step itself, nothing recomputed."""
    return step(memory, embeddings)


@final
@dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """What a stream does with every chunk. It holds no memory: a step that waits in the graph for backward must not
    hold on to what the graph produced, or neither is ever freed.
    """

    policy: Policy
    softness: Softness | None
    recorder: Recorder | None
    projection: Tensor | None
    probes: tuple[Int[Tensor, " _"], ...] = ()  # token ids of those that the policy asks for

    @property
    def gated(self) -> bool:
        """Whether attention must heed the gates of what is remembered."""
        return self.softness is not None or self.policy.ragged

    def feature(self, states: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens feature"]:
        """What redundancy of these states is judged on."""
        return states if self.projection is None else states @ self.projection


@final
@dataclass(frozen=True, kw_only=True)
class Compaction:
    """Kept audio and visual tokens move up to ranks that end before `end`, their keys turned to match (design 5)."""

    opening: int  # positions below this stay
    end: tuple[int, ...]  # of each stream, the same in all layers

    def __call__(self, memory: Memory, rotary: Rotary) -> Memory:
        """The memory at its new positions."""
        return Memory(layers=tuple(self._of(layer, rotary) for layer in memory.layers))

    def _of(self, layer: Tokens, rotary: Rotary) -> Tokens:
        time = ranks(layer.positions[:, 0], self.opening, self.end)
        positions = earlier(layer.positions, layer.modality, layer.positions[:, 0] - time)
        cos, sin = rotary((positions - layer.positions).transpose(0, 1))
        return replace(layer, positions=positions, keys=rotate(layer.keys, cos, sin))


@final
@dataclass(frozen=True, kw_only=True)
class ChunkStep:
    """Reading a chunk as a function of the memory and the chunk's embeddings.

    It holds neither of them: it waits in the graph and may run again in backward, when more has been fed.
    """

    attached: StreamedAttention
    manner: ReadConfig
    positions: Int[Tensor, "batch axes tokens"]
    modality: Int8[Tensor, "batch tokens"]
    deepstack: DeepStack | None
    order: Int[Tensor, "batch tokens"]  # arrival numbers
    compaction: Compaction | None = None  # before the chunk is read

    def __call__(
        self, memory: Memory, embeddings: Float[Tensor, "batch tokens width"], *, states: bool = False
    ) -> Memory:
        """Every layer attends to its memory and the chunk, then keeps its budget, on demand with its layer inputs."""
        memory, reader = self.compacted(memory), ChunkAttention(self, states=states)
        embeddings, positions, deepstack = self._with_probes(embeddings)
        try:
            self.attached.run(reader, embeddings, positions, deepstack, layer_tensors(memory))
        finally:  # a recomputation ends by an exception, as soon as backward has what it needs
            kept, views = reader.take_results()
        if self.manner.policy.joint:
            kept = self._settled([views[layer] for layer in range(len(memory.layers))])
        return Memory(layers=tuple(kept[layer] for layer in range(len(memory.layers))))

    def _settled(self, views: Sequence[LayerView]) -> dict[int, Tokens]:
        """What the layers keep, where they decide together."""
        policy = self.manner.policy
        kept = policy.select_joint(views, self.manner.softness)
        heads = self.attached.shape.kv_heads
        return dict(enumerate([packed(rows, heads) for rows in kept] if policy.per_head else kept))

    def _with_probes(self, embeddings: Tensor) -> tuple[Tensor, Tensor, DeepStack | None]:
        """What passes through the layers: the chunk, then the probes that are read, each placed right after it."""
        read = [(self.embedded(ids), self.after(ids)) for probe, ids in self.asked if probe.read]
        if not read:
            return embeddings, self.positions, self.deepstack
        rows, places = (torch.cat(parts, dim=axis) for parts, axis in zip(zip(*read, strict=True), (1, 2), strict=True))
        deepstack = self.deepstack
        if deepstack is not None:
            plain = torch.zeros(rows.shape[:2], dtype=torch.bool, device=rows.device)
            deepstack = replace(deepstack, mask=torch.cat([deepstack.mask, plain], dim=1))
        return torch.cat([embeddings, rows], dim=1), torch.cat([self.positions, places], dim=2), deepstack

    @property
    def asked(self) -> list[tuple[ProbePrompt, Int[Tensor, " _"]]]:
        """The probes and their token ids."""
        return list(zip(self.manner.policy.probes, self.manner.probes, strict=True))

    def embedded(self, ids: Int[Tensor, " tokens"]) -> Float[Tensor, "batch tokens width"]:
        """A probe's embeddings, the same for every stream."""
        return self.attached.embed(ids[None]).expand(self.modality.shape[0], -1, -1)

    def after(self, ids: Int[Tensor, " tokens"]) -> Int[Tensor, "batch axes tokens"]:
        """The positions that follow the chunk, one a token of a probe."""
        last = self.positions.amax(dim=(1, 2))[:, None]
        places = last + 1 + torch.arange(len(ids), device=last.device)
        return places[:, None].expand(-1, self.positions.shape[1], -1)

    def compacted(self, memory: Memory) -> Memory:
        """The memory as the chunk meets it, at its new positions if it must move."""
        return memory if self.compaction is None else self.compaction(memory, self.attached.rotary)

    def layers(
        self, memory: Mapping[int, Tokens], states: Float[Tensor, "batch tokens width"], *, recompute_kv: bool = False
    ) -> tuple[Float[Tensor, "batch tokens width"], list[Tokens]]:
        """The consecutive layers whose memory is given, alone: what they pass on, and what each kept with its inputs.

        With `recompute_kv`, keys and values of the memory are computed from its layer inputs, so that the weights
        learn from them.
        """
        reader = ChunkAttention(self, states=True, recompute_kv=recompute_kv)
        flat = {layer: tokens.tensors() for layer, tokens in memory.items()}
        try:
            states = self.attached.layers(reader, states, self.positions, self.deepstack, flat)
        finally:  # as above
            kept, _ = reader.take_results()
        return states, [kept[layer] for layer in memory]

    def arriving(
        self,
        states: Float[Tensor, "batch tokens width"],
        keys: Float[Tensor, "batch kv_heads tokens dim"],
        values: Float[Tensor, "batch kv_heads tokens dim"],
    ) -> Tokens:
        """The chunk as a layer with these inputs, keys and values will remember it."""
        zeros = torch.zeros(self.modality.shape, dtype=torch.float32, device=keys.device)
        return Tokens(
            keys=keys,
            values=values,
            positions=self.positions,
            modality=self.modality,
            order=self.order,
            importance=zeros,
            novelty=zeros,
            feature=self.manner.feature(states),
            gate=torch.where(self.modality == ABSENT, HIDDEN, zeros) if self.manner.policy.ragged else zeros,
            states=states[..., :0],
            owner=self.modality[:, None, :][:, :0],
        )


@final
class ChunkAttention:
    """A layer step: attend to [memory ; chunk], then keep the layer's budget of it, or hand over what was seen.

    Layers that are recomputed in backward hold on to their step, so the step holds neither memory nor embeddings.
    Probes follow the chunk: each sees [memory ; chunk] and its own past; the chunk sees none of them.
    """

    def __init__(self, chunk: ChunkStep, *, states: bool, recompute_kv: bool = False) -> None:
        self.chunk, self.states, self.recompute_kv = chunk, states, recompute_kv
        self._kept: dict[int, Tokens] | None = {}
        self._views: dict[int, LayerView] = {}

    def __call__(
        self, layer: int, states: Tensor, queries: Tensor, keys: Tensor, values: Tensor, scale: float, *memory: Tensor
    ) -> Tensor:
        chunk, manner, heads = self.chunk, self.chunk.manner, keys.shape[1]
        policy, softness, count = manner.policy, manner.softness, chunk.modality.shape[1]
        fresh = chunk.arriving(states[:, :count], keys[:, :, :count], values[:, :, :count])
        pool = self._pool(layer, Tokens.of(memory), states[:, :count], fresh)
        if policy.per_head:
            queries, (keys, values) = query_rows(queries, heads), (head_rows(part) for part in (keys, values))
        gate = pool.gate if manner.gated else None
        output = attend(queries[:, :, :count], pool.keys, pool.values, scale=scale, gate=gate)
        view = LayerView(
            pool=pool,
            new=count,
            queries=queries[:, :, :count],
            scale=scale,
            measures=policy.measures,
            gradient="none" if softness is None else softness.gradient,
            rotary=chunk.attached.rotary,
            probes=self._probed(layer, queries, keys),
            heads=heads if policy.per_head else 1,
        )
        if queries.shape[2] > count:
            output = torch.cat([output, *self._of_probes(view, gate, queries, keys, values)], dim=2)
        self._decide(layer, view, heads)
        return of_rows(output, heads) if policy.per_head else output

    def _decide(self, layer: int, view: LayerView, heads: int) -> None:
        """Keep the layer's budget, or leave it until all layers have read."""
        manner = self.chunk.manner
        if manner.recorder is not None:
            manner.recorder(layer, view)
        if manner.policy.joint:
            if self._kept is not None:
                self._views[layer] = view
            return
        kept = manner.policy.keep(layer, view, manner.softness)
        if self._kept is not None:
            self._kept[layer] = packed(kept, heads) if manner.policy.per_head else kept

    def _pool(self, layer: int, old: Tokens, states: Tensor, fresh: Tokens) -> Tokens:
        """The memory and the chunk, with layer inputs where they are carried; by head where heads keep their own."""
        if self.chunk.manner.policy.per_head:
            heads = self.chunk.attached.shape.kv_heads
            return rows_of(old, heads).cat(rows_of(fresh, heads))
        if self.states:
            fresh = replace(fresh, states=states)
            if not old.count:  # an empty memory knows not yet what is carried
                old = replace(old, states=states[:, :0])
        return (kv_from_states(old, self.chunk.attached, layer) if self.recompute_kv and old.count else old).cat(fresh)

    def _spans(self) -> Iterator[slice]:
        """Where the probes that are read stand in the pass."""
        first = self.chunk.modality.shape[1]
        for probe, ids in self.chunk.asked:
            if probe.read:
                yield slice(first, first + len(ids))
                first += len(ids)

    def _probed(self, layer: int, queries: Tensor, keys: Tensor) -> tuple[Probed, ...]:
        """Queries and keys of every probe in this layer."""
        spans, found = self._spans(), []
        for probe, ids in self.chunk.asked:
            if probe.read:
                span = next(spans)
                found.append(Probed(queries=queries[:, :, span], keys=keys[:, :, span]))
            else:
                asking, own, _ = self.chunk.attached.project(layer, self.chunk.embedded(ids), self.chunk.after(ids))
                if self.chunk.manner.policy.per_head:
                    asking, own = query_rows(asking, own.shape[1]), head_rows(own)
                found.append(Probed(queries=asking, keys=own))
        return tuple(found)

    def _of_probes(
        self, view: LayerView, gate: Tensor | None, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Iterator[Tensor]:
        """Attention output of the probes that are read."""
        pool = view.pool
        for span in self._spans():
            own = gate if gate is None else F.pad(gate, (0, span.stop - span.start))
            yield attend(
                queries[:, :, span],
                torch.cat([pool.keys, keys[:, :, span]], dim=2),
                torch.cat([pool.values, values[:, :, span]], dim=2),
                scale=view.scale,
                gate=own,
            )

    def take_results(self) -> tuple[dict[int, Tokens], dict[int, LayerView]]:
        """What every layer kept or saw; the step forgets it, and notes no more: a layer may be recomputed alone."""
        kept, views, self._kept, self._views = self._kept, self._views, None, {}
        return kept or {}, views


def head_rows(part: Float[Tensor, "batch kv_heads tokens dim"]) -> Float[Tensor, "rows 1 tokens dim"]:
    """Each key-value head as a row."""
    return part.flatten(0, 1)[:, None]


def kv_from_states(tokens: Tokens, attached: StreamedAttention, layer: int) -> Tokens:
    """The tokens with the gradient of keys and values computed from their states now, at the values that they have.

    x + (y - stop(y)) is x to the bit: rounding of another matrix shape or other draws of dropout do not show.
    """
    _, keys, values = attached.project(layer, tokens.states, tokens.positions)
    keys, values = tokens.keys + (keys - keys.detach()), tokens.values + (values - values.detach())
    return replace(tokens, keys=keys, values=values)


def layer_tensors(memory: Memory) -> list[tuple[Tensor, ...]]:
    """The flat tensors of each layer."""
    return [layer.tensors() for layer in memory.layers]
