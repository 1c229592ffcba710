"""Speed of a device: every arm of a table in turn, in one process, on one model."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any, final

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.backends import cuda
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import DynamicCache, PreTrainedModel

from benchmarks.accelerator.clock import GIB, Arm, Clock, Work, release
from benchmarks.accelerator.correctness import streamed_loss
from benchmarks.accelerator.models import OPENING, Sizes, questions, random_model, segment
from benchmarks.accelerator.processes import Results
from omnimem.attention.blocked import BLOCK, Every, attend, attend_measured, mass, visible
from omnimem.budget import SplitBudget
from omnimem.policies import ControlOptions, DistinctOptions, PerturbationOptions, PolicyOptions
from omnimem.policies.base import Policy, ScoredPolicy
from omnimem.scoring import AbstractScorer
from omnimem.selection import LayerSlots, select
from omnimem.streaming.attach import attach
from omnimem.streaming.chunk_pass import DirectStep, MemoryStep
from omnimem.streaming.prompt_pass import Prompt, last_of_each
from omnimem.streaming.stream import Stream
from omnimem.tokens import Chunk
from omnimem.tuning import FullGradient
from omnimem.view import LayerView

ARMS: dict[str, PolicyOptions] = {
    "random": ControlOptions(name="random"),  # the floor
    "omnimem": PerturbationOptions(),
    "omnimem, every 4th query": PerturbationOptions(query_stride=4),
    "paper": PerturbationOptions(name="paper"),
    "distinct": DistinctOptions(),
    "distinct, by head": DistinctOptions(per_head=True),
    "omnimem, inputs compared": PerturbationOptions(compared="inputs"),
}
HOUR = 75.0  # seconds after which an hour of video is given up
TEMPERATURE = 0.5


@final
@dataclass(frozen=True, kw_only=True)
class _MassAlone(AbstractScorer):
    """The attention that a token has received."""

    @property
    def needs_importance(self) -> bool:
        return True

    def __call__(self, view: LayerView) -> Tensor:
        return view.importance


@contextmanager
def plainly(work: Work) -> Iterator[Work]:
    """Work without set-up."""
    yield work


@final
@dataclass(frozen=True, kw_only=True)
class Bench:
    """Shared by all measurements."""

    record: Results
    clock: Clock
    sizes: Sizes
    whole: Sizes  # the same with all layers
    dtype: torch.dtype
    device: torch.device

    def measure(self, section: str, arms: Mapping[str, Arm], **facts: Callable[[float], float]) -> None:
        """Time the arms in turn and note a row of each; `facts` are derived from the median milliseconds."""
        rows = self.clock.side_by_side(arms)
        for row in rows.values():
            row |= {name: of(row["median_ms"]) for name, of in facts.items() if "median_ms" in row}
        self.record.measured(section, rows)
        release()

    def chunk(self, first: int, count: int) -> Chunk:
        """A segment of the stream."""
        return segment(self.sizes, first, count, dtype=self.dtype, device=self.device)

    def policy(self, options: PolicyOptions) -> Policy:
        """At the slots of these sizes."""
        return options.build(SplitBudget().build(self.sizes.layers, self.sizes.memory))

    def mass_alone(self) -> Policy:
        """The same slots for what has received most attention: no redundancy, no coverage."""
        return ScoredPolicy(name="mass", scorer=_MassAlone(), budget=self.policy(ARMS["random"]).budget)

    def of_whole(self) -> "Bench":
        """All layers."""
        return replace(self, sizes=self.whole)

    def model(self) -> PreTrainedModel:
        """The text model."""
        return random_model(self.sizes.text, dtype=self.dtype, device=self.device)

    def head(self) -> nn.Linear:
        """Hidden states to logits."""
        shape = self.sizes.text["hidden_size"], self.sizes.text["vocab_size"]
        return nn.Linear(*shape, bias=False, dtype=self.dtype, device=self.device).requires_grad_(False)


def ceilings(bench: Bench) -> None:
    """A matrix product and a copy: the limits of the device."""
    side = bench.sizes.square
    a, b = (torch.randn(side, side, device=bench.device).to(bench.dtype) for _ in range(2))
    bench.measure("ceiling", {"matrix product": lambda: plainly(lambda: a @ b)}, tflops=lambda ms: 2e-9 * side**3 / ms)
    source = torch.zeros(16, side, side, dtype=bench.dtype, device=bench.device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    bench.measure("ceiling", {"copy": lambda: plainly(lambda: target.copy_(source))}, gb_s=lambda ms: 1e-6 * moved / ms)


@final
@dataclass(frozen=True, kw_only=True)
class Layer:
    """Projections of one layer over [memory ; chunk]."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    scale: float

    @classmethod
    def random(cls, bench: Bench, count: int) -> "Layer":
        """Drawn on the device."""
        text, total = bench.sizes.text, bench.sizes.memory + count
        heads, kv_heads = text["num_attention_heads"], text["num_key_value_heads"]
        dim = text["hidden_size"] // heads
        shapes = ((1, heads, count, dim), (1, kv_heads, total, dim), (1, kv_heads, total, dim))
        q, k, v = (torch.randn(shape, device=bench.device).to(bench.dtype) for shape in shapes)
        return cls(queries=q, keys=k, values=v, scale=dim**-0.5)

    def ways(self) -> dict[str, Callable[[], Tensor]]:
        """Our attention and alternatives."""
        gate = torch.zeros(1, self.keys.shape[2], device=self.keys.device)
        plain = (self.queries, self.keys, self.values)
        return {
            "ours": lambda: attend(*plain, scale=self.scale),
            "ours, gated": lambda: attend(*plain, scale=self.scale, gate=gate),
            "keys repeated": self._repeated,
            "lower-right bias": self._lower_right,
        }

    def _repeated(self) -> Tensor:
        """As ours, but with one key head per query head: the memory-efficient kernel has no grouped heads."""
        group = self.queries.shape[1] // self.keys.shape[1]
        keys, values = (part.repeat_interleave(group, dim=1) for part in (self.keys, self.values))
        count, total, blocks = self.queries.shape[2], keys.shape[2], []
        for first in range(0, count, BLOCK):
            last = min(first + BLOCK, count)
            mask = visible(first, last, count, total, None, keys.device)[:, None]
            rows = self.queries[:, :, first:last]
            blocks.append(F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=self.scale))
        return torch.cat(blocks, dim=2)

    def _lower_right(self) -> Tensor:
        """All queries at once; the flash kernel takes the causal mask that ends at the last key."""
        bias: Any = causal_lower_right(self.queries.shape[2], self.keys.shape[2])
        return F.scaled_dot_product_attention(
            self.queries, self.keys, self.values, attn_mask=bias, scale=self.scale, enable_gqa=True
        )

    def and_back(self, way: Callable[[], Tensor]) -> None:
        """Forward and backward."""
        parts = (self.queries, self.keys, self.values)
        for part in parts:
            part.requires_grad_(True)
        try:
            torch.autograd.grad(way().sum(), parts)
        finally:
            for part in parts:
                part.requires_grad_(False)


def attention(bench: Bench) -> None:
    """One layer's attention, attention mass and selection, and which kernels take our call."""
    for count in bench.sizes.chunks:
        layer = Layer.random(bench, count)
        bench.record.measured(f"kernels, chunk {count}", {"our call": _kernels(layer)})
        ways = layer.ways()
        with torch.no_grad():
            forward = {name: _arm(way) for name, way in ways.items()}
            bench.measure(f"attention, chunk {count}", {**forward, **_judging(bench, layer)})
        both = {name: _arm(partial(layer.and_back, way)) for name, way in ways.items()}
        bench.measure(f"attention and backward, chunk {count}", both)


def _arm(work: Work) -> Arm:
    return lambda: plainly(work)


def _kernels(layer: Layer) -> dict[str, Any]:
    """The fused kernels that accept our call; without any, torch falls back to storing all probabilities."""
    if layer.queries.device.type != "cuda":
        return {}
    call = cuda.SDPAParams(layer.queries, layer.keys, layer.values, None, 0.0, False, True)
    accepts = {"flash": cuda.can_use_flash_attention, "efficient": cuda.can_use_efficient_attention}
    return {name: accept(call) for name, accept in {**accepts, "cudnn": cuda.can_use_cudnn_attention}.items()}


def _judging(bench: Bench, layer: Layer) -> dict[str, Arm]:
    """The work that a policy adds to a layer."""
    total = layer.keys.shape[2]
    tokens = bench.chunk(OPENING, total)
    scores, room = torch.rand(1, total, device=bench.device), bench.policy(ARMS["random"]).layer_slots(0)
    if not isinstance(room, LayerSlots):
        raise TypeError("these sizes have no budget; give Sizes.memory")
    plain = (layer.queries, layer.keys, layer.values)
    together = {
        f"with its mass, stride {stride}": _arm(partial(_measured, *plain, layer.scale, Every(stride)))
        for stride in (1, 4)
    }
    return {
        **together,
        "mass of every 4th query": _arm(lambda: mass(layer.queries, layer.keys, scale=layer.scale, every=Every(4))),
        "mass": _arm(lambda: mass(layer.queries, layer.keys, scale=layer.scale)),
        "mass, released": _arm(lambda: mass(layer.queries, layer.keys, scale=layer.scale, heads="logits")),
        "selection": _arm(lambda: select(scores, tokens.modality, room)),
    }


def _measured(queries: Tensor, keys: Tensor, values: Tensor, scale: float, every: Every) -> object:
    """Attention and its mass as evaluation has them: in one pass where there is one, else in two."""
    both = attend_measured(queries, keys, values, scale=scale, every=every)
    if both is None:
        both = attend(queries, keys, values, scale=scale), mass(queries, keys, scale=scale, every=every)
    return both


def filled(bench: Bench, model: PreTrainedModel, policy: Policy) -> Stream:
    """A stream after one chunk that is longer than the memory."""
    count = max(bench.sizes.memory + OPENING + bench.sizes.chunks[0], bench.sizes.chunks[-1])
    with torch.no_grad(), attach(model) as attached:
        stream = Stream(attached, policy)
        stream.feed(bench.chunk(0, count))
    return stream


def on_fork(stream: Stream, model: PreTrainedModel, work: Callable[[Stream], object]) -> Arm:
    """Work on a fork of the stream, made before the clock starts."""

    @contextmanager
    def arm() -> Iterator[Work]:
        with torch.no_grad(), attach(model):
            yield partial(work, stream.fork())

    return arm


@final
@dataclass(frozen=True, kw_only=True)
class Stock:
    """transformers' own attention over a cache of as many tokens as our memory has slots."""

    model: PreTrainedModel
    past: tuple[tuple[Tensor, Tensor], ...]
    position: int

    @classmethod
    def of(cls, bench: Bench, model: PreTrainedModel) -> "Stock":
        """With random keys and values."""
        text, count = bench.sizes.text, bench.sizes.memory
        shape = (1, text["num_key_value_heads"], count, text["hidden_size"] // text["num_attention_heads"])
        drawn = [torch.randn(2, *shape, device=bench.device).to(bench.dtype) for _ in range(bench.sizes.layers)]
        return cls(model=model, past=tuple((pair[0], pair[1]) for pair in drawn), position=count)

    @contextmanager
    def step(self, chunk: Chunk) -> Iterator[Work]:
        """Reading one chunk."""
        cache = DynamicCache()
        for number, (keys, values) in enumerate(self.past):
            cache.update(keys, values, number)
        model: Any = self.model
        with torch.no_grad():
            yield lambda: model(
                inputs_embeds=chunk.embeddings,
                position_ids=chunk.positions.transpose(0, 1),
                past_key_values=cache,
                use_cache=True,
            )


def chunk_steps(bench: Bench) -> None:
    """Stock and ours at every chunk length, with full memories."""
    model, layers = bench.model(), bench.sizes.layers
    stock = Stock.of(bench, model)
    streams = {name: filled(bench, model, bench.policy(options)) for name, options in ARMS.items()}
    streams["attention mass alone"] = filled(bench, model, bench.mass_alone())
    bench.record.measured("memory of a stream", {name: _state(stream) for name, stream in streams.items()})
    for count in bench.sizes.chunks:
        chunk = bench.chunk(streams["random"].fed, count)
        arms: dict[str, Arm] = {"stock sdpa": partial(stock.step, chunk)}
        for name, stream in streams.items():
            arms[name] = on_fork(stream, model, lambda fork, chunk=chunk: fork.feed(chunk))
        bench.measure(f"chunk of {count}", arms, ms_a_layer=lambda ms: ms / layers)


def _state(stream: Stream) -> dict[str, float]:
    """Bytes between two chunks, and those of all but keys and values over those of keys and values."""
    stored = sum(
        part.numel() * part.element_size() for layer in stream.memory.layers for part in (layer.keys, layer.values)
    )
    return {"state_gib": stream.bytes / GIB, "side_share": (stream.bytes - stored) / stored}


def hour(bench: Bench) -> None:
    """An hour of video through an empty memory, chunk by chunk, and the largest memory in use meanwhile.

    The limit of the peak is weights + memory, 5 % more, and the activations of transformers' own pass over one chunk.
    """
    model, sizes = bench.model(), bench.sizes
    weights = sum(part.numel() * part.element_size() for part in model.parameters()) / GIB
    for count in sizes.chunks:
        alone = bench.clock.side_by_side({"one chunk": partial(_alone, model, bench.chunk(OPENING, count))})
        with torch.no_grad(), attach(model) as attached:
            for tokens in (sizes.memory + 2 * count, sizes.hour):  # the first one chooses and compiles kernels
                stream = Stream(attached, bench.policy(ARMS["omnimem"]))
                row = _read_through(bench, stream, count, tokens)
        row |= {"weights_gib": weights, "memory_gib": stream.bytes / GIB}
        one = alone["one chunk"].get("transient_gib")
        if one is not None:
            row |= {"one_chunk_gib": one, "limit_gib": 1.05 * (weights + row["memory_gib"]) + one}
        bench.record.measured("an hour of video", {f"chunks of {count}": row})
        del stream
        release()


def _read_through(bench: Bench, stream: Stream, count: int, tokens: int) -> dict[str, Any]:
    """Read so many tokens in chunks; after HOUR seconds only how far they went."""
    gpu = bench.device.type == "cuda"
    if gpu:
        torch.cuda.synchronize(bench.device)
        torch.cuda.reset_peak_memory_stats(bench.device)
    began = perf_counter()
    while stream.fed < tokens and perf_counter() - began < HOUR:
        stream.feed(bench.chunk(stream.fed, min(count, tokens - stream.fed)))
    if gpu:
        torch.cuda.synchronize(bench.device)
    taken = perf_counter() - began
    row: dict[str, Any] = {"tokens": stream.fed, "tokens_per_second": stream.fed / taken}
    row |= {"seconds" if stream.fed >= tokens else "seconds_given_up": taken}
    return {**row, "peak_gib": torch.cuda.max_memory_allocated(bench.device) / GIB} if gpu else row


@contextmanager
def _alone(model: PreTrainedModel, chunk: Chunk) -> Iterator[Work]:
    """transformers' own pass over one chunk, without a memory."""
    own: Any = model
    with torch.no_grad():
        yield lambda: own(inputs_embeds=chunk.embeddings, position_ids=chunk.positions.transpose(0, 1), use_cache=False)


def asking(bench: Bench) -> None:
    """Latencies: a question, every further token, a whole answer."""
    model, head, sizes = bench.model(), bench.head(), bench.sizes
    stream = filled(bench, model, bench.policy(ARMS["omnimem"]))
    stock = Stock.of(bench, model)
    one, eight = (questions(n, sizes.question, sizes.text["vocab_size"], bench.device) for n in (1, 8))
    single = segment(sizes, 0, 1, dtype=bench.dtype, device=bench.device)

    def ask(prompt: Prompt, fork: Stream) -> Tensor:
        return head(fork.ask(prompt).hidden[:, -1:]).argmax(dim=-1)

    def answer(fork: Stream) -> object:
        return fork.answer(one, head, stop=[-1], max_new_tokens=sizes.answers)

    bench.measure(
        "asking",
        {
            "a question": on_fork(stream, model, partial(ask, one)),
            "8 questions": on_fork(stream, model, partial(ask, eight)),
            "a further token": lambda: _continued(stream, model, head, one),
            "a further token of 8": lambda: _continued(stream, model, head, eight),
            "stock, further": lambda: _stock_token(stock, head, single),
            f"an answer of {sizes.answers} tokens": on_fork(stream, model, answer),
        },
    )


@contextmanager
def _continued(stream: Stream, model: PreTrainedModel, head: nn.Module, prompt: Prompt) -> Iterator[Work]:
    with torch.no_grad(), attach(model):
        fork = stream.fork()
        decoding = fork.decoding(fork.ask(prompt), last_of_each(prompt)[1], 1)
        ids = prompt.ids[prompt.offsets == prompt.offsets.max()][None]
        yield lambda: head(decoding(ids)).argmax(dim=-1)


@contextmanager
def _stock_token(stock: Stock, head: nn.Module, single: Chunk) -> Iterator[Work]:
    with stock.step(single) as step:
        yield lambda: head(step().last_hidden_state).argmax(dim=-1)


def training(bench: Bench) -> None:
    """Forward and backward of a stream that overflows its memory, with LoRA and softened selection."""
    model, head, sizes = bench.model(), bench.head(), bench.sizes
    adapters = _adapted(model, sizes.rank)
    length = sizes.chunks[0]
    chunks = [bench.chunk(number * length, length) for number in range(sizes.memory // length + 2)]
    prompt = questions(1, sizes.question, sizes.text["vocab_size"], bench.device)
    policy = bench.policy(ARMS["omnimem"])

    def arm(carry: MemoryStep, *, by_layer: bool = False) -> Arm:
        @contextmanager
        def opened() -> Iterator[Work]:
            with attach(model, recompute_layers=by_layer) as attached:

                def work() -> None:
                    loss = streamed_loss(attached, policy, chunks, prompt, head, carry, TEMPERATURE)
                    torch.autograd.grad(loss, adapters)

                yield work

        return opened

    arms: dict[str, Arm] = {
        "recompute": arm(FullGradient()),
        "recompute, offload": arm(FullGradient(offload=True)),
        "recompute by layers too": arm(FullGradient(), by_layer=True),
        "recompute by layers too, offload": arm(FullGradient(offload=True), by_layer=True),
        "stored": arm(DirectStep()),
    }
    bench.measure(f"training, {len(chunks)} chunks of {length}", arms, ms_a_chunk=lambda ms: ms / len(chunks))


def _adapted(model: PreTrainedModel, rank: int) -> list[Tensor]:
    """LoRA on q, k and v as in the release, in float32; only LoRA is trained."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=["q_proj", "k_proj", "v_proj"])
    inject_adapter_in_model(config, model)
    found = []
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            found.append(parameter.requires_grad_(True))
    return found
