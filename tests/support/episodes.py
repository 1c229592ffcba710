"""An episode (chunks, and questions on the way) in one pass over all its tokens: what the streamed loss must equal."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import cast, final

import torch
from torch import Tensor
from torch.nn import functional as F

from omnimem.memory import Memory
from omnimem.policies.base import Policy, ScoredPolicy
from omnimem.scoring import AbstractScorer, Covered, KeyDifference
from omnimem.selection import taken
from omnimem.streaming.attach import StreamedAttention
from omnimem.streaming.chunk_pass import MemoryStep
from omnimem.streaming.prompt_pass import Prompt
from omnimem.tokens import EVICTABLE, Chunk, DeepStack, Modality
from omnimem.view import FLOOR, LayerView, similarity

IGNORED = -100
ChunkStep = Callable[[Memory, Tensor], Memory]


@final
@dataclass(frozen=True, kw_only=True)
class Episode:
    """Chunks, and prompts with the number of chunks that each has seen."""

    chunks: Sequence[Chunk]
    asked: Sequence[tuple[int, Prompt]]

    @property
    def spans(self) -> list[slice]:
        ends = torch.tensor([0, *(chunk.count for chunk in self.chunks)]).cumsum(0).tolist()
        return [slice(a, b) for a, b in pairwise(ends)]

    @property
    def modality(self) -> Tensor:
        return torch.cat([chunk.modality for chunk in self.chunks], dim=1)

    @property
    def positions(self) -> Tensor:
        """Of the streamed tokens, then of the questions: each goes on from what it has seen."""
        places = [chunk.positions for chunk in self.chunks]
        for seen, prompt in self.asked:
            following = max(int(chunk.positions.max()) for chunk in self.chunks[:seen]) + 1
            places.append((prompt.offsets + following)[:, None].expand(-1, 3, -1))
        return torch.cat(places, dim=2)

    def embeddings(self, attached: StreamedAttention) -> Tensor:
        """Of the streamed tokens, then of the questions."""
        questions = [attached.embed(prompt.ids) for _, prompt in self.asked]
        return torch.cat([*(chunk.embeddings for chunk in self.chunks), *questions], dim=1)

    @property
    def deepstack(self) -> DeepStack | None:
        """Of the whole pass (batch 1)."""
        parts = [chunk.deepstack for chunk in self.chunks if chunk.deepstack is not None]
        if not parts:
            return None
        plain = [torch.zeros_like(prompt.ids, dtype=torch.bool) for _, prompt in self.asked]
        features = tuple(torch.cat(level) for level in zip(*(part.features for part in parts), strict=True))
        return DeepStack(mask=torch.cat([*(part.mask for part in parts), *plain], dim=1), features=features)


@final
class CutOff:
    """A memory without a past: gradient ends at each chunk."""

    def __call__(self, step: ChunkStep, memory: Memory, embeddings: Tensor) -> tuple[Memory, MemoryStep]:
        return step(memory, embeddings).detached(), self

    def read(self, loss: Callable[[Memory], Tensor], memory: Memory) -> Tensor:
        return loss(memory)


@final
class KeptByChunk:
    """Notes the arrival numbers kept after each chunk, [chunk][layer] batch x kept, and the input bytes."""

    def __init__(self, inner: MemoryStep) -> None:
        self.inner = inner
        self.kept: list[list[Tensor]] = []
        self.bytes: list[int] = []

    def __call__(self, step: ChunkStep, memory: Memory, embeddings: Tensor) -> tuple[Memory, MemoryStep]:
        self.bytes.append(memory.bytes * memory.batch + embeddings.numel() * embeddings.element_size())
        after, self.inner = self.inner(step, memory, embeddings)
        self.kept.append([layer.order for layer in after.layers])
        return after, self

    def read(self, loss: Callable[[Memory], Tensor], memory: Memory) -> Tensor:
        return self.inner.read(loss, memory)


@final
@dataclass(frozen=True, kw_only=True)
class ScoresByChunk(AbstractScorer):
    """A scorer that notes its scores, chunk after chunk and layer after layer; recomputed ones follow at the end.

    Each note is the score and, behind it, what it was before it was discounted by what better tokens hold.
    """

    inner: AbstractScorer
    seen: list[Tensor] = field(default_factory=list)

    @property
    def needs_importance(self) -> bool:
        return self.inner.needs_importance

    @property
    def needs_novelty(self) -> bool:
        return self.inner.needs_novelty

    def __call__(self, view: LayerView) -> Tensor:
        scores = self.inner(view)
        plain = self.inner.inner(view) if isinstance(self.inner, Covered) else scores
        self.seen.append(torch.stack([scores.detach(), plain.detach()]))
        return scores


@final
@dataclass(frozen=True, kw_only=True)
class Softened:
    """What the one-shot pass must know to repeat softened selection."""

    policy: Policy
    scores: Sequence[Tensor]  # as ScoresByChunk notes them
    temperature: float
    novelty_power: float = 1.0
    form: str = "straight_through"


@final
class OneShot:
    """A layer step over all tokens at once: plain softmax and autograd, no memory, nothing recomputed.

    A token of chunk c sees what its layer kept after chunk c - 1 and the past of its own chunk; a question what was
    kept when it was asked and the past of its own segment. Keys carry the gate of softened selection, if there is one.
    What the first `constant` chunks left (keys, values, states, gates) carries no gradient.
    """

    def __init__(
        self, episode: Episode, kept: list[list[Tensor]], softened: Softened | None = None, constant: int = 0
    ) -> None:
        self.episode, self.kept, self.softened, self.constant = episode, kept, softened, constant
        self.spans, self.modality = episode.spans, episode.modality
        self.streamed = self.spans[-1].stop
        self.cache: tuple[Tensor, Tensor] | None = None  # keys and values of the layer that is read

    def __call__(
        self, layer: int, states: Tensor, queries: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        keys, values, states = (self.cut(part, axis) for part, axis in ((keys, 2), (values, 2), (states, 1)))
        self.cache = keys, values
        group = queries.shape[1] // keys.shape[1]
        wide_keys, wide_values = (part.repeat_interleave(group, dim=1) for part in (keys, values))
        logits = queries @ wide_keys.transpose(-1, -2) * scale + self.bias(layer, states)[:, None]
        return logits.softmax(dim=-1) @ wide_values

    def cut(self, tensor: Tensor, axis: int) -> Tensor:
        """The tensor, without gradient for the tokens of the constant chunks."""
        first = self.spans[self.constant - 1].stop if self.constant else 0
        past, present = tensor.split([first, tensor.shape[axis] - first], dim=axis)
        return torch.cat([past.detach(), present], dim=axis)

    def bias(self, layer: int, states: Tensor) -> Tensor:
        """batch x queries x keys: minus infinity where a key is not seen, else its gate."""
        gates = self.gates(layer, states)
        rows = []
        for number, span in enumerate(self.spans):
            past = torch.ones(span.stop - span.start, span.stop - span.start, dtype=torch.bool).tril()
            rows.append(self.rows(layer, number, past.expand(len(states), -1, -1), span.start, gates[number], states))
        first = self.streamed
        for seen, prompt in self.episode.asked:
            past = (prompt.segments[:, :, None] == prompt.segments[:, None, :]).tril()
            rows.append(self.rows(layer, seen, past, first, gates[seen], states))
            first += prompt.ids.shape[1]
        return torch.cat(rows, dim=1)

    def rows(self, layer: int, seen: int, past: Tensor, first: int, gate: Tensor, states: Tensor) -> Tensor:
        """Queries that see the memory after `seen` chunks and, from key `first` on, the past of their own kind."""
        batch, count, _ = past.shape
        visible = torch.zeros(batch, count, states.shape[1], dtype=torch.bool)
        if seen:
            visible.scatter_(2, self.kept[seen - 1][layer][:, None].expand(-1, count, -1), True)
        visible[:, :, first : first + count] |= past
        whole = F.pad(gate, (0, states.shape[1] - self.streamed))[:, None].expand(-1, count, -1)
        return whole.masked_fill(~visible, float("-inf"))

    def gates(self, layer: int, states: Tensor) -> list[Tensor]:
        """Gate of every streamed token before each chunk, and after the last one."""
        found = [states.new_zeros(len(states), self.streamed)]
        for number in range(len(self.spans)):
            after = found[-1]
            if self.softened is not None and self.softened.form == "soft":
                after = self.judged(self.softened, number, layer, states, after)
            elif self.softened is not None:
                after = after + self.added(self.softened, number, layer, states)
            found.append(after.detach() if number < self.constant else after)
        return found

    def added(self, softened: Softened, number: int, layer: int, states: Tensor) -> Tensor:
        """What the eviction after chunk `number` adds: log(1 + g - g0), g = sigmoid((z - tau) / T) of kept tokens."""
        pool, noted, score = self.pool(softened, number, layer, states)
        after, rows = self.kept[number][layer], []
        for b in range(len(states)):
            row, stays = states.new_zeros(self.streamed), torch.isin(pool[b], after[b])
            for kind in EVICTABLE:
                member = self.modality[b, pool[b]] == kind
                kept, dropped = member & stays, member & ~stays
                if not kept.any() or not dropped.any():
                    continue
                tau = (noted[b][kept].min() + noted[b][dropped].max()) / 2
                g = torch.sigmoid((score[b][kept] - tau) / noted[b][member].std(unbiased=False) / softened.temperature)
                row = row.index_add(0, pool[b][kept], torch.log(1 + g - g.detach()).to(row.dtype))
            rows.append(row)
        return torch.stack(rows)

    def judged(self, softened: Softened, number: int, layer: int, states: Tensor, before: Tensor) -> Tensor:
        """Gates after chunk `number` where they are soft: log sigmoid((z - tau) / T) in place of what they were."""
        pool, noted, score = self.pool(softened, number, layer, states)
        room, rows = softened.policy.layer_slots(layer), []
        for b in range(len(states)):
            row, kinds = before[b], self.modality[b, pool[b]]
            counts = taken({kind: int((kinds == kind).sum()) for kind in Modality}, room)
            for kind in EVICTABLE:
                places = (kinds == kind).nonzero()[:, 0].tolist()
                if not 0 < counts[kind] < len(places):
                    continue
                ranked = sorted(places, key=lambda k: (float(noted[b, k]), k), reverse=True)
                last, first = ranked[counts[kind] - 1 : counts[kind] + 1]
                side = torch.tensor([1e-4 if k in ranked[: counts[kind]] else -1e-4 for k in places])
                tau, deviation = (score[b, last] + score[b, first]) / 2, score[b, places].std(unbiased=False)
                gate = F.logsigmoid(((score[b, places] - tau) / deviation + side) / softened.temperature)
                row = row.index_put((pool[b, places],), gate.to(row.dtype))
            rows.append(row)
        return torch.stack(rows)

    def pool(self, softened: Softened, number: int, layer: int, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Arrival numbers that compete after chunk `number`, their scores as noted, and with their gradient."""
        span = self.spans[number]
        fresh = torch.arange(span.start, span.stop).expand(len(states), -1)
        pool = torch.cat([self.kept[number - 1][layer], fresh], dim=1) if number else fresh
        noted, plain = softened.scores[number * len(self.kept[0]) + layer]
        slope = self.slope(softened, states, pool) * self.slope_of_coverage(softened, states, pool, plain)
        return pool, noted, noted * slope

    def slope_of_coverage(self, softened: Softened, states: Tensor, pool: Tensor, plain: Tensor) -> Tensor:
        """1 in value, with the relative gradient of what each token says that no better one does."""
        scorer = cast(ScoredPolicy, softened.policy).scorer
        if not isinstance(scorer, Covered):
            return torch.ones_like(plain)
        held, rows = states, []
        if scorer.compared == "values":
            held = self.cached[1].transpose(1, 2).flatten(2)
        for b in range(len(states)):
            kinds, alone = self.modality[b, pool[b]], [states.new_ones(())] * len(pool[b])
            for kind in EVICTABLE:
                members = (kinds == kind).nonzero()[:, 0].tolist()
                units = F.normalize(held[b, pool[b][members]], dim=-1)
                units = units - units.mean(dim=0)
                for place, k in enumerate(members):
                    better = [i for i, j in enumerate(members) if (plain[b, j], j) > (plain[b, k], k)]
                    if better:
                        cosines = F.cosine_similarity(units[place], units[better], dim=-1)
                        alone[k] = (1 - cosines.max()).clamp_min(FLOOR)
            rows.append(torch.stack(alone))
        found = torch.stack(rows)
        if scorer.above > -1:
            found = torch.where(found < 1 - scorer.above, found, found.detach())
        return (found / found.detach()) ** scorer.power

    @property
    def cached(self) -> tuple[Tensor, Tensor]:
        assert self.cache is not None
        return self.cache

    def slope_of_keys(self, pool: Tensor) -> Tensor:
        """1 in value, with the relative gradient of how unlike the mean key each key of the pool is."""
        units = F.normalize(self.cached[0].transpose(1, 2), dim=-1)
        found = []
        for row, places in zip(units, pool, strict=True):
            cosines = F.cosine_similarity(row[places], row[places].mean(dim=0, keepdim=True), dim=-1)
            found.append((1 - cosines.mean(dim=1)).clamp_min(FLOOR))
        score = torch.stack(found)
        return score / score.detach()

    def slope(self, softened: Softened, states: Tensor, pool: Tensor) -> Tensor:
        """1 in value, with the relative gradient of the score: through its novelty alone, as Softness.gradient says."""
        scorer = cast(ScoredPolicy, softened.policy).scorer
        if isinstance(scorer.inner if isinstance(scorer, Covered) else scorer, KeyDifference):
            return self.slope_of_keys(pool)
        measures, streamed = softened.policy.measures, states[:, : self.streamed]
        if measures.neighbours == "arrival":
            parts = [1 - similarity(streamed[:, s], self.modality[:, s], measures) for s in self.spans]
            novelty = torch.cat(parts, dim=1).gather(1, pool)
        else:
            feature = streamed.gather(1, pool[..., None].expand(-1, -1, states.shape[-1]))
            novelty = 1 - similarity(feature, self.modality.gather(1, pool), measures)
        novelty = novelty.clamp_min(FLOOR)
        return (novelty / novelty.detach()) ** softened.novelty_power


def one_shot_loss(
    attached: StreamedAttention, head: Callable[[Tensor], Tensor], episode: Episode, step: OneShot
) -> Tensor:
    """The mean answer loss of an episode from one pass over everything."""
    hidden = attached.run(step, episode.embeddings(attached), episode.positions, episode.deepstack)
    labels = [prompt.labels for _, prompt in episode.asked if prompt.labels is not None]
    return mean_answer_loss(head(hidden[:, step.streamed :]), torch.cat(labels, dim=1))


def mean_answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over streams of the mean cross-entropy of their answer tokens: a stream counts the same in any batch."""
    each = [F.cross_entropy(row, label, ignore_index=IGNORED) for row, label in zip(logits, labels, strict=True)]
    return torch.stack(each).mean()
