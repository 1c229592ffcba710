"""Stream: feed chunks, ask questions on a fork, at any time; the same object in training and in evaluation."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor
from torch.nn import functional as F

from omnimem.attach import Seam
from omnimem.attention.blocked import MEMORY, Segments, attend
from omnimem.heads import of_rows, packed, query_rows, rows_of
from omnimem.media import SourceOptions
from omnimem.memory import Memory
from omnimem.policy import Policy, Probe, projection
from omnimem.positions import Rotary, distinct, earlier, ranks, rotate
from omnimem.selection import Softness
from omnimem.tokens import ABSENT, HIDDEN, Chunk, DeepStack, Modality, Tokens
from omnimem.view import LayerView, Probed

PADDING = -1  # segment of padding in a packed pass


@final
@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """How a stream is cut and read."""

    fps: float = 1.0
    max_pixels: int = 176_400  # per frame: 420 x 420, as in the release
    min_pixels: int = 3_136
    chunk_tokens: int = 16_384  # an upper limit: a chunk ends at the last grid that fits
    positions: Literal["original", "compact"] = "original"  # compact: kept tokens move up at the model's trained range
    tracks: Literal["both", "video", "audio"] = "both"

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens = {self.chunk_tokens} must be at least 1; 16384 is the release's setting")
        self.source()

    def source(self, tracks: Literal["both", "video", "audio"] | None = None) -> SourceOptions:
        """The part of these options that decoding needs, for other tracks if given."""
        return SourceOptions(
            fps=self.fps, max_pixels=self.max_pixels, min_pixels=self.min_pixels, tracks=tracks or self.tracks
        )


@final
@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Packed questions of each stream, to be read at the end of what was fed."""

    ids: Int[Tensor, "batch tokens"]
    segments: Int[Tensor, "batch tokens"]  # number of the question; PADDING where a row is shorter
    offsets: Int[Tensor, "batch tokens"]  # position relative to the first one after the stream
    labels: Int[Tensor, "batch tokens"] | None = None  # the token each row should predict next; -100: none


Recorder = Callable[[int, LayerView], None]


@runtime_checkable
class Carry(Protocol):
    """How a memory passes from chunk to chunk; `tuning.gradient` has the ways that matter in training."""

    def __call__(self, step: "ChunkStep", memory: Memory, embeddings: Tensor) -> Memory: ...


def carry_directly(step: Callable[[Memory, Tensor], Memory], memory: Memory, embeddings: Tensor) -> Memory:
    """The step itself, nothing recomputed."""
    return step(memory, embeddings)


@final
@dataclass(frozen=True, kw_only=True)
class Manner:
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
        return self.softness is not None or self.policy.pads

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

    seam: Seam
    manner: Manner
    positions: Int[Tensor, "batch axes tokens"]
    modality: Int8[Tensor, "batch tokens"]
    deepstack: DeepStack | None
    order: Int[Tensor, "batch tokens"]  # arrival numbers
    compaction: Compaction | None = None  # before the chunk is read

    def __call__(
        self, memory: Memory, embeddings: Float[Tensor, "batch tokens width"], *, states: bool = False
    ) -> Memory:
        """Every layer attends to its memory and the chunk, then keeps its budget, on demand with its layer inputs."""
        memory, reader = self.met(memory), _ReadChunk(self, states=states)
        embeddings, positions, deepstack = self._with_probes(embeddings)
        try:
            self.seam.run(reader, embeddings, positions, deepstack, _by_layer(memory))
        finally:  # a recomputation ends by an exception, as soon as backward has what it needs
            kept, views = reader.hand_over()
        if self.manner.policy.together:
            kept = self._settled([views[layer] for layer in range(len(memory.layers))])
        return Memory(layers=tuple(kept[layer] for layer in range(len(memory.layers))))

    def _settled(self, views: Sequence[LayerView]) -> dict[int, Tokens]:
        """What the layers keep, where they decide together."""
        policy = self.manner.policy
        kept = policy.settle(views, self.manner.softness)
        heads = self.seam.shape.kv_heads
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
    def asked(self) -> list[tuple[Probe, Int[Tensor, " _"]]]:
        """The probes and their token ids."""
        return list(zip(self.manner.policy.probes, self.manner.probes, strict=True))

    def embedded(self, ids: Int[Tensor, " tokens"]) -> Float[Tensor, "batch tokens width"]:
        """A probe's embeddings, the same for every stream."""
        return self.seam.embed(ids[None]).expand(self.modality.shape[0], -1, -1)

    def after(self, ids: Int[Tensor, " tokens"]) -> Int[Tensor, "batch axes tokens"]:
        """The positions that follow the chunk, one a token of a probe."""
        last = self.positions.amax(dim=(1, 2))[:, None]
        places = last + 1 + torch.arange(len(ids), device=last.device)
        return places[:, None].expand(-1, self.positions.shape[1], -1)

    def met(self, memory: Memory) -> Memory:
        """The memory as the chunk meets it, at its new positions if it must move."""
        return memory if self.compaction is None else self.compaction(memory, self.seam.rotary)

    def layers(
        self, memory: Mapping[int, Tokens], states: Float[Tensor, "batch tokens width"], *, anew: bool = False
    ) -> tuple[Float[Tensor, "batch tokens width"], list[Tokens]]:
        """The consecutive layers whose memory is given, alone: what they pass on, and what each kept with its inputs.

        With `anew`, keys and values of the memory are made of its layer inputs, so that the weights learn from them.
        """
        reader = _ReadChunk(self, states=True, anew=anew)
        flat = {layer: tokens.tensors() for layer, tokens in memory.items()}
        try:
            states = self.seam.layers(reader, states, self.positions, self.deepstack, flat)
        finally:  # as above
            kept, _ = reader.hand_over()
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
            gate=torch.where(self.modality == ABSENT, HIDDEN, zeros) if self.manner.policy.pads else zeros,
            states=states[..., :0],
            owner=self.modality[:, None, :][:, :0],
        )


@final
class _ReadChunk:
    """A layer step: attend to [memory ; chunk], then keep the layer's budget of it, or hand over what was seen.

    Layers that are recomputed in backward hold on to their step, so the step holds neither memory nor embeddings.
    Probes follow the chunk: each sees [memory ; chunk] and its own past; the chunk sees none of them.
    """

    def __init__(self, chunk: ChunkStep, *, states: bool, anew: bool = False) -> None:
        self.chunk, self.states, self.anew = chunk, states, anew
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
            queries, (keys, values) = query_rows(queries, heads), (_own(part) for part in (keys, values))
        gate = pool.gate if manner.gated else None
        output = attend(queries[:, :, :count], pool.keys, pool.values, scale=scale, gate=gate)
        view = LayerView(
            pool=pool,
            new=count,
            queries=queries[:, :, :count],
            scale=scale,
            measures=policy.measures,
            gradient="none" if softness is None else softness.gradient,
            rotary=chunk.seam.rotary,
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
        if manner.policy.together:
            if self._kept is not None:
                self._views[layer] = view
            return
        kept = manner.policy.keep(layer, view, manner.softness)
        if self._kept is not None:
            self._kept[layer] = packed(kept, heads) if manner.policy.per_head else kept

    def _pool(self, layer: int, old: Tokens, states: Tensor, fresh: Tokens) -> Tokens:
        """The memory and the chunk, with layer inputs where they are carried; by head where heads keep their own."""
        if self.chunk.manner.policy.per_head:
            heads = self.chunk.seam.shape.kv_heads
            return rows_of(old, heads).cat(rows_of(fresh, heads))
        if self.states:
            fresh = replace(fresh, states=states)
            if not old.count:  # an empty memory knows not yet what is carried
                old = replace(old, states=states[:, :0])
        return (_made_anew(old, self.chunk.seam, layer) if self.anew and old.count else old).cat(fresh)

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
                asking, own, _ = self.chunk.seam.project(layer, self.chunk.embedded(ids), self.chunk.after(ids))
                if self.chunk.manner.policy.per_head:
                    asking, own = query_rows(asking, own.shape[1]), _own(own)
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

    def hand_over(self) -> tuple[dict[int, Tokens], dict[int, LayerView]]:
        """What every layer kept or saw; the step forgets it, and notes no more: a layer may be recomputed alone."""
        kept, views, self._kept, self._views = self._kept, self._views, None, {}
        return kept or {}, views


def _own(part: Float[Tensor, "batch kv_heads tokens dim"]) -> Float[Tensor, "rows 1 tokens dim"]:
    """Each key-value head as a row."""
    return part.flatten(0, 1)[:, None]


def _made_anew(tokens: Tokens, seam: Seam, layer: int) -> Tokens:
    """The tokens with the gradient of keys and values computed from their states now, at the values that they have.

    x + (y - stop(y)) is x to the bit: rounding of another matrix shape or other draws of dropout do not show.
    """
    _, keys, values = seam.project(layer, tokens.states, tokens.positions)
    keys, values = tokens.keys + (keys - keys.detach()), tokens.values + (values - values.detach())
    return replace(tokens, keys=keys, values=values)


def _by_layer(memory: Memory) -> list[tuple[Tensor, ...]]:
    """The flat tensors of each layer."""
    return [layer.tensors() for layer in memory.layers]


@final
class _ReadQuestions:
    """A layer step: packed questions attend to the memory and to their own segment; the memory stays as it is.

    Where the memory carries layer inputs, its keys and values are made of them anew: their values are as they were,
    and the weights that make them learn.
    """

    def __init__(self, seam: Seam, manner: Manner, segments: Tensor, before: "Reading | None") -> None:
        self.seam, self.manner, self.segments, self.before = seam, manner, segments, before
        self._read: dict[int, tuple[Tensor, Tensor]] | None = {}

    def __call__(
        self, layer: int, states: Tensor, queries: Tensor, keys: Tensor, values: Tensor, scale: float, *memory: Tensor
    ) -> Tensor:
        kept = Tokens.of(memory)
        if kept.states.shape[-1]:
            kept = _made_anew(kept, self.seam, layer)
        asked = self.segments
        if self.before is not None:
            keys = torch.cat([self.before.keys[layer], keys], dim=2)
            values = torch.cat([self.before.values[layer], values], dim=2)
            asked = torch.cat([self.before.segments, asked], dim=1)
        if self._read is not None:
            self._read[layer] = keys, values
        asking, heads = self.segments, keys.shape[1]
        if self.manner.policy.per_head:
            kept, queries, (keys, values) = rows_of(kept, heads), query_rows(queries, heads), map(_own, (keys, values))
            asking, asked = (part.repeat_interleave(heads, dim=0) for part in (asking, asked))
        open_to_all = torch.full_like(kept.order, MEMORY)
        output = attend(
            queries,
            torch.cat([kept.keys, keys], dim=2),
            torch.cat([kept.values, values], dim=2),
            scale=scale,
            gate=F.pad(kept.gate, (0, keys.shape[2])) if self.manner.gated else None,
            segments=Segments(queries=asking, keys=torch.cat([open_to_all, asked], dim=1)),
        )
        return of_rows(output, heads) if self.manner.policy.per_head else output

    def hand_over(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values of the questions in every layer; the step forgets them, and notes no more."""
        read, self._read = self._read, None
        return read or {}


@final
@dataclass(frozen=True, kw_only=True)
class Reading:
    """Questions read so far: final hidden states of the last tokens read, and the keys and values to go on from."""

    hidden: Float[Tensor, "batch tokens width"]
    segments: Int[Tensor, "batch read"]
    offsets: Int[Tensor, "batch read"]
    keys: dict[int, Tensor]
    values: dict[int, Tensor]


@final
@dataclass(frozen=True, kw_only=True)
class Usage:
    """What the memory of a stream took, per stream; entries are audio and visual tokens summed over the layers."""

    peak_entries: int | float = 0  # right before an eviction: memory and chunk
    kept_entries: int | float = 0  # most after an eviction
    bytes: int = 0  # most after an eviction: keys, values, text and side state
    tokens_in: tuple[int, int, int] = (0, 0, 0)  # text, audio, visual tokens fed
    chunks: int = 0


@final
class Stream:
    """A batch of streams of one layout, each with a memory of its own."""

    def __init__(
        self,
        seam: Seam,
        policy: Policy,
        *,
        batch: int = 1,
        softness: Softness | None = None,
        carry: Carry = carry_directly,
        recorder: Recorder | None = None,
        last_position: int | None = None,
        probes: Sequence[Int[Tensor, " _"]] = (),
    ) -> None:
        """An empty stream; a softness softens selection and carries its gate (training only).

        Before a chunk would pass `last_position`, the kept tokens move up: their times become ranks (design 5).
        `probes` are the token ids of those that the policy asks for. Raises ValueError when their number differs.
        """
        if len(probes) != len(policy.probes):
            raise ValueError(
                f"policy {policy.name} asks {len(policy.probes)} probes after every chunk and {len(probes)} are given; "
                "open the stream by Feeder.stream, which has the tokenizer"
            )
        self.seam, self.policy, self.softness = seam, policy, softness
        self.carry, self.recorder, self.last_position = carry, recorder, last_position
        self._manner = Manner(
            policy=policy,
            softness=softness,
            recorder=recorder,
            projection=self._feature_projection(),
            probes=tuple(probes),
        )
        shape, matrix = seam.shape, self._manner.projection
        width = shape.feature if matrix is None else matrix.shape[1]
        self.memory = Memory.empty(replace(shape, feature=width), batch)
        self.fed = 0  # tokens fed so far
        self._next = (0,) * batch  # position that follows what was fed, of each stream
        self._moved = (0,) * batch  # by how much later tokens stand earlier than the backbone counts
        self.opening = 0  # positions below this belong to the text before the stream and never move
        self.usage = Usage()

    def _feature_projection(self) -> Tensor | None:
        """None: the exact state; a matrix without columns where nothing judges redundancy."""
        shape, wanted = self.seam.shape, self.policy.measures.feature
        judged = self.policy.needs_novelty and self.policy.budget is not None
        if not judged and self.recorder is None:
            wanted = 0
        if wanted is None or wanted >= shape.width:
            return None
        return projection(shape.width, wanted, dtype=shape.dtype, device=shape.device)

    @property
    def next_position(self) -> int:
        """The position that follows what was fed; of a batch the furthest."""
        return max(self._next)

    @property
    def moved(self) -> int:
        """By how much later tokens stand earlier than the backbone counts; of a batch the most."""
        return max(self._moved)

    def feed(self, chunk: Chunk) -> None:
        """Read a chunk: every layer attends to its memory and what the policy lets pass, then keeps its budget."""
        chunk, compaction = self._placed(chunk)
        arrival = torch.arange(chunk.count, device=chunk.modality.device) + self.fed
        sifted = self.policy.sift(chunk, arrival.expand(chunk.modality.shape))
        read = sifted.chunk
        before = self.memory.entries
        if read.count:
            step = ChunkStep(
                seam=self.seam,
                manner=self._manner,
                positions=read.positions,
                modality=read.modality,
                deepstack=read.deepstack,
                order=sifted.order,
                compaction=compaction,
            )
            self.memory = self.carry(step, self.memory, read.embeddings)
        elif compaction is not None:
            self.memory = compaction(self.memory, self.seam.rotary)
        self._account(chunk, read, before)

    def _placed(self, chunk: Chunk) -> tuple[Chunk, "Compaction | None"]:
        """The chunk at the positions it will have in this stream, and how room is made below `last_position` first."""
        if self.usage.tokens_in[1:] == (0, 0) and not bool((chunk.modality != Modality.TEXT).any()):
            self.opening = max(self.opening, int(chunk.positions.max()) + 1 - self.moved)
        limit, compaction, last = self.last_position, None, int(chunk.positions.max())
        if self.policy.reindex or (limit is not None and last - min(self._moved) >= limit):
            compaction = self._compaction()
            ways = zip(self._moved, self._next, compaction.end, strict=True)
            self._moved, self._next = tuple(moved + old - new for moved, old, new in ways), compaction.end
            reached = last - min(self._moved)
            if limit is not None and reached >= limit:
                raise ValueError(
                    f"memory and chunk reach position {reached} even when compacted, the model was trained below "
                    f"{limit}; lower stream.chunk_tokens or memory.slots_per_layer"
                )
        if not any(self._moved):
            return chunk, compaction
        back = torch.tensor(self._moved, device=chunk.positions.device)[:, None].expand(chunk.modality.shape)
        return replace(chunk, positions=earlier(chunk.positions, chunk.modality, back)), compaction

    def _compaction(self) -> Compaction:
        """How what is kept moves up as far as it can, each stream by itself."""
        times = [distinct(layer.positions[:, 0], self.opening) for layer in self.memory.layers]
        return Compaction(opening=self.opening, end=tuple(self.opening + max(row) for row in zip(*times, strict=True)))

    def _account(self, chunk: Chunk, read: Chunk, before: int | float) -> None:
        arrived = [int((chunk.modality[0] == kind).sum()) for kind in Modality]
        pool = before + int((read.modality > 0).sum()) / self.memory.batch * len(self.memory.layers)
        self.fed += chunk.count
        ends = chunk.positions.amax(dim=(1, 2)).tolist()
        self._next = tuple(max(old, last + 1) for old, last in zip(self._next, ends, strict=True))
        text, audio, visual = (a + b for a, b in zip(self.usage.tokens_in, arrived, strict=True))
        self.usage = Usage(
            peak_entries=max(self.usage.peak_entries, int(pool) if pool == int(pool) else pool),
            kept_entries=max(self.usage.kept_entries, self.memory.entries),
            bytes=max(self.usage.bytes, self.memory.bytes),
            tokens_in=(text, audio, visual),
            chunks=self.usage.chunks + 1,
        )

    def fork(self) -> "Stream":
        """A stream with the same past; what is fed to one is not seen by the other."""
        twin = Stream(
            self.seam,
            self.policy,
            batch=self.memory.batch,
            softness=self.softness,
            carry=self.carry,
            recorder=self.recorder,
            last_position=self.last_position,
            probes=self._manner.probes,
        )
        twin.memory, twin.fed, twin.usage = self.memory, self.fed, self.usage
        twin.opening, twin._moved, twin._next = self.opening, self._moved, self._next
        return twin

    def ask(self, prompt: Prompt, before: Reading | None = None) -> Reading:
        """Read packed questions (or, after `before`, their continuation); the memory stays as it is."""
        return self.reader(prompt, before)(self.memory)

    def reader(self, prompt: Prompt, before: Reading | None = None) -> Callable[[Memory], Reading]:
        """`ask` as a function of a memory, asked where the stream is now, however often and however late it is called.

        It holds no memory of its own: in training the questions are read again in backward (`tuning.gradient`).
        """
        seam, manner, compaction, first = self.seam, self._manner, None, self._next
        if self.policy.reindex:
            compaction = self._compaction()
            first = compaction.end
        starts = torch.tensor(first, device=prompt.offsets.device)[:, None]
        positions = (prompt.offsets + starts)[:, None, :].expand(-1, 3, -1)

        def read(memory: Memory) -> Reading:
            step = _ReadQuestions(seam, manner, prompt.segments, before)
            if compaction is not None:
                memory = compaction(memory, seam.rotary)
            try:
                hidden = seam.run(step, seam.embed(prompt.ids), positions, memories=_by_layer(memory))
            finally:  # as for chunks
                pairs = step.hand_over()
            past = () if before is None else (before,)
            return Reading(
                hidden=hidden,
                segments=torch.cat([*(reading.segments for reading in past), prompt.segments], dim=1),
                offsets=torch.cat([*(reading.offsets for reading in past), prompt.offsets], dim=1),
                keys={layer: keys for layer, (keys, _) in pairs.items()},
                values={layer: values for layer, (_, values) in pairs.items()},
            )

        return read

    @torch.no_grad()
    def answer(
        self,
        prompt: Prompt,
        head: Callable[[Tensor], Tensor],
        *,
        stop: Sequence[int],
        max_new_tokens: int,
    ) -> list[list[list[int]]]:
        """Greedy answers: for each stream and question the new token ids, without the stop token.

        Raises ValueError when `max_new_tokens` is below 1.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {max_new_tokens} must be at least 1")
        reading = self.ask(prompt)
        last, offsets = _last_of_each(prompt)
        logits = head(reading.hidden.gather(1, last[..., None].expand(-1, -1, reading.hidden.shape[-1])))
        numbers = torch.arange(last.shape[1], device=last.device).expand_as(last)
        ends = torch.tensor(list(stop), device=last.device)
        written: list[Tensor] = []
        done = offsets < 0  # rows with fewer questions than the longest
        for step in range(max_new_tokens):
            ids = logits.argmax(dim=-1)
            done = done | torch.isin(ids, ends)
            written.append(torch.where(done, torch.full_like(ids, -1), ids))
            if bool(done.all()) or step + 1 == max_new_tokens:
                break
            following = Prompt(ids=ids, segments=numbers, offsets=offsets.clamp_min(0) + 1 + step)
            reading = self.ask(following, reading)
            logits = head(reading.hidden)
        rows = torch.stack(written, dim=-1).tolist()
        asked = (offsets >= 0).tolist()
        return [
            [[number for number in ids if number >= 0] for ids, real in zip(row, real_row, strict=True) if real]
            for row, real_row in zip(rows, asked, strict=True)
        ]


def _last_of_each(prompt: Prompt) -> tuple[Int[Tensor, "batch asked"], Int[Tensor, "batch asked"]]:
    """Index and offset of the last token of every question; offset -1 where a row has no such question."""
    count = int(prompt.segments.max()) + 1
    place = torch.arange(prompt.ids.shape[1], device=prompt.ids.device)
    mine = prompt.segments[:, None, :] == torch.arange(count, device=place.device)[None, :, None]
    last = torch.where(mine, place, -1).amax(dim=-1)
    offset = prompt.offsets.gather(1, last.clamp_min(0))
    return last.clamp_min(0), torch.where(last < 0, -1, offset)
