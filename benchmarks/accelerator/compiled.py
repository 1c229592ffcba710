"""torch.compile and CUDA graphs: the pass over a chunk and a further token, against the same without."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.accelerator.clock import Arm, Work
from benchmarks.accelerator.models import questions
from benchmarks.accelerator.speed import Bench, filled
from omnimem.policies import ControlOptions, PerturbationOptions
from omnimem.streaming.attach import attach
from omnimem.streaming.decoding import Decoding
from omnimem.streaming.prompt_pass import last_of_each
from omnimem.streaming.stream import Stream
from omnimem.tokens import Chunk

POLICIES = {"random": ControlOptions(name="random"), "omnimem": PerturbationOptions()}
CALLS = 64  # further tokens that an arm may write: more than a clock measures, warming up included


def _how(bench: Bench) -> dict[str, Any]:
    """Settings of torch.compile; on a CPU, where the script itself is tried, nothing is compiled."""
    inductor = bench.device.type == "cuda"
    return {"fullgraph": True, "dynamic": False, "backend": "inductor" if inductor else "eager"}


def _first(bench: Bench, section: str, name: str, work: Callable[[], Any]) -> list[Any]:
    """The result of the first run, which compiles, whose seconds are noted; nothing if it failed, as is noted then."""
    started = time.perf_counter()
    try:
        result = work()
        if bench.device.type == "cuda":
            torch.cuda.synchronize(bench.device)
    except Exception as error:  # noqa: BLE001 - whatever a compiler meets on a device never tried before is the result
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        bench.record.measured(section, {name: {"not_compiled": text}})
        return []
    bench.record.measured(section, {f"{name}, first": {"seconds": time.perf_counter() - started}})
    return [result]


def compiled_chunks(bench: Bench) -> None:
    """The pass over the shorter chunk, as it is and compiled, under the floor and the default policy."""
    model, count, section = bench.model(), bench.sizes.chunks[0], f"compiled chunk of {bench.sizes.chunks[0]}"
    for name, options in POLICIES.items():
        torch._dynamo.reset()
        with torch.compiler.set_stance("force_eager"):
            stream = filled(bench, model, bench.policy(options))
            with torch.no_grad(), attach(model):
                for _ in range(2):  # from then on the memory has one layout
                    stream.feed(bench.chunk(stream.fed, count))
        chunk = bench.chunk(stream.fed, count)

        @contextmanager
        def arm(stance: str, stream: Stream = stream, chunk: Chunk = chunk) -> Iterator[Work]:
            with torch.no_grad(), attach(model), torch.compiler.set_stance(stance):
                yield partial(stream.fork().feed, chunk)

        def once() -> None:
            with arm("default") as work:
                work()

        model.compile(**_how(bench))
        arms: dict[str, Arm] = {f"{name}, eager": partial(arm, "force_eager")}
        if _first(bench, section, f"{name}, compiled", once):
            arms[f"{name}, compiled"] = partial(arm, "default")
        bench.measure(section, arms)


def compiled_tokens(bench: Bench) -> None:
    """A further token of one question and of eight, as it is and compiled with CUDA graphs."""
    model, head = bench.model(), bench.head()
    stream = filled(bench, model, bench.policy(POLICIES["omnimem"]))
    for asked in (1, 8):
        torch._dynamo.reset()
        section, ways, ids = _further(bench, stream, model, asked, ("eager", "compiled"))
        works: dict[str, Work] = {"eager": partial(_token, ways["eager"], head, ids)}
        with torch.no_grad(), attach(model):
            call = torch.compile(partial(_token, ways["compiled"], head), **_how(bench), **_mode(bench))
            for tensor in _held(ways["compiled"]):
                torch._dynamo.mark_static_address(tensor)
            if _first(bench, f"compiled {section}", "compiled", partial(call, ids)):
                works["compiled"] = partial(call, ids)
        bench.measure(f"compiled {section}", {name: partial(_attached, model, work) for name, work in works.items()})


def graphed_tokens(bench: Bench) -> None:
    """A further token of one question and of eight, as it is and replayed by a CUDA graph."""
    model, head = bench.model(), bench.head()
    stream = filled(bench, model, bench.policy(POLICIES["omnimem"]))
    for asked in (1, 8):
        section, ways, ids = _further(bench, stream, model, asked, ("eager", "CUDA graph"))
        works: dict[str, Work] = {"eager": partial(_token, ways["eager"], head, ids)}
        if bench.device.type == "cuda":
            with torch.no_grad(), attach(model):
                once = partial(_token, ways["CUDA graph"], head, ids)
                for replay in _first(bench, f"graphed {section}", "CUDA graph", partial(_replayed, once)):
                    works["CUDA graph"] = replay
        bench.measure(f"graphed {section}", {name: partial(_attached, model, work) for name, work in works.items()})


def _further(
    bench: Bench, stream: Stream, model: PreTrainedModel, asked: int, ways: tuple[str, ...]
) -> tuple[str, dict[str, Decoding], Tensor]:
    """The name of the section, a decoding for each way, and ids of the next tokens."""
    prompt = questions(asked, bench.sizes.question, bench.sizes.text["vocab_size"], bench.device)
    ids = torch.zeros(1, asked, dtype=torch.long, device=bench.device)
    with torch.no_grad(), attach(model):
        state, offsets = stream.ask(prompt), last_of_each(prompt)[1]
        return (f"further token of {asked}", {name: stream.decoding(state, offsets, CALLS) for name in ways}, ids)


@contextmanager
def _attached(model: PreTrainedModel, work: Work) -> Iterator[Work]:
    with torch.no_grad(), attach(model):
        yield work


def _mode(bench: Bench) -> dict[str, Any]:
    return {"mode": "reduce-overhead"} if bench.device.type == "cuda" else {}


def _token(decoding: Decoding, head: torch.nn.Module, ids: Tensor) -> Tensor:
    return head(decoding(ids)).argmax(dim=-1)


def _held(decoding: Decoding) -> list[Tensor]:
    """The tensors that a call changes, or reads at the same addresses."""
    of_places = [part for places in decoding.distinct.values() for part in (places.index, places.bias)]
    return [*(part for pair in decoding.stored for part in pair), *of_places, decoding.positions, decoding.own]


def _replayed(work: Callable[[], Tensor]) -> Work:
    """What replays one call as a CUDA graph; kernels are chosen before, on another stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
