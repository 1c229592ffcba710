"""How far each part of a layer, and a further token, is from what the machine allows: operations, bytes, seconds.

python benchmarks/roofline.py [--chunk N]... [--slots N] [--width N] [--rounds N]

On a CPU.

A part needs at least operations / (rate of a 1,024^3 matrix product) and bytes / (rate of copying 64 MB), both measured
in the same run, in CPU seconds of one thread; the larger one is its bound. Bytes count every input and output once.
Shapes are those of benchmarks/stream_cost.py: 8 heads, 2 key-value heads, a quarter of the tokens audio. Copies that
stay in the cache may be faster than the bound. A further token reads every weight and all keys and values of 4 layers;
"products alone" are those of one token with all weights, one layer after another.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.stream_cost import HEADS, KV_HEADS, built, chunk_of, model_of
from benchmarks.tables import markdown
from omnimem.attention.blocked import Every, attend, attend_measured, mass
from omnimem.cli.parser import Parser, run_command
from omnimem.policies.base import sketch
from omnimem.policies.perturbation import SKETCH as SKETCHES
from omnimem.scoring.covered import uncovered_contested, uncovered_values
from omnimem.sketches import Codes, References, encoded, vectors
from omnimem.streaming.attach import attach
from omnimem.streaming.prompt_pass import IGNORED, last_of_each, pack
from omnimem.streaming.stream import Stream
from omnimem.view import Contest, Measures, similarity

SKETCH = SKETCHES[2]
LAYERS, QUESTION = 4, 32  # of a further token: layers of the model, tokens of a question

Part = tuple[str, float, float, Callable[[], Any]]  # name, operations, numbers moved, what is timed


def seconds(run: Callable[[], Any], rounds: int) -> float:
    """Median CPU seconds of this thread, after one round that does not count."""
    run()
    spent = []
    for _ in range(rounds):
        began = time.thread_time()
        run()
        spent.append(time.thread_time() - began)
    return median(spent)


def rates(rounds: int) -> tuple[float, float]:
    """Operations and bytes per second of this machine."""
    square, row = torch.randn(1024, 1024), torch.randn(16_000_000)
    copy = torch.empty_like(row)
    return 2 * 1024**3 / seconds(lambda: square @ square, rounds), 2 * row.nbytes / seconds(
        lambda: copy.copy_(row), rounds
    )


def parts(chunk: int, slots: int, width: int) -> Iterator[Part]:
    """The parts of one layer that reads a chunk after a full memory."""
    # 1. shapes
    pool, dim, inner, seen = slots + chunk, width // HEADS, width * 11 // 4, slots + chunk / 2
    kv = KV_HEADS * dim
    states, square, narrow = torch.randn(chunk, width), torch.randn(width, width), torch.randn(2 * kv, width)
    up, down = torch.randn(inner, width), torch.randn(width, inner)
    queries = torch.randn(1, HEADS, chunk, dim)
    keys, values = torch.randn(2, 1, KV_HEADS, pool, dim)
    feature, low = (torch.randn(1, pool, width), encoded(torch.randn(1, pool, SKETCH), 2, learns=False))
    modality = torch.tensor([2, 2, 2, 1], dtype=torch.int8).repeat(-(-pool // 4))[None, :pool]
    scores, index = torch.rand(1, pool), torch.randperm(pool)[:slots].sort().values
    contest = [Contest(modality > 0, slots)]

    # 2. what the model itself does
    def linear() -> None:
        F.linear(states, square), F.linear(states, square), F.linear(states, narrow)
        F.linear(F.silu(F.linear(states, up)) * F.linear(states, up), down)

    weights = 2 * width * width + 2 * kv * width + 3 * width * inner
    yield "projections and MLP", 2 * chunk * weights, weights + chunk * (8 * width + 3 * inner), linear
    operations, moved = 4 * HEADS * chunk * seen * dim, 2 * HEADS * chunk * dim + 2 * kv * pool
    yield "attention", operations, moved, lambda: attend(queries, keys, values, scale=0.1)
    # 3. what a policy adds
    for stride, name in ((1, ""), (4, " of every fourth query")):
        every, of_mass = Every(stride), 2 * HEADS * chunk * seen * dim / stride
        both = partial(attend_measured, queries, keys, values, scale=0.1, every=every)
        yield f"attention with its mass{name}", operations, moved, both
        alone = partial(mass, queries, keys, scale=0.1, every=every)
        yield f"mass{name} alone, as in training", of_mass, HEADS * chunk * dim / stride + kv * pool, alone
    for name, first in (("`paper`: whole pool", 0), ("`omnimem`: chunk", slots)):
        count = pool - first
        cosines = partial(similarity, feature[:, first:], modality[:, first:], Measures())
        yield f"cosines of neighbours, {name}", 4 * count * width, count * width, cosines
    matrix, references = sketch(width, SKETCH), References()

    def made() -> Tensor:
        return encoded(references.beyond(0, feature[:, slots:] @ matrix, modality[:, slots:]), 2, learns=False)

    yield "sketch of the chunk", 2 * chunk * width * SKETCH, chunk * width, made
    for name, held, compared in (
        ("layer inputs, all tokens", feature, pool),
        ("layer inputs, tokens that may stay", feature, slots),
        ("sketches, tokens that may stay", low, slots),
    ):
        codes = None if held is feature else 2
        size, pairs = vectors(held, codes).shape[-1], (0.75 * compared) ** 2 + (0.25 * compared) ** 2

        def some(held: Tensor = held, codes: Codes | None = codes) -> Tensor:
            settings = {"product": torch.float32 if codes is None else torch.bfloat16, "codes": codes}
            return uncovered_contested(held, modality, scores, contest, torch.sqrt, **settings)

        every = partial(uncovered_values, held, modality, scores)
        yield f"coverage, {name}", pairs * size, pool * size, every if compared == pool else some

    def keep() -> None:
        for part, axis in ((keys, 2), (values, 2), (low, 1)):
            torch.cat(part.split([slots, chunk], dim=axis), dim=axis).index_select(axis, index)

    yield "[memory ; chunk] and the copy of what is kept", 0, 2 * (pool + slots) * (2 * kv + low.shape[-1] // 4), keep


def further_tokens(slots: int, width: int, rounds: int) -> Iterator[tuple[int, str, float, float, float]]:
    """Questions, part, operations, bytes and seconds of a further token, after a memory that is full."""
    model = model_of(LAYERS, width, "cpu", "float32")
    matrices = [each for each in model.layers.parameters() if each.ndim == 2]
    weights = sum(each.numel() for each in matrices)
    with attach(model) as attached:
        stream = Stream(attached, built("omnimem", LAYERS, slots))
        for number in range(3):
            stream.feed(chunk_of(slots, number * slots, width, "cpu", torch.float32))
        for asked in (1, 4, 16):
            rows = {each.shape[1]: torch.randn(asked, each.shape[1]) for each in matrices}

            def products(rows: dict[int, Tensor] = rows) -> None:
                for each in matrices:
                    F.linear(rows[each.shape[1]], each)

            question = ([1] * QUESTION, range(QUESTION), [IGNORED] * QUESTION)
            prompt = pack([[question] * asked], fill=0, device=torch.device("cpu"))
            decoding = stream.decoding(stream.ask(prompt), last_of_each(prompt)[1], rounds + 1)
            call = partial(decoding, torch.zeros(1, asked, dtype=torch.long))
            held = sum(keys.numel() + values.numel() for keys, values in decoding.stored)
            seen = 4 * HEADS * (width // HEADS) * asked * sum(keys.shape[2] for keys, _ in decoding.stored)
            yield asked, "products alone", 2 * asked * weights, 4 * weights, seconds(products, rounds)
            yield asked, "a further token", 2 * asked * weights + seen, 4 * (weights + held), seconds(call, rounds)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    """Print one table."""
    parser = Parser(description=__doc__)
    parser.add_argument("--chunk", type=int, action="append", help="tokens per chunk; may be repeated (1024, 256)")
    parser.add_argument("--slots", type=int, default=1024, help="slots of the layer (%(default)s)")
    parser.add_argument("--width", type=int, default=512, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="(%(default)s)")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    per_operation, per_byte = (1 / rate for rate in rates(args.rounds))
    print(f"{1e-9 / per_operation:.0f} GFLOP/s, {1e-9 / per_byte:.1f} GB/s\n")
    rows = []
    for chunk in args.chunk or [1024, 256]:
        for name, operations, moved, run in parts(chunk, args.slots, args.width):
            bound, taken = max(operations * per_operation, 4 * moved * per_byte), seconds(run, args.rounds)
            rows.append(
                [str(chunk), name, f"{operations / 1e6:.0f}", f"{4 * moved / 1e6:.1f}", f"{bound * 1e3:.2f}",
                 f"{taken * 1e3:.2f}", f"{bound / taken:.0%}"]
            )  # fmt: skip
    print(markdown(("chunk", "part", "MFLOP", "MB", "bound, ms", "measured, ms", "bound / measured"), rows))
    rows = []
    for asked, name, operations, moved, taken in further_tokens(args.slots, args.width, args.rounds):
        bound = max(operations * per_operation, moved * per_byte)
        rows.append(
            [str(asked), name, f"{operations / 1e6:.0f}", f"{moved / 1e6:.1f}", f"{bound * 1e3:.2f}",
             f"{taken * 1e3:.2f}", f"{bound / taken:.0%}"]
        )  # fmt: skip
    print(markdown(("questions", "part", "MFLOP", "MB", "bound, ms", "measured, ms", "bound / measured"), rows))


if __name__ == "__main__":
    run_command(main)
