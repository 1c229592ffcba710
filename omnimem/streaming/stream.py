"""Stream: feed chunks, ask questions on a fork, at any time; the same object in training and in evaluation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Int
from torch import Tensor

from omnimem.memory import Memory
from omnimem.policies.base import Policy, projection
from omnimem.positions import distinct, earlier
from omnimem.selection import Softness
from omnimem.streaming.attach import StreamedAttention
from omnimem.streaming.chunk_pass import (
    ChunkStep,
    Compaction,
    MemoryStep,
    ReadConfig,
    Recorder,
    layer_tensors,
    step_directly,
)
from omnimem.streaming.prompt_pass import Prompt, PromptAttention, PromptState, last_of_each
from omnimem.tokens import Chunk, Modality


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
        attached: StreamedAttention,
        policy: Policy,
        *,
        batch: int = 1,
        softness: Softness | None = None,
        carry: MemoryStep = step_directly,
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
        self.attached, self.policy, self.softness = attached, policy, softness
        self.carry, self.recorder, self.last_position = carry, recorder, last_position
        self._manner = ReadConfig(
            policy=policy,
            softness=softness,
            recorder=recorder,
            projection=self._feature_projection(),
            probes=tuple(probes),
        )
        shape, matrix = attached.shape, self._manner.projection
        width = shape.feature if matrix is None else matrix.shape[1]
        self.memory = Memory.empty(replace(shape, feature=width), batch)
        self.fed = 0  # tokens fed so far
        self._next = (0,) * batch  # position that follows what was fed, of each stream
        self._moved = (0,) * batch  # by how much later tokens stand earlier than the backbone counts
        self.opening = 0  # positions below this belong to the text before the stream and never move
        self.usage = Usage()

    def _feature_projection(self) -> Tensor | None:
        """None: the exact state; a matrix without columns where nothing judges redundancy."""
        shape, wanted = self.attached.shape, self.policy.measures.feature
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
        sifted = self.policy.prefilter(chunk, arrival.expand(chunk.modality.shape))
        read = sifted.chunk
        before = self.memory.entries
        if read.count:
            step = ChunkStep(
                attached=self.attached,
                manner=self._manner,
                positions=read.positions,
                modality=read.modality,
                deepstack=read.deepstack,
                order=sifted.order,
                compaction=compaction,
            )
            self.memory = self.carry(step, self.memory, read.embeddings)
        elif compaction is not None:
            self.memory = compaction(self.memory, self.attached.rotary)
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
            self.attached,
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

    def ask(self, prompt: Prompt, before: PromptState | None = None) -> PromptState:
        """Read packed questions (or, after `before`, their continuation); the memory stays as it is."""
        return self.reader(prompt, before)(self.memory)

    def reader(self, prompt: Prompt, before: PromptState | None = None) -> Callable[[Memory], PromptState]:
        """`ask` as a function of a memory, asked where the stream is now, however often and however late it is called.

        It holds no memory of its own: in training the questions are read again in backward (`tuning.gradient`).
        """
        attached, manner, compaction, first = self.attached, self._manner, None, self._next
        if self.policy.reindex:
            compaction = self._compaction()
            first = compaction.end
        starts = torch.tensor(first, device=prompt.offsets.device)[:, None]
        positions = (prompt.offsets + starts)[:, None, :].expand(-1, 3, -1)

        def read(memory: Memory) -> PromptState:
            step = PromptAttention(attached, manner, prompt.segments, before)
            if compaction is not None:
                memory = compaction(memory, attached.rotary)
            try:
                hidden = attached.run(step, attached.embed(prompt.ids), positions, memories=layer_tensors(memory))
            finally:  # as for chunks
                pairs = step.take_results()
            past = () if before is None else (before,)
            return PromptState(
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
        last, offsets = last_of_each(prompt)
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
