"""What gates and scores that learn cost: bytes saved for backward and alive, beside the naive way; and a whole step.

python benchmarks/gates.py [--queries 256 512 1024 2048] [--keys 3] [--heads 8] [--kv-heads 2] [--dim 64] [--chunks 16]

Attention whose gate (an additive bias by key) learns: ours, a further dimension of the head; naive, a bias of
queries x keys through torch's own attention; and without a gate. Attention mass: ours, a function whose backward
computes each block again; naive, a softmax that autograd stores. Keys are `--keys` times the queries, as where a chunk
meets its memory. Every tensor alive is counted at every operation of forward and backward, inputs and gradients
included; bytes saved are storages that the graph holds, inputs included. Then one training step of a random text
model (that of activations.py) under each form of selection: bytes alive at the peak, of one memory, and CPU seconds.
Writes gates.json into --out (runs/gates), prints two tables.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import activations
from benchmarks.activations import counting
from omnimem.attention.blocked import attend, mass, visible
from omnimem.budget import SplitBudget
from omnimem.policies import PerturbationOptions
from omnimem.run import write_json
from omnimem.selection import SelectionOptions, TemperatureOptions
from omnimem.tuning import TuningOptions

Operation = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


# -------------------------------------------------------------------------------------------------------------- ways


def plain(queries: Tensor, keys: Tensor, values: Tensor, gate: Tensor) -> Tensor:
    """Attention without a gate."""
    return attend(queries, keys, values, scale=queries.shape[-1] ** -0.5)


def gated(queries: Tensor, keys: Tensor, values: Tensor, gate: Tensor) -> Tensor:
    """Attention through a gate, our way."""
    return attend(queries, keys, values, scale=queries.shape[-1] ** -0.5, gate=gate)


def biased(queries: Tensor, keys: Tensor, values: Tensor, gate: Tensor) -> Tensor:
    """The same by a bias of queries x keys."""
    bias = gate[:, None, None].masked_fill(~_seen(queries, keys), float("-inf"))
    scale = queries.shape[-1] ** -0.5
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=scale, enable_gqa=True)


def received(queries: Tensor, keys: Tensor, values: Tensor, gate: Tensor) -> Tensor:
    """Attention mass, our way."""
    return mass(queries, keys, scale=queries.shape[-1] ** -0.5, gate=gate)


def stored(queries: Tensor, keys: Tensor, values: Tensor, gate: Tensor) -> Tensor:
    """The same by one softmax that autograd stores."""
    wide = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    logits = queries @ wide.mT * queries.shape[-1] ** -0.5 + gate[:, None, None]
    return logits.masked_fill(~_seen(queries, keys), float("-inf")).softmax(dim=-1).mean(dim=1).sum(dim=1)


def _seen(queries: Tensor, keys: Tensor) -> Tensor:
    count, total = queries.shape[2], keys.shape[2]
    return visible(0, count, count, total, None, queries.device)[:, None]


WAYS: dict[str, Operation] = {
    "attention, no gate": plain,
    "attention, gate: ours": gated,
    "attention, gate: naive": biased,
    "mass: ours": received,
    "mass: naive": stored,
}


# ---------------------------------------------------------------------------------------------------------- measuring


@final
@dataclass(frozen=True, kw_only=True)
class Row:
    """One way at one size."""

    way: str
    queries: int
    keys: int
    inputs: int  # bytes of queries, keys, values and gate
    saved: int  # bytes that the graph holds
    peak: int  # bytes alive at once, forward and backward
    seconds: float


def measure(way: str, inputs: Sequence[Tensor]) -> Row:
    """Forward and backward of one way."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    started = time.perf_counter()
    with counting() as alive, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output = WAYS[way](*leaves)
        torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)
    return Row(
        way=way,
        queries=inputs[0].shape[2],
        keys=inputs[1].shape[2],
        inputs=sum(tensor.numel() * tensor.element_size() for tensor in inputs),
        saved=sum(storages.values()),
        peak=alive.peak,
        seconds=round(time.perf_counter() - started, 3),
    )


def drawn(queries: int, keys: int, heads: int, kv_heads: int, dim: int) -> list[Tensor]:
    """Random queries, keys, values and a gate, float32."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, queries, dim), (1, kv_heads, keys, dim), (1, kv_heads, keys, dim), (1, keys)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


# ------------------------------------------------------------------------------------------------------- a whole step

SLOTS, CHUNK_TOKENS, WIDTH, LAYERS = 32, 64, 128, 4
WARM = TemperatureOptions(schedule="constant", start=1.0)
SELECTIONS = {
    "hard": SelectionOptions(softening="hard"),
    "straight_through": SelectionOptions(temperature=WARM),
    "straight_through, both": SelectionOptions(temperature=WARM, gradient="both"),
    "soft": SelectionOptions(softening="soft", temperature=WARM),
    "soft, both": SelectionOptions(softening="soft", temperature=WARM, gradient="both"),
}


@final
@dataclass(frozen=True, kw_only=True)
class Step:
    """One stream forward and backward under a form of selection."""

    selection: str
    peak: int  # bytes alive at once above the model
    memory: int  # bytes of one memory
    seconds: float  # of the CPU, the least of three


def steps(chunks: int) -> Iterator[Step]:
    """Every form of selection, side by side; chunks recomputed in backward."""
    model = activations.text_model(WIDTH, LAYERS)
    policy = PerturbationOptions().build(SplitBudget(visual_audio_ratio=5.0).build(LAYERS, SLOTS))
    ways = [activations.Way(name=name, tuning=TuningOptions(selection=s)) for name, s in SELECTIONS.items()]
    activations.measure(model, policy, ways[0], 1, CHUNK_TOKENS)  # what the first pass alone makes is left out
    spent: dict[str, list[float]] = {way.name: [] for way in ways}
    for _ in range(3):
        for way in ways:
            torch.manual_seed(1)
            started = time.process_time()
            activations.backward(model, policy, way, activations.chunks_of(chunks, CHUNK_TOKENS, WIDTH))
            spent[way.name].append(time.process_time() - started)
    for way in ways:
        row = activations.measure(model, policy, way, chunks, CHUNK_TOKENS)
        seconds = round(min(spent[way.name]), 3)
        yield Step(selection=way.name, peak=row.peak, memory=row.memory, seconds=seconds)


def step_table(found: Sequence[Step]) -> str:
    """Each form of selection, seconds also as a ratio to hard selection."""
    lines = ["| selection | peak MB | one memory MB | CPU s | to hard |", "|---|---|---|---|---|"]
    for step in found:
        sizes = f"{step.peak / 1e6:.2f} | {step.memory / 1e6:.3f}"
        lines.append(f"| {step.selection} | {sizes} | {step.seconds:.2f} | x {step.seconds / found[0].seconds:.2f} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- report


def table(rows: Sequence[Row]) -> str:
    """MB saved and, after a slash, alive at the peak; the growth from the second-largest size to the largest."""
    counts = sorted({row.queries for row in rows})
    lines = ["| MB saved / peak | " + " | ".join(f"{count} queries" for count in counts) + " | growth saved / peak |"]
    lines.append("|---" * (len(counts) + 2) + "|")
    for way in dict.fromkeys(row.way for row in rows):
        mine = sorted((row for row in rows if row.way == way), key=lambda row: row.queries)
        cells = [f"{row.saved / 1e6:.2f} / {row.peak / 1e6:.2f}" for row in mine]
        last, before = mine[-1], mine[-2] if len(mine) > 1 else mine[-1]
        growth = f"x {last.saved / before.saved:.1f} / x {last.peak / before.peak:.1f}"
        lines.append(f"| {way} | " + " | ".join(cells) + f" | {growth} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every way at every size, write JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--keys", type=int, default=3, help="times the queries (%(default)s)")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=64, help="of a head (%(default)s)")
    parser.add_argument("--chunks", type=int, default=16, help="of the stream of a whole step (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/gates"))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for queries in given.queries:
        inputs = drawn(queries, given.keys * queries, given.heads, given.kv_heads, given.dim)
        rows += [measure(way, inputs) for way in WAYS]
    found = list(steps(given.chunks))
    settings = {name: value for name, value in vars(given).items() if name != "out"}
    measured = {"rows": [asdict(row) for row in rows], "steps": [asdict(step) for step in found]}
    write_json(given.out / "gates.json", {"settings": settings, **measured})
    print(json.dumps(settings))
    inputs = {row.queries: row.inputs / 1e6 for row in rows}
    print("queries, keys, values and gate: " + ", ".join(f"{size:.2f} MB" for size in inputs.values()))
    print(table(rows))
    print(step_table(found))


if __name__ == "__main__":
    main()
