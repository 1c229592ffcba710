"""Stream: feed chunks and ask questions at any time; training and evaluation use the same object."""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from omnimem.errors import UserError, counted
from omnimem.memory import Memory
from omnimem.policies.base import Policy, PolicyError, projection, sketch
from omnimem.policies.replayed import Replayed
from omnimem.positions import distinct, earlier
from omnimem.selection import Softness
from omnimem.sketches import rough, stored
from omnimem.streaming.adapter import adapter_layers, without_adapter
from omnimem.streaming.attach import StreamedAttention
from omnimem.streaming.chunk_pass import (
    ChunkStep,
    Compaction,
    DirectStep,
    MemoryStep,
    ReadConfig,
    Recorder,
    layer_tensors,
)
from omnimem.streaming.decoding import CALLS, Decoding
from omnimem.streaming.prompt_pass import Prompt, PromptAttention, PromptState, last_of_each
from omnimem.streaming.trained_range import TrainedRange
from omnimem.tokens import Chunk, ChunkFacts, Counts, Tracks


@final
class PositionsError(UserError):
    """A stream passes the last position that it may use, even with a compacted memory."""


@final
@dataclass(frozen=True, kw_only=True)
class Usage:
    """Sizes that the memory of a stream reached; entries are audio and visual tokens summed over the layers.

    Entries are those of the memory that answers read; `bytes` are of that memory and of the selector's.
    """

    peak_entries: int | float = 0  # most right before an eviction: memory and chunk
    kept_entries: int | float = 0  # most after an eviction
    bytes: int = 0  # most after an eviction: keys, values, text and side state
    selector_entries: int | float = 0  # of the memory that chooses with `selection_from: base`; most after an eviction
    selector_bytes: int = 0  # of that memory, a part of `bytes`
    tokens_in: tuple[int, int, int] = (0, 0, 0)  # text, audio, visual tokens fed
    chunks: int = 0


@final
class Stream:
    """A batch of streams of one layout, each with its own memory."""

    def __init__(
        self,
        attached: StreamedAttention,
        policy: Policy,
        *,
        batch: int = 1,
        softness: Softness | None = None,
        carry: MemoryStep | None = None,
        recorder: Recorder | None = None,
        last_position: int | None = None,
        probes: Sequence[Int[Tensor, " _"]] = (),
        trained: TrainedRange | None = None,
    ) -> None:
        """An empty stream; a softness softens selection and carries its gate (training only).

        `carry` is how the memory passes from chunk to chunk: a gradient mode of `tuning.gradient`, or nothing special.
        Before a chunk would pass `last_position`, the kept tokens move up: their times become ranks (docs/paper.md,
        "Positions"); without it, positions beyond `trained` are noted there. `probes` are the token ids of the policy's
        probe prompts.

        If the policy has `selection_from: base` and the model an adapter, a second stream, `selector`, reads every
        chunk first, with the adapter off, and this one keeps in every layer the same tokens, without scores of its own.

        Raises ValueError when the number of probes differs or `softness` softens a selection that is not made here,
        PolicyError when the policy does not support `selection_from: base`.
        """
        if len(probes) != len(wanted := policy.traits.probes):
            raise ValueError(
                f"policy {policy.name} asks {counted(len(wanted), 'probe')} after every chunk, got {len(probes)}; "
                "open the stream by Feeder.stream, which has the tokenizer"
            )
        self.attached, self.policy, self.softness = attached, policy, softness
        self.carry, self.recorder, self.last_position = carry or DirectStep(), recorder, last_position
        self._trained = trained if last_position is None else None
        # 1. the stream that chooses the tokens, if it is not this one
        self.selector: Stream | None = None
        if self._chosen_elsewhere():
            _check_base_selection(policy, softness)
            own = replace(policy, selection_from="tuned")
            self.selector = Stream(attached, own, batch=batch, last_position=last_position, probes=probes)
            policy, probes = Replayed.of(policy), ()
        # 2. how chunks are read, and the empty memory
        self._config = ReadConfig(
            policy=policy,
            softness=softness,
            recorder=recorder,
            projection=self._feature_projection(policy),
            probe_ids=tuple(probes),
            together=carry is None and softness is None,
        )
        self.memory = self._empty = self._without_tokens(policy, batch)
        self.fed = 0  # tokens fed so far
        self._end = (0,) * batch  # of each stream, the position after the largest
        self._next = (0,) * batch  # of each stream, the position of text after the latest chunk
        self._moved = (0,) * batch  # by how much positions of new tokens are below those of the backbone
        self.opening = 0  # positions below this belong to the text before the stream and never move
        self.usage = Usage()
        self.tracks: Tracks | None = None  # that the opening announced

    def _without_tokens(self, policy: Policy, batch: int) -> Memory:
        """A memory without tokens, with the feature that the policy has carried beside keys and values."""
        shape, matrix, bits = self.attached.shape, self._config.projection, policy.measures.sketch
        width, dtype = shape.feature if matrix is None else matrix.shape[1], None
        if matrix is not None and bits:
            width, dtype = stored(width, bits, learns=self._config.learns)
        places = 3 if policy.traits.needs_place else 0
        return Memory.empty(replace(shape, feature=width, sketch=dtype, places=places), batch)

    def _feature_projection(self, policy: Policy) -> Tensor | None:
        """None: the exact layer input; a matrix without columns where redundancy is not measured."""
        shape, wanted = self.attached.shape, policy.measures.feature
        measured = policy.traits.needs_novelty and policy.budget is not None
        if not measured and self.recorder is None:
            wanted = 0
        if wanted is None or wanted >= shape.width:
            return None
        if policy.measures.sketch:
            low = torch.bfloat16 if rough(policy.measures.sketch, shape.dtype, shape.device) else torch.float32
            return sketch(shape.width, wanted).to(shape.device, low)
        return projection(shape.width, wanted, dtype=shape.dtype, device=shape.device)

    @property
    def next_position(self) -> int:
        """The position of a question after the latest chunk; the largest of the batch."""
        return max(self._next)

    @property
    def beyond(self) -> int:
        """The last position if it is beyond those that the model was trained on (`positions: original`); else 0."""
        reached = max(self._end) - 1
        return reached if self._trained is not None and reached >= self._trained.trained else 0

    @property
    def moved(self) -> int:
        """By how much positions of new tokens are below those of the backbone; the largest of the batch."""
        return max(self._moved)

    def feed(self, chunk: Chunk) -> None:
        """Read a chunk: every layer attends to its memory and the chunk, then evicts until its budget holds.

        Without gradient, the memory is lost when reading fails half-way (out of memory): the stream is to be dropped.
        Raises PositionsError when positions pass `last_position` even with a compacted memory, ValueError when an
        adapter whose tokens another model has to choose was switched on since the stream was opened.
        """
        # 1. choose: with a selector, which tokens every layer keeps afterwards
        if self.selector is None and self._chosen_elsewhere():
            raise ValueError(
                "memory.selection_from = base: the adapter was switched on after the stream was opened; open the "
                "stream with the adapter on, or without it and keep it off"
            )
        config = self._config if self.selector is None else self._chosen_by(self.selector, chunk)
        # 2. place: the positions of the chunk in this stream
        self.tracks = chunk.tracks or self.tracks
        facts = chunk.known
        if self.attached.axes == 1:  # only time; other axes would not move with visual tokens, and count as reached
            chunk = replace(chunk, positions=F.pad(chunk.positions[:, :1], (0, 0, 0, 2)))
            facts = facts._replace(ends=tuple(max(0, time) for time in facts.times))
        chunk, compaction = self._placed(chunk, facts)
        # 3. prefilter: the part of the chunk that the policy lets pass
        arrival = torch.arange(chunk.count, device=chunk.modality.device) + self.fed
        passed = self.policy.prefilter(chunk, arrival.expand(chunk.modality.shape))
        entries = self.memory.entries
        # 4. read and evict (`ChunkAttention`), as the gradient mode carries the memory
        if passed.chunk.count:
            step = ChunkStep(
                attached=self.attached,
                config=config,
                positions=passed.chunk.positions,
                place=passed.chunk.places,
                modality=passed.chunk.modality,
                deepstack=passed.chunk.deepstack,
                order=passed.order,
                fed=self.fed,
                compaction=compaction,
                counts=self._counts(passed.chunk, chunk, facts),
            )
            if torch.is_grad_enabled() or self.carry != DirectStep():
                self.memory, self.carry = self.carry(step, self.memory, passed.chunk.embeddings)
            else:  # nothing refers to the memory but this stream and its forks
                held, self.memory = [self.memory], self._empty
                self.memory = step.consume(held, passed.chunk.embeddings)
        elif compaction is not None:
            self.memory = compaction(self.memory, self.attached.rotary)
        # 5. account: tokens fed, next positions, usage
        self._account(chunk, facts, passed.chunk, entries)

    def _counts(self, read: Chunk, chunk: Chunk, facts: ChunkFacts) -> Counts | None:
        """Of the part of a chunk that is read, where all streams of the batch hold equal numbers."""
        traits = self.policy.traits
        if traits.per_head or traits.ragged or traits.merges or self.selector is not None:
            return None
        return facts.counts if read is chunk else read.known.counts

    def _chosen_elsewhere(self) -> bool:
        """Whether the tokens to keep are not those that the model as it is now would choose."""
        base = self.policy.selection_from == "base" and self.policy.budget is not None
        return base and bool(adapter_layers(self.attached.text_model))

    def _chosen_by(self, selector: "Stream", chunk: Chunk) -> ReadConfig:
        """The config of a chunk after which every layer keeps what `selector`, the untuned model, keeps of it."""
        with torch.no_grad(), without_adapter(self.attached.text_model):
            selector.feed(chunk.untuned or chunk)
        policy = self._config.policy
        assert isinstance(policy, Replayed), "a stream with a selector keeps nothing by its own scores"
        return replace(self._config, policy=policy.after(selector.memory, self.attached.shape.kv_heads))

    def _placed(self, chunk: Chunk, facts: ChunkFacts) -> tuple[Chunk, Compaction | None]:
        """The chunk at its positions in this stream, and the compaction that has to come first, if any."""
        # 1. text before the first audio or visual token is the opening: it stays where it is
        limit, compaction = self.last_position, None
        opens = self.usage.tokens_in[1:] == (0, 0) and facts.counts.text == chunk.count
        if opens:
            self.opening = max(self.opening, max(facts.ends) + 1 - self.moved)
        # 2. compact where the policy does so after every chunk, or the streams whose positions run out
        late = [limit is not None and each >= limit for each in self._reached(facts)]
        every = self.policy.traits.reindex and not opens
        if every or any(late):
            still = () if every else (row for row, moves in enumerate(late) if not moves)
            compaction = self._compaction(frozenset(still))
            shifts = zip(self._moved, self._end, compaction.end, strict=True)
            self._moved, self._end = tuple(moved + old - new for moved, old, new in shifts), compaction.end
            reached = max(self._reached(facts))
            if limit is not None and reached >= limit:
                raise PositionsError(
                    f"memory and chunk reach position {reached} even when compacted, the model was trained below "
                    f"{limit}; lower stream.chunk_tokens or memory.slots_per_layer"
                )
        # 3. shift the chunk by as much as the memory has moved
        if not any(self._moved):
            return chunk, compaction
        back = torch.tensor(self._moved, device=chunk.positions.device)[:, None].expand(chunk.modality.shape)
        return replace(chunk, positions=earlier(chunk.positions, chunk.modality, back)), compaction

    def _reached(self, facts: ChunkFacts) -> list[int]:
        """The last position of a chunk in each stream."""
        return [end - moved for end, moved in zip(facts.ends, self._moved, strict=True)]

    def _compaction(self, still: frozenset[int] = frozenset()) -> Compaction:
        """The compaction that moves the kept tokens up as far as possible, each stream on its own, some not at all."""
        times = [distinct(layer.positions[:, 0], layer.modality, self.opening) for layer in self.memory.layers]
        ends = (self.opening + max(row) for row in zip(*times, strict=True))
        end = tuple(old if row in still else new for row, (old, new) in enumerate(zip(self._end, ends, strict=True)))
        return Compaction(opening=self.opening, end=end, still=still)

    def _account(self, chunk: Chunk, facts: ChunkFacts, read: Chunk, entries: int | float) -> None:
        """Update counters and usage; `entries` are those of the memory before the chunk."""
        counts = facts.counts
        audio = counts.audio or 0
        arrived = (counts.text, audio, counts.media - audio)
        media = counts.media if read is chunk else int((read.modality > 0).sum()) / self.memory.batch
        pool = entries + media * len(self.memory.layers)
        self.fed += chunk.count
        ends = chunk.positions.amax(dim=(1, 2)).tolist() if any(self._moved) else facts.ends
        self._end = tuple(max(old, last + 1) for old, last in zip(self._end, ends, strict=True))
        after = chunk.next_position
        self._next = self._end if after is None else tuple(after - moved for moved in self._moved)
        if self._trained is not None:
            self._trained.note(max(self._end) - 1)
        text, audio, visual = (a + b for a, b in zip(self.usage.tokens_in, arrived, strict=True))
        selector = None if self.selector is None else self.selector.memory
        selecting = 0 if self.selector is None else self.selector.bytes
        self.usage = Usage(
            peak_entries=max(self.usage.peak_entries, int(pool) if pool == int(pool) else pool),
            kept_entries=max(self.usage.kept_entries, self.memory.entries),
            bytes=max(self.usage.bytes, self.bytes),
            selector_entries=max(self.usage.selector_entries, 0 if selector is None else selector.entries),
            selector_bytes=max(self.usage.selector_bytes, selecting),
            tokens_in=(text, audio, visual),
            chunks=self.usage.chunks + 1,
        )

    @property
    def bytes(self) -> int:
        """Bytes per stream between two chunks: memory, references of its sketches, and the same of the selector."""
        selecting = 0 if self.selector is None else self.selector.bytes
        return self.memory.bytes + self._config.references.bytes + selecting

    def fork(self) -> "Stream":
        """A stream with the same past; chunks fed to one of them do not reach the other."""
        twin = copy(self)  # everything that it holds is a value, but for the references and the selector
        twin._config = replace(self._config, references=self._config.references.fork())
        twin.selector = None if self.selector is None else self.selector.fork()
        return twin

    def forget(self) -> None:
        """Drop the memory, so that a fork that is not asked any more does not keep it alive."""
        self.memory = self._empty
        if self.selector is not None:
            self.selector.forget()

    def read(self, loss: Callable[[Memory], Tensor]) -> Tensor:
        """`loss` of the memory, with the gradient of the stream's gradient mode."""
        return self.carry.read(loss, self.memory)

    def ask(self, prompt: Prompt) -> PromptState:
        """Read packed questions; the memory does not change."""
        return self.reader(prompt)(self.memory)

    def reader(self, prompt: Prompt) -> Callable[[Memory], PromptState]:
        """`ask` as a function of a memory, at the present end of the stream however often and late it is called.

        It holds no memory itself: in training the questions are read again in backward (`tuning.gradient`).
        """
        attached, config, compaction = self.attached, self._config, self._reindexing()
        positions = self._positions(prompt.offsets, compaction)
        padded = any(config.padded(layer) for layer in self.memory.layers)

        def read(memory: Memory) -> PromptState:
            attention = PromptAttention(attached, config, prompt.segments, padded=padded)
            if compaction is not None:
                memory = compaction(memory, attached.rotary)
            try:
                hidden = attached.run(attention, attached.embed(prompt.ids), positions, memories=layer_tensors(memory))
            finally:  # a recomputation ends by an exception, as for chunks
                pairs = attention.take_results()
            return PromptState(
                hidden=hidden,
                segments=prompt.segments,
                keys={layer: keys for layer, (keys, _) in pairs.items()},
                values={layer: values for layer, (_, values) in pairs.items()},
            )

        return read

    def _reindexing(self) -> Compaction | None:
        """The compaction that questions are asked after, if the policy moves kept tokens up after every chunk."""
        return self._compaction() if self.policy.traits.reindex else None

    def _positions(self, offsets: Int[Tensor, "batch tokens"], compaction: Compaction | None) -> Tensor:
        """Positions of tokens after the stream, [batch, axes, tokens]."""
        starts = torch.tensor(self._next if compaction is None else compaction.end, device=offsets.device)
        return (offsets + starts[:, None])[:, None, :].expand(-1, 3, -1)

    @torch.no_grad()
    def decoding(self, state: PromptState, offsets: Int[Tensor, "batch asked"], calls: int) -> Decoding:
        """What writes the answers to the questions of `state`, of which `offsets` are those of the last tokens.

        One token of each per call, `calls` times until it is extended.
        """
        memory, config, compaction = self.memory, self._config, self._reindexing()
        if compaction is not None:
            memory = compaction(memory, self.attached.rotary)
        positions = self._positions(offsets + 1, compaction)
        padded = any(config.padded(layer) for layer in memory.layers)
        return Decoding(self.attached, config, memory, state, positions, calls=calls, padded=padded)

    @torch.no_grad()
    def answer(
        self, prompt: Prompt, head: Callable[[Tensor], Tensor], *, stop: Sequence[int], max_new_tokens: int
    ) -> list[list[list[int]]]:
        """Greedy answers: for each stream and question the new token ids, without the stop token.

        Raises ValueError when `max_new_tokens` is below 1.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {max_new_tokens} must be at least 1")
        # 1. read the questions; the logits of their last tokens
        state = self.ask(prompt)
        last, offsets = last_of_each(prompt)
        logits = head(state.hidden.gather(1, last[..., None].expand(-1, -1, state.hidden.shape[-1])))
        # 2. decode all answers together, one token of each per pass
        ends = torch.tensor(list(stop), device=last.device)
        written: list[Tensor] = []
        done = offsets < 0  # rows with fewer questions than the longest
        decoding: Decoding | None = None
        try:
            for step in range(max_new_tokens):
                ids = logits.argmax(dim=-1)
                done = done | torch.isin(ids, ends)
                written.append(torch.where(done, torch.full_like(ids, -1), ids))
                if bool(done.all()) or step + 1 == max_new_tokens:
                    break
                more = min(CALLS, max_new_tokens - 1 - step)
                if decoding is None:
                    decoding = self.decoding(state, offsets.clamp_min(0), more)
                elif step % CALLS == 0:
                    decoding.extend(more)
                logits = head(decoding(ids))
        finally:
            if decoding is not None:
                decoding.close()
        # 3. token ids of the real questions, without padding
        rows = torch.stack(written, dim=-1).tolist()
        real = (offsets >= 0).tolist()
        return [
            [[number for number in ids if number >= 0] for ids, asked in zip(row, real_row, strict=True) if asked]
            for row, real_row in zip(rows, real, strict=True)
        ]


def _check_base_selection(policy: Policy, softness: Softness | None) -> None:
    """Raises PolicyError or ValueError where `selection_from: base` does not work."""
    if not policy.supports("base_selection"):
        raise PolicyError(
            f"memory.selection_from = base keeps single tokens that the untuned model chose, and policy {policy.name} "
            "merges tokens; set it to tuned, or choose settings of the policy that merge nothing"
        )
    if softness is not None:
        raise ValueError(
            "memory.selection_from = base: the scores of the untuned model do not learn, so no gate can pass gradient "
            "to them; set tuning.selection.softening to hard"
        )
