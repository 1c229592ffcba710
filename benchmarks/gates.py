"""Memory and time of learned gates and scores, beside a naive implementation; and of a whole training step.

python benchmarks/gates.py [--queries 256 512 1024 2048] [--chunks 16] [--out DIR]

Attention with a learned gate (an additive bias per key): ours, a further dimension of the head; naive, a bias of
queries x keys through torch's own attention; and without a gate. Attention mass: ours, a function whose backward
recomputes each block; naive, a softmax stored by autograd. There are three keys per query, as where a chunk meets its
memory. Every tensor alive is counted at every operation of forward and backward, inputs and gradients included; saved
bytes are storages held by the graph, inputs included. Then one training step of a random text model (that of
activations.py) under each form of selection: peak bytes, bytes of one memory, and CPU seconds.
Writes gates.json into --out (runs/gates) and prints two tables.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import activations
from benchmarks.activations import counting
from benchmarks.tables import markdown
from omnimem.attention.blocked import attend, mass, visible
from omnimem.cli.parser import Parser, run_command
from omnimem.policies import PerturbationOptions
from omnimem.run import write_json
from omnimem.selection import SelectionOptions, TemperatureOptions
from omnimem.tuning import TuningOptions

HEADS, KV_HEADS, DIM, KEYS = 8, 2, 64, 3  # KEYS: per query
SCALE = DIM**-0.5
Operation = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of queries, keys, values and gate


def biased(queries: Tensor, keys: Tensor, values: Tensor, gate: Tensor) -> Tensor:
    """Attention with a bias of queries x keys."""
    bias = gate[:, None, None].masked_fill(~_seen(queries, keys), float("-inf"))
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=SCALE, enable_gqa=True)


def stored(queries: Tensor, keys: Tensor, _: Tensor, gate: Tensor) -> Tensor:
    """Attention mass by one softmax stored by autograd."""
    logits = queries @ keys.repeat_interleave(HEADS // KV_HEADS, dim=1).mT * SCALE + gate[:, None, None]
    return logits.masked_fill(~_seen(queries, keys), float("-inf")).softmax(dim=-1).mean(dim=1).sum(dim=1)


def _seen(queries: Tensor, keys: Tensor) -> Tensor:
    count, total = queries.shape[2], keys.shape[2]
    return visible(0, count, count, total, None, queries.device)[:, None]


WAYS: dict[str, Operation] = {
    "attention, no gate": lambda queries, keys, values, gate: attend(queries, keys, values, scale=SCALE),
    "attention, gate: ours": lambda queries, keys, values, gate: attend(queries, keys, values, scale=SCALE, gate=gate),
    "attention, gate: naive": biased,
    "mass: ours": lambda queries, keys, values, gate: mass(queries, keys, scale=SCALE, gate=gate),
    "mass: naive": stored,
}


@final
@dataclass(frozen=True, kw_only=True)
class Row:
    """One implementation at one size."""

    way: str
    queries: int
    keys: int
    inputs: int  # bytes of queries, keys, values and gate
    saved: int  # bytes held by the graph
    peak: int  # bytes alive at once, forward and backward
    seconds: float


def measure(way: str, inputs: Sequence[Tensor]) -> Row:
    """Forward and backward of one implementation."""
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


def random_inputs(queries: int) -> list[Tensor]:
    """Random queries, keys, values and a gate, float32."""
    generator, keys = torch.Generator().manual_seed(0), KEYS * queries
    shapes = [(1, HEADS, queries, DIM), (1, KV_HEADS, keys, DIM), (1, KV_HEADS, keys, DIM), (1, keys)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


WARM = TemperatureOptions(schedule="constant", start=1.0)
SELECTIONS = {
    "hard": SelectionOptions(softening="hard"),
    "straight_through": SelectionOptions(temperature=WARM),
    "straight_through, both": SelectionOptions(temperature=WARM, gradient="both"),
    "soft": SelectionOptions(softening="soft", temperature=WARM),
    "soft, both": SelectionOptions(softening="soft", temperature=WARM, gradient="both"),
}


def steps(chunks: int) -> Iterator[dict[str, Any]]:
    """One stream forward and backward under every form of selection, in turn within each round; bytes and CPU seconds.

    Chunks are recomputed in backward; `peak` is above the model, `memory` is one memory, `seconds` the least of three.
    """
    model, policy = activations.text_model(), activations.policy_of(PerturbationOptions())
    modes = {name: TuningOptions(selection=selection) for name, selection in SELECTIONS.items()}
    spent: dict[str, list[float]] = {name: [] for name in modes}
    activations.backward(model, policy, modes["hard"], 1)  # allocations of the first pass only are not counted
    for _ in range(3):
        for name, tuning in modes.items():
            started = time.process_time()
            activations.backward(model, policy, tuning, chunks)
            spent[name].append(time.process_time() - started)
    for name, tuning in modes.items():
        row = activations.measure(model, policy, name, tuning, chunks)
        yield {"selection": name, "peak": row.peak, "memory": row.memory, "seconds": round(min(spent[name]), 3)}


def step_table(found: Sequence[dict[str, Any]]) -> str:
    """Each form of selection, seconds also as a ratio to hard selection."""
    rows = []
    for step in found:
        sizes = f"{step['peak'] / 1e6:.2f}", f"{step['memory'] / 1e6:.3f}"
        ratio = step["seconds"] / found[0]["seconds"]
        rows.append([step["selection"], *sizes, f"{step['seconds']:.2f}", f"x {ratio:.2f}"])
    return markdown(["selection", "peak MB", "one memory MB", "CPU s", "to hard"], rows)


def table(rows: Sequence[Row]) -> str:
    """MB saved and, after a slash, the peak; the growth from the second-largest size to the largest."""
    lines = []
    for way in WAYS:
        mine = sorted((row for row in rows if row.way == way), key=lambda row: row.queries)
        cells = [f"{row.saved / 1e6:.2f} / {row.peak / 1e6:.2f}" for row in mine]
        last, before = mine[-1], mine[-2] if len(mine) > 1 else mine[-1]
        lines.append([way, *cells, f"x {last.saved / before.saved:.1f} / x {last.peak / before.peak:.1f}"])
    counts = [f"{count} queries" for count in sorted({row.queries for row in rows})]
    return markdown(["MB saved / peak", *counts, "growth saved / peak"], lines)


def main(arguments: Sequence[str]) -> None:
    """Measure, write JSON, print the tables."""
    parser = Parser(__doc__)
    parser.add_argument("--queries", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--chunks", type=int, default=16, help="of the stream of a whole step (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/gates"))
    given = parser.parse(arguments)
    torch.set_num_threads(1)
    rows = [measure(way, inputs) for inputs in map(random_inputs, given.queries) for way in WAYS]
    found = list(steps(given.chunks))
    settings = {"queries": given.queries, "chunks": given.chunks}
    settings |= {"keys": KEYS, "heads": HEADS, "kv_heads": KV_HEADS, "dim": DIM}
    measured = {"rows": [asdict(row) for row in rows], "steps": found}
    write_json(given.out / "gates.json", {"settings": settings, **measured})
    print(json.dumps(settings))
    sizes = {row.queries: row.inputs / 1e6 for row in rows}
    print("queries, keys, values and gate: " + ", ".join(f"{size:.2f} MB" for size in sizes.values()))
    print(table(rows))
    print(step_table(found))


if __name__ == "__main__":
    run_command(main)
