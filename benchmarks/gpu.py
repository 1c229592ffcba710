"""Checks and measures the project on an accelerator: correctness, then speed and memory, in one table.

benchmarks/gpu.sh [--layers 7] [--out benchmarks/results] [--device cuda] [--small]

Needs torch, transformers, peft and jaxtyping, no weights and no network. Writes gpu.json and gpu.md into the folder
given by --out, after every result. Sections run in a process of their own, each for a limited time; one that crashes,
hangs or leaves the device unusable costs no other its result. The table begins with the targets of the project, what
was measured of them, and whether they are met. Exit code 1: a check failed, or a section could not run.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch

from benchmarks.accelerator import compiled, correctness, processes, speed
from benchmarks.accelerator.clock import Clock, release
from benchmarks.accelerator.models import Sizes, large, small
from benchmarks.accelerator.record import Record, facts_of
from benchmarks.accelerator.targets import targets

LAST = 75.0  # seconds after the last section may begin at which it is ended: before gpu.sh ends everything


@final
@dataclass(frozen=True, kw_only=True)
class Section:
    """A part that runs for so many seconds at most; on a GPU it takes a fraction of that."""

    name: str
    seconds: float
    work: Callable[[speed.Bench, correctness.Toy], None]


def main(arguments: Sequence[str]) -> int:
    """Run all sections within the time limit."""
    given = _parser().parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("gpu.py: this machine has no CUDA device; use --device cpu --small to try the script", file=sys.stderr)
        return 2
    settings = {name: value for name, value in vars(given).items() if name != "out"}
    own, whole = _sizes(given)
    meant = "--small: the verdicts mean nothing" if given.small else f"those of {own.layers} of {whole.layers} layers"
    facts = {**facts_of(device, settings), "targets of": f"Targets ({meant}; the hour and answers are of all layers)"}
    record = Record(given.out, facts, targets(own.chunks, whole.question))
    deadline = time.monotonic() + given.seconds
    limits = {section.name: section.seconds for section in plan()}
    processes.run(record, partial(_serve, given, deadline), limits, deadline, deadline + LAST)
    print(record.table())
    return 0 if record.ok else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda or cpu (%(default)s)")
    parser.add_argument("--layers", type=int, default=7, help="of the 7B model's 28 (%(default)s: a quarter)")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script itself")
    parser.add_argument("--seconds", type=float, default=390.0, help="no section is begun after (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder (%(default)s)")
    return parser


def _sizes(given: argparse.Namespace) -> tuple[Sizes, Sizes]:
    """Those with so many layers, and those with all."""
    return (small(), small()) if given.small else (large(given.layers), large(28))


def plan() -> list[Section]:
    """Checks first: the speed of wrong results means nothing. Then what the targets name; last what may take long."""
    found = []
    streaming = (correctness.attention, correctness.streaming, correctness.kept_sets, correctness.decoding)
    for check in (*streaming, correctness.waits):
        found += [_checked(check, dtype) for dtype in (torch.float32, torch.bfloat16)]
    found += [
        _timed(speed.ceilings, 30),
        _timed(speed.attention, 60),
        _timed(speed.chunk_steps, 90),
        _timed(speed.asking, 90, whole=True),
        _timed(speed.hour, 240, whole=True),
    ]
    found += [_checked(correctness.gradient, dtype) for dtype in (torch.float32, torch.bfloat16)]
    found += [_timed(compiled.graphed_tokens, 60, whole=True), _timed(speed.training, 90)]
    return [*found, _timed(compiled.compiled_tokens, 200), _timed(compiled.compiled_chunks, 200)]


def _checked(check: Callable[..., None], dtype: torch.dtype) -> Section:
    def work(bench: speed.Bench, toy: correctness.Toy) -> None:
        check(bench.record, toy, dtype, bench.device)

    return Section(name=f"check of {check.__name__.replace('_', ' ')}, {dtype}", seconds=120, work=work)


def _timed(measure: Callable[[speed.Bench], None], seconds: float, *, whole: bool = False) -> Section:
    def work(bench: speed.Bench, toy: correctness.Toy) -> None:
        measure(bench.of_whole() if whole else bench)

    return Section(name=f"speed of {measure.__name__.replace('_', ' ')}", seconds=seconds, work=work)


def _serve(given: argparse.Namespace, deadline: float, events: Connection, names: Sequence[str]) -> None:
    """Run these sections in this process and send their results."""
    device, (own, whole) = torch.device(given.device), _sizes(given)
    clock = Clock(device=device, repeats=2 if given.small else 7, seconds=2.0 if given.small else 20.0)
    shared = {"clock": clock, "sizes": own, "whole": whole, "dtype": torch.bfloat16, "device": device}
    bench = speed.Bench(record=processes.Remote(events), **shared)
    toy = correctness.SMALL if given.small else correctness.LARGE
    works = {section.name: partial(section.work, bench, toy) for section in plan() if section.name in names}
    processes.serve(events, works, deadline, partial(_usable, device))


def _usable(device: torch.device) -> bool:
    """Whether the device still answers: after an illegal access of memory it does not, in this process."""
    try:
        release()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
