"""Checks and measures the project on an accelerator: correctness, then speed and memory, in one table.

benchmarks/gpu.sh [--layers 7] [--out benchmarks/results] [--device cuda] [--small]

Needs torch, transformers, peft and jaxtyping, no weights and no network. Writes gpu.json and gpu.md into the folder
given by --out, after every section. Exit code 1: a check failed, or a section could not run.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch

from benchmarks.accelerator import compiled, correctness, speed
from benchmarks.accelerator.clock import Clock
from benchmarks.accelerator.models import large, small
from benchmarks.accelerator.record import Record, facts_of


def main(arguments: Sequence[str]) -> int:
    """Run all sections within the time limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda or cpu (%(default)s)")
    parser.add_argument("--layers", type=int, default=7, help="of the 7B model's 28 (%(default)s: a quarter)")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script itself")
    parser.add_argument("--seconds", type=float, default=390.0, help="no section is begun after (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder (%(default)s)")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("gpu.py: this machine has no CUDA device; use --device cpu --small to try the script", file=sys.stderr)
        return 2
    sizes = small() if given.small else large(given.layers)
    clock = Clock(device=device, repeats=2 if given.small else 7, seconds=2.0 if given.small else 20.0)
    deadline = time.monotonic() + given.seconds
    settings = {name: value for name, value in vars(given).items() if name != "out"}
    record = Record(given.out, facts_of(device, settings), deadline)
    bench = speed.Bench(record=record, clock=clock, sizes=sizes, dtype=torch.bfloat16, device=device)
    for name, work in _sections(bench, correctness.SMALL if given.small else correctness.LARGE).items():
        record.section(name, work)
    print(record.table())
    return 0 if record.ok else 1


def _sections(bench: speed.Bench, toy: correctness.Toy) -> dict[str, Callable[[], None]]:
    """Checks first: the speed of wrong results means nothing."""
    found: dict[str, Callable[[], None]] = {}
    for check in (correctness.attention, correctness.streaming, correctness.kept_sets, correctness.gradient):
        for dtype in (torch.float32, torch.bfloat16):
            name = f"check of {check.__name__.replace('_', ' ')}, {dtype}"
            found[name] = partial(check, bench.record, toy, dtype, bench.device)
    for measure in (speed.ceilings, speed.chunk_steps, speed.asking, speed.training, speed.attention):
        found[f"speed of {measure.__name__.replace('_', ' ')}"] = partial(measure, bench)
    for measure in (compiled.compiled_tokens, compiled.compiled_chunks):  # last: compiling takes minutes
        found[f"speed of {measure.__name__.replace('_', ' ')}"] = partial(measure, bench)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
