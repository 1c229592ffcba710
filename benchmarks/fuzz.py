"""Hostile variants of every file that a command reads.

python benchmarks/fuzz.py [--cases 3000] [--seed 1] [--surface NAME]... [--out runs/fuzz]

Counts tracebacks, hangs, memory above twice the clean run, and media that are read at another length than they have;
exit code 1 if there are any, and fuzz.json in --out lists them. tests/support/fuzzing.py has the surfaces.
"""

import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from support.fuzzing import HANG, SURFACES, Material, Surface, Verdicts, clean, strategies

from omnimem.cli.parser import Parser, run_command
from omnimem.errors import Stopped
from omnimem.run import provenance, write_json


def main(arguments: Sequence[str]) -> None:
    """Run the cases of all surfaces and print the counts."""
    # 1. valid input
    given_options = _parser().parse(arguments)
    warnings.simplefilter("ignore")
    chosen = [surface for surface in SURFACES if not given_options.surface or surface.name in given_options.surface]
    shares = sum(surface.share for surface in chosen)
    verdicts, began = Verdicts(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        made = Material(Path(folder) / "material")
        # 2. hostile variants
        for surface in chosen:
            verdicts.run(surface.name, clean(surface, Path(folder), made), "clean")
            cases = max(1, given_options.cases * surface.share // shares)
            run_cases(surface, cases, given_options.seed, Path(folder), made, verdicts)
            found = f"{verdicts.cases[surface.name]}, refused {verdicts.refused[surface.name]}"
            print(f"{surface.name}: {found}; failures so far {len(verdicts.failures)}", flush=True)
    # 3. counts
    counts = {
        "cases": sum(verdicts.cases.values()),
        "tracebacks": len(verdicts.tracebacks),
        f"hangs over {HANG:g} s": len(verdicts.hangs),
        "memory above twice the clean run": len(verdicts.memory),
        "wrong durations": len(verdicts.durations),
    }
    print(", ".join(f"{name} {number}" for name, number in counts.items()), f"in {time.monotonic() - began:.0f} s")
    record = {**provenance(command=sys.argv, seed=given_options.seed, sha256={}), **counts, "found": verdicts.failures}
    write_json(given_options.out / "fuzz.json", record)
    if verdicts.failures:
        raise Stopped("\n".join(line[:600] for line in verdicts.failures), code=1)


def run_cases(surface: Surface, cases: int, number: int, folder: Path, made: Material, verdicts: Verdicts) -> None:
    """Run the variants of one surface that a seed gives."""

    @seed(number)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data: Any) -> None:
        case, what = data.draw(strategies(surface, folder, made))
        verdicts.run(surface.name, case, what)

    run()


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--cases", type=int, default=3000, help="of all surfaces together (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the variants (%(default)s)")
    parser.add_argument("--surface", action="append", choices=[each.name for each in SURFACES], help="only this one")
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"), metavar="DIR", help="%(default)s")
    return parser


if __name__ == "__main__":
    run_command(main)
