"""List what can be chosen, with one line each.

omnimem list policies|models|benchmarks|configs
"""

from collections.abc import Iterator, Sequence

from omnimem.backbones.load import FAMILIES
from omnimem.cli.parser import Parser
from omnimem.config import CONFIGS
from omnimem.config.check import alternatives, choices_of
from omnimem.config.reference import about
from omnimem.policies import PolicyOptions
from omnimem.tasks import BenchmarkOptions


def policies() -> Iterator[tuple[str, str]]:
    """Names of `memory.policy`."""
    for kind in alternatives(PolicyOptions):
        yield from ((name, about(kind, name)) for name in choices_of(kind))


def benchmarks() -> Iterator[tuple[str, str]]:
    """Names of `evaluate.benchmarks`."""
    for kind in alternatives(BenchmarkOptions):
        yield from ((name, about(kind, name)) for name in choices_of(kind))


def models() -> Iterator[tuple[str, str]]:
    """Model families, and the checkpoints that the package ships."""
    yield from ((family.name, f"{family.sizes}: model.path is a folder or a hub id") for family in FAMILIES)
    for folder in sorted(path.parent for path in CONFIGS.glob("models/*/*.safetensors")):
        yield f"models/{folder.name}", "shipped with the package: model.path, or --model"


def configs() -> Iterator[tuple[str, str]]:
    """Names for --config."""
    for path in sorted(CONFIGS.glob("*.yaml")):
        yield path.name, path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip(" :")


KINDS = {"policies": policies, "models": models, "benchmarks": benchmarks, "configs": configs}


def main(arguments: Sequence[str]) -> None:
    """Print one line per choice."""
    parser = Parser(__doc__)
    parser.add_argument("what", choices=KINDS)
    rows = list(KINDS[parser.parse(arguments).what]())
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {line}" for name, line in rows))
