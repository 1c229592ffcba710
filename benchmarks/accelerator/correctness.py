"""Checks of a device: against the slow reference, against float32 on the CPU, and streamed against one shot."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast, final

import torch
from support.episodes import Episode
from support.models import cut, one_shot
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from benchmarks.accelerator.models import IGNORED, moved, questions, relative, segment, small, toy_pair
from benchmarks.accelerator.record import Record
from omnimem.attention import reference
from omnimem.attention.blocked import MEMORY, Segments, attend, mass, visible
from omnimem.budget import Budget
from omnimem.memory import Memory
from omnimem.policies import ControlOptions, DistinctOptions, PerturbationOptions, PolicyOptions
from omnimem.policies.base import Policy
from omnimem.scoring import AbstractScorer
from omnimem.selection import Softness, select
from omnimem.streaming.attach import StreamedAttention, attach
from omnimem.streaming.chunk_pass import DirectStep, MemoryStep
from omnimem.streaming.prompt_pass import Prompt
from omnimem.streaming.stream import Stream
from omnimem.tokens import EVICTABLE, Chunk
from omnimem.tuning import FullGradient
from omnimem.view import LayerView

LENGTHS = [23, 31, 1, 15, 26]
SLOTS = ((1, 2), (3, 20), (2, 9), (4, 14))  # audio, visual slots of the four layers
POLICIES: dict[str, PolicyOptions] = {
    "distinct": DistinctOptions(),
    "omnimem": PerturbationOptions(),
    "paper": PerturbationOptions(name="paper"),
    "released": PerturbationOptions(name="released"),
    "random": ControlOptions(name="random"),
}
CLEAR = 3e-5  # a decision is clear if kept and dropped scores differ by more than this; rounding errors are 1e-6
CPU = torch.device("cpu")


@final
@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Largest relative errors that count as rounding in a precision."""

    output: float
    gradient: float
    mass: float = 2e-5  # always computed in float32


BOUNDS = {torch.float32: Bounds(output=2e-5, gradient=1e-4), torch.bfloat16: Bounds(output=2e-2, gradient=4e-2)}


@final
@dataclass(frozen=True, kw_only=True)
class Toy:
    """Sizes of the comparisons."""

    width: int
    sections: tuple[int, ...]
    heads: tuple[int, int]  # query and key-value heads of the wide attention
    wide: tuple[int, int, int]  # its queries, keys and width of a head


LARGE = Toy(width=512, sections=(16, 24, 24), heads=(28, 4), wide=(1300, 2100, 128))
SMALL = Toy(width=64, sections=(2, 3, 3), heads=(4, 2), wide=(70, 130, 16))


@final
@dataclass(frozen=True, kw_only=True)
class Heads:
    """Projections of one layer, with a gate on every key."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    gate: Tensor

    @classmethod
    def random(cls, heads: tuple[int, int], sizes: tuple[int, int, int], dtype: torch.dtype) -> "Heads":
        """On the CPU in float32, representable in `dtype`."""
        generator = torch.Generator().manual_seed(7)
        queries, keys, dim = sizes
        shapes = [(1, heads[0], queries, dim), (1, heads[1], keys, dim), (1, heads[1], keys, dim), (1, keys)]
        parts = [torch.randn(shape, generator=generator).to(dtype).float() for shape in shapes]
        return cls(queries=parts[0], keys=parts[1], values=parts[2], gate=parts[3] * 0.5)

    def at(self, dtype: torch.dtype, device: torch.device) -> "Heads":
        """On a device, ready for gradient; the gate stays in float32."""
        parts = [part.to(device=device, dtype=dtype) for part in (self.queries, self.keys, self.values)]
        leaves = [part.detach().clone().requires_grad_() for part in (*parts, self.gate.to(device))]
        return Heads(queries=leaves[0], keys=leaves[1], values=leaves[2], gate=leaves[3])

    @property
    def scale(self) -> float:
        """Of the logits."""
        return self.queries.shape[-1] ** -0.5

    def results(self, segments: Segments | None = None) -> dict[str, Tensor]:
        """Output, mass, and the gradients of a fixed function of both."""
        output = attend(self.queries, self.keys, self.values, scale=self.scale, gate=self.gate, segments=segments)
        received = mass(self.queries, self.keys, scale=self.scale, gate=self.gate)
        generator = torch.Generator().manual_seed(8)
        loss = (output.float() * torch.randn(output.shape, generator=generator).to(output.device)).sum()
        leaves = (self.queries, self.keys, self.values, self.gate)
        names = ("gradient of queries", "gradient of keys", "gradient of values", "gradient of gate")
        slopes = zip(names, torch.autograd.grad(loss, leaves), strict=True)
        return {"output": output, "mass": received, **dict(slopes)}


def attention(record: Record, toy: Toy, dtype: torch.dtype, device: torch.device) -> None:
    """Output, mass and gradients on the device."""
    bounds = BOUNDS[dtype]
    few = Heads.random((4, 2), (6, 20, 16), dtype)
    seen = visible(0, 6, 6, 20, None, CPU)
    expected, probabilities = reference.attend(
        few.queries, few.keys, few.values, scale=few.scale, visible=seen, gate=few.gate
    )
    found = few.at(dtype, device).results()
    received = reference.mass_of_probabilities(probabilities)
    record.check("attention output, reference", dtype, relative(found["output"], expected), bounds.output)
    record.check("attention mass, reference", dtype, relative(found["mass"], received), bounds.mass)

    many = Heads.random(toy.heads, toy.wide, dtype)
    count, total, _ = toy.wide
    asked = torch.arange(count)[None] // 40
    packed = Segments(queries=asked, keys=torch.cat([torch.full((1, total - count), MEMORY), asked], dim=1))
    for name, segments in (("causal", None), ("packed", packed)):
        elsewhere = None
        if segments is not None:
            elsewhere = Segments(queries=segments.queries.to(device), keys=segments.keys.to(device))
        exact, found = many.at(torch.float32, CPU).results(segments), many.at(dtype, device).results(elsewhere)
        for part, value in found.items():
            bound = bounds.mass if part == "mass" else bounds.output if part == "output" else bounds.gradient
            record.check(f"attention {part}, {name}", dtype, relative(value, exact[part]), bound)


def chunks_of(width: int, seed: int, dtype: torch.dtype, device: torch.device) -> list[Chunk]:
    """A stream in chunks; the same numbers on every device."""
    sizes = replace(small(), text={"hidden_size": width})
    whole = segment(sizes, 0, sum(LENGTHS), dtype=torch.float32, device=CPU)
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(whole.embeddings.shape, generator=generator).to(dtype)
    return [moved(chunk, dtype, device) for chunk in cut(replace(whole, embeddings=embeddings), LENGTHS)]


def read(model: PreTrainedModel, policy: Policy, chunks: Sequence[Chunk], prompt: Prompt) -> tuple[Tensor, Stream]:
    """Hidden states of a question after the stream, and the stream."""
    with torch.no_grad(), attach(model) as attached:
        stream = Stream(attached, policy)
        for chunk in chunks:
            stream.feed(chunk)
        return stream.ask(prompt).hidden, stream


def stock_pass(model: PreTrainedModel, chunks: Sequence[Chunk], prompt: Prompt) -> Tensor:
    """The same from the stock forward pass over all tokens."""
    episode = Episode(chunks=chunks, asked=[(len(chunks), prompt)])
    with torch.no_grad():
        with attach(model) as attached:
            embeddings = episode.embeddings(attached)
        modality = torch.zeros(embeddings.shape[:2], dtype=torch.int8)
        whole = Chunk(embeddings=embeddings, positions=episode.positions, modality=modality)
        return one_shot(model, whole)[:, -prompt.ids.shape[1] :]


def streaming(record: Record, toy: Toy, dtype: torch.dtype, device: torch.device) -> None:
    """A question after a stream equals the stock pass; in low precision its error is no larger than that of stock."""
    exact_model, model = toy_pair(toy.width, toy.sections, dtype, device)
    full = PerturbationOptions().build(None)
    chunks, prompt = chunks_of(toy.width, 1, dtype, device), questions(1, 8, 300, device)
    exact_chunks = [moved(chunk, torch.float32, CPU) for chunk in chunks]
    exact = stock_pass(exact_model, exact_chunks, questions(1, 8, 300, CPU))
    stock, ours = stock_pass(model, chunks, prompt), read(model, full, chunks, prompt)[0]
    if dtype == torch.float32:
        record.check("stream equals one shot", dtype, relative(ours, stock), BOUNDS[dtype].output)
        record.check("stream equals one shot on the CPU", dtype, relative(ours, exact), 5 * BOUNDS[dtype].output)
    else:
        allowed = 1.5 * relative(stock, exact) + BOUNDS[dtype].output
        record.check("stream errs no more than stock", dtype, relative(ours, exact), allowed)


@final
@dataclass(frozen=True, kw_only=True)
class _Watched(AbstractScorer):
    """A scorer that notes its scores and the modalities of their tokens."""

    inner: AbstractScorer
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def needs_importance(self) -> bool:
        return self.inner.needs_importance

    @property
    def needs_novelty(self) -> bool:
        return self.inner.needs_novelty

    def __call__(self, view: LayerView) -> Tensor:
        scores = self.inner(view)
        self.seen.append((scores, view.modality))
        return scores


def kept_sets(record: Record, toy: Toy, dtype: torch.dtype, device: torch.device) -> None:
    """In float32 the kept tokens are those of the CPU where decisions are clear; in bfloat16 their share is noted."""
    exact_model, model = toy_pair(toy.width, toy.sections, dtype, device)
    prompt = questions(1, 8, 300, CPU)
    for name, options in POLICIES.items():
        policy = options.build(Budget(slots=SLOTS))
        seed, hidden, expected = _clear(exact_model, toy.width, policy, dtype, prompt)
        ours, found = read(model, policy, chunks_of(toy.width, seed, dtype, device), questions(1, 8, 300, device))
        pairs = zip(found.memory.layers, expected.memory.layers, strict=True)
        shared = [float(torch.isin(b.order.cpu(), a.order.cpu()).float().mean()) for a, b in pairs]
        bound = 0.0 if dtype == torch.float32 or name == "random" else None
        record.check(f"kept sets, {name}: share that differs", dtype, 1 - min(shared), bound)
        if dtype == torch.float32:
            record.check(f"answer under a budget, {name}", dtype, relative(ours, hidden), 5 * BOUNDS[dtype].output)


def _clear(
    model: PreTrainedModel, width: int, policy: Policy, dtype: torch.dtype, prompt: Prompt
) -> tuple[int, Tensor, Stream]:
    """The first stream in which, on the CPU, no two scores at the border of a selection are close."""
    for seed in range(200):
        watched = _Watched(inner=policy.scorer)
        chunks = [moved(chunk, torch.float32, CPU) for chunk in chunks_of(width, seed, dtype, CPU)]
        hidden, stream = read(model, replace(policy, scorer=watched), chunks, prompt)
        rooms = [policy.layer_slots(layer) for layer in range(len(SLOTS))] * len(LENGTHS)
        gaps = [_gap(*seen, room) for seen, room in zip(watched.seen, rooms, strict=True)]
        if min(gaps) > CLEAR:
            return seed, hidden, stream
    raise RuntimeError(f"no stream of {seed + 1} has clear decisions for {policy.name}; lower CLEAR")


def _gap(scores: Tensor, modality: Tensor, room: Any) -> float:
    """Least distance between a kept and a dropped score of one modality."""
    stays = torch.zeros_like(modality, dtype=torch.bool).scatter(1, select(scores, modality, room).index, True)
    gaps = [float("inf")]
    for kind in EVICTABLE:
        inside, outside = scores[stays & (modality == kind)], scores[~stays & (modality == kind)]
        if len(inside) and len(outside):
            gaps.append(float(inside.min() - outside.max()))
    return min(gaps)


def streamed_loss(
    attached: StreamedAttention,
    policy: Policy,
    chunks: Sequence[Chunk],
    prompt: Prompt,
    head: Callable[[Tensor], Tensor],
    carry: MemoryStep,
    temperature: float,
) -> Tensor:
    """Cross-entropy of the answers asked after the stream."""
    stream = Stream(attached, policy, carry=carry, softness=Softness(temperature=temperature))
    for chunk in chunks:
        stream.feed(chunk)
    reader, labels = stream.reader(prompt), prompt.labels
    if labels is None:
        raise ValueError("the prompt has no labels to learn from; use models.questions")
    rows = labels != IGNORED

    def loss(memory: Memory) -> Tensor:
        return F.cross_entropy(head(reader(memory).hidden[rows]).float(), labels[rows])

    return stream.read(loss)


def gradient(record: Record, toy: Toy, dtype: torch.dtype, device: torch.device) -> None:
    """The gradient through evictions, recomputed, offloaded, by layers, equals that of plain autograd and the CPU."""
    exact_model, model = toy_pair(toy.width, toy.sections, dtype, device)
    policy = POLICIES["omnimem"].build(Budget(slots=SLOTS))
    seed, _, _ = _clear(exact_model, toy.width, policy, dtype, questions(1, 8, 300, CPU))
    plain = _slope(model, policy, chunks_of(toy.width, seed, dtype, device), DirectStep())
    for name, carry, by_layer in (
        ("recomputed", FullGradient(), False),
        ("recomputed, offloaded", FullGradient(offload=True), False),
        ("recomputed by layers too", FullGradient(), True),
    ):
        found = _slope(model, policy, chunks_of(toy.width, seed, dtype, device), carry, by_layer=by_layer)
        record.check(f"gradient, {name}", dtype, relative(found, plain), BOUNDS[dtype].gradient / 10)
    if dtype == torch.float32:
        exact = _slope(exact_model, policy, chunks_of(toy.width, seed, dtype, CPU), DirectStep())
        record.check("gradient, CPU", dtype, relative(plain, exact), 10 * BOUNDS[dtype].gradient)


def _slope(
    model: PreTrainedModel, policy: Policy, chunks: Sequence[Chunk], carry: MemoryStep, *, by_layer: bool = False
) -> Tensor:
    """Gradient of the streamed loss in the query, key and value projections, as one vector."""
    parts = [p for name, p in model.named_parameters() if any(n in name for n in ("q_proj", "k_proj", "v_proj"))]
    for part in parts:
        part.requires_grad_(True)
    embedding = cast(Tensor, model.get_input_embeddings().weight)
    with attach(model, recompute_layers=by_layer) as attached:
        prompt = questions(2, 8, 300, embedding.device)
        loss = streamed_loss(attached, policy, chunks, prompt, lambda hidden: hidden @ embedding.T, carry, 0.5)
        slopes = torch.autograd.grad(loss, parts)
    for part in parts:
        part.requires_grad_(False)
    return torch.cat([slope.flatten().float() for slope in slopes])
