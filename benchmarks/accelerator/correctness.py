"""Checks of a device: against the slow reference, against float32 on the CPU, and streamed against one shot."""

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast, final

import torch
from support.episodes import Episode
from support.models import cut, one_shot
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from benchmarks.accelerator.models import IGNORED, moved, questions, relative, segment, small, toy_pair
from benchmarks.accelerator.processes import Results
from omnimem.attention import reference
from omnimem.attention.blocked import MEMORY, Every, Segments, attend, attend_measured, mass, visible
from omnimem.budget import Budget
from omnimem.memory import Memory
from omnimem.policies import ControlOptions, DistinctOptions, PerturbationOptions, PolicyOptions
from omnimem.policies.base import Policy
from omnimem.scoring import AbstractScorer
from omnimem.selection import Softness, select
from omnimem.streaming.attach import StreamedAttention, attach
from omnimem.streaming.chunk_pass import DirectStep, MemoryStep
from omnimem.streaming.prompt_pass import Prompt, last_of_each, pack
from omnimem.streaming.stream import Stream
from omnimem.tokens import EVICTABLE, HIDDEN, Chunk
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
GROUPS = ((7, 1), (28, 4), (8, 8), (8, 4), (8, 2), (16, 2))  # query and key-value heads: groups of 7, 1, 2, 4 and 8
CALLS = 40  # further tokens: more than there is room for at once
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


def attention(record: Results, toy: Toy, dtype: torch.dtype, device: torch.device) -> None:
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
    for stride in (1, 4):
        _measured(record, toy, dtype, device, stride)


def _measured(record: Results, toy: Toy, dtype: torch.dtype, device: torch.device, stride: int) -> None:
    """Mass alone and together with the output, of odd lengths and all sizes of a group, against float64."""
    alone, together, output = [], [], []
    with torch.no_grad():
        for heads in GROUPS:
            for hidden in (False, True):
                drawn = Heads.random(heads, (131, 389, toy.wide[2]), dtype)
                every, gate = Every(stride, stride // 2), torch.zeros_like(drawn.gate)
                gate[:, 5:40] = HIDDEN if hidden else 0.0
                exact = [part.double() for part in (drawn.queries, drawn.keys, drawn.values)]
                expected = mass(*exact[:2], scale=drawn.scale, gate=gate.double(), every=every)
                there = [part.to(dtype=dtype, device=device) for part in exact]
                given = {"scale": drawn.scale, "gate": gate.to(device) if hidden else None}
                alone.append((relative(mass(*there[:2], every=every, **given), expected), heads))
                both = attend_measured(*there, every=every, **given)
                if both is None:
                    continue
                mixed = attend(*exact, scale=drawn.scale, gate=gate.double())
                output.append((relative(both[0], mixed), heads))
                together.append((relative(both[1], expected), heads))
    name, bounds = f"every {stride}th query" if stride > 1 else "every query", BOUNDS[dtype]
    for what, found, bound in (
        (f"mass of {name}", alone, bounds.mass),
        (f"mass of {name}, with the output", together, bounds.mass),
        (f"output, with the mass of {name}", output, bounds.output),
    ):
        if found:
            worst, heads = max(found)
            record.check(f"{what}; worst of {heads[0]} and {heads[1]} heads", dtype, worst, bound)


def chunks_of(width: int, seed: int, dtype: torch.dtype, device: torch.device) -> list[Chunk]:
    """A stream in chunks, half of whose tokens resemble one of the segment before; the same numbers on every device."""
    sizes = replace(small(), text={"hidden_size": width})
    whole = segment(sizes, 0, sum(LENGTHS), dtype=torch.float32, device=CPU)
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(whole.embeddings.shape, generator=generator)
    length = sizes.grid[0] * sizes.grid[1] + sizes.audio
    for copy in (torch.rand(embeddings.shape[1] - length, generator=generator) < 0.5).nonzero()[:, 0] + length:
        embeddings[:, copy] = 0.9 * embeddings[:, copy - length] + 0.4 * embeddings[:, copy]
    embeddings = embeddings.to(dtype)
    parts = cut(replace(whole, embeddings=embeddings), LENGTHS)
    return [moved(replace(chunk, facts=chunk.known), dtype, device) for chunk in parts]


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


def streaming(record: Results, toy: Toy, dtype: torch.dtype, device: torch.device) -> None:
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


def decoding(record: Results, toy: Toy, dtype: torch.dtype, device: torch.device) -> None:
    """Further tokens of unequal questions, one at a time, equal those of one pass over questions and tokens."""
    _, model = toy_pair(toy.width, toy.sections, dtype, device)
    lengths, generator = (3, 11, 1), torch.Generator().manual_seed(4)
    questions_ = [torch.randint(5, 300, (length,), generator=generator).tolist() for length in lengths]
    further = torch.randint(5, 300, (len(lengths), CALLS), generator=generator)
    rows = [[*asked, *row] for asked, row in zip(questions_, further.tolist(), strict=True)]
    short, long = (_packed(each, device) for each in (questions_, rows))
    for name, options in (("full", None), *POLICIES.items()):
        policy = PerturbationOptions().build(None) if options is None else options.build(Budget(slots=SLOTS))
        with torch.no_grad(), attach(model) as attached:
            stream = Stream(attached, policy)
            for chunk in chunks_of(toy.width, 1, dtype, device):
                stream.feed(chunk)
            writing = stream.decoding(stream.ask(short), last_of_each(short)[1], CALLS // 2)
            ids = further.to(device).T[:, None]
            found = [writing(ids[step]) for step in range(CALLS // 2)]
            writing.extend(CALLS - CALLS // 2)
            found += [writing(ids[step]) for step in range(CALLS // 2, CALLS)]
            writing.close()
            whole = stream.ask(long).hidden
        expected = torch.stack([part[length:] for part, length in zip(_parts(whole, rows), lengths, strict=True)], 1)
        bound = BOUNDS[dtype].output * (1 if dtype == torch.float32 else 2.5)  # two kernels that round differently
        record.check(f"a further token, {name}", dtype, relative(torch.cat(found), expected), bound)


def _packed(rows: Sequence[Sequence[int]], device: torch.device) -> Prompt:
    """Questions of one stream."""
    return pack([[(row, range(len(row)), [IGNORED] * len(row)) for row in rows]], fill=0, device=device)


def _parts(hidden: Tensor, rows: Sequence[Sequence[int]]) -> Sequence[Tensor]:
    """The states of each question."""
    return hidden[0].split([len(row) for row in rows])


def waits(record: Results, toy: Toy, dtype: torch.dtype, device: torch.device) -> None:
    """On a GPU, reading a chunk and writing a token ask the device nothing; torch itself watches that."""
    _, model = toy_pair(toy.width, toy.sections, dtype, device)
    prompt = questions(2, 8, 300, device)
    for name, options in POLICIES.items():
        with torch.no_grad(), attach(model) as attached:
            stream = Stream(attached, options.build(Budget(slots=SLOTS)))
            chunks = chunks_of(toy.width, 1, dtype, device)
            for chunk in chunks[:3]:
                stream.feed(chunk)
            writing = stream.decoding(stream.ask(prompt), last_of_each(prompt)[1], 3)
            ids = torch.zeros(1, 2, dtype=torch.long, device=device)
            for what, work in (("a chunk", partial(stream.feed, chunks[3])), ("a token", partial(writing, ids))):
                asked = _asks(work, device)
                told = f": {asked}" if asked else ""
                record.check(f"waits for the device in {what}, {name}{told}", dtype, float(bool(asked)), 0.0)


def _asks(work: Callable[[], object], device: torch.device) -> str:
    """What is said of the first wait for the device, if there is one; a CPU is not asked."""
    if device.type != "cuda":
        work()
        return ""
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "omnimem" in frame.filename]
        place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        return str(error).splitlines()[0] + place
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


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


def kept_sets(record: Results, toy: Toy, dtype: torch.dtype, device: torch.device) -> None:
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


def gradient(record: Results, toy: Toy, dtype: torch.dtype, device: torch.device) -> None:
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
