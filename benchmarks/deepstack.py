"""What the deepstack features of a model carry: recall answered with them, without them, and with their mean.

python benchmarks/deepstack.py --config tiny_salmonn.yaml [--split test] [key=value ...]

Arms, full memory: `whole`; `zero`, nothing is added in the decoder's first layers; `mean`, every visual token of a
segment is given their mean, so that their scale stays and their content goes. Writes runs/deepstack/<arm>/, and prints
accuracy by kind of question with the paired difference to `whole`, clustered by stream.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch import Tensor

from benchmarks.common import load_config
from benchmarks.policy_table import Sheet, shown, table
from omnimem.backbones import Encoded, load_backbone
from omnimem.backbones.base import Backbone
from omnimem.budget import Budget
from omnimem.cli.parser import Parser, run_command
from omnimem.config import ConfigError
from omnimem.evaluation import Arm, Evaluation
from omnimem.media import Segment
from omnimem.policies import PerturbationOptions
from omnimem.run import RunFolder
from omnimem.streaming.attach import attach
from omnimem.streaming.feeder import Feeder
from omnimem.tasks import RecallOptions

OUT = Path("runs/deepstack")
ARMS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda level: level,
    "zero": lambda level: level * 0,
    "mean": lambda level: level.mean(dim=1, keepdim=True).expand_as(level),
}


def changing(backbone: Backbone, change: Callable[[Tensor], Tensor]) -> Callable[..., Iterator[Encoded]]:
    """The encoding of a backbone with another content of the deepstack features."""
    encode = type(backbone).encode

    def changed(segments: Iterable[Segment], *, fps: float, per_pass: int = 32) -> Iterator[Encoded]:
        for segment in encode(backbone, segments, fps=fps, per_pass=per_pass):
            yield replace(segment, deepstack=tuple(change(level) for level in segment.deepstack))

    return changed


def main(arguments: Sequence[str]) -> None:
    """Evaluate the arms, and print the table."""
    parser = Parser(__doc__)
    parser.add_config()
    parser.add_argument("--split", default="test", help="split of the recall task (%(default)s)")
    given = parser.parse(arguments)
    run = load_config(given.config, given.overrides)
    (benchmark,) = run.evaluate.benchmarks
    if not isinstance(benchmark, RecallOptions):
        raise ConfigError([f"evaluate.benchmarks: {benchmark.name} has no known content; this script knows recall"])
    task = replace(benchmark, split=given.split)
    # 1. answer
    backbone, sheets = load_backbone(run.model), []
    with attach(backbone.text_model) as attached:
        policy = PerturbationOptions().build(Budget.full(attached.shape.layers))
        for name, change in ARMS.items():
            backbone.encode = changing(backbone, change)  # pyright: ignore[reportAttributeAccessIssue]
            evaluation = Evaluation(attached=attached, feeder=Feeder(backbone, run.stream), options=run.evaluate)
            target = RunFolder(path=OUT).evaluation(name)
            entry = evaluation.run(Arm(name=name, policy=policy), task, target)
            streams = {sample.id for sample in task.samples()[: run.evaluate.limit]}
            lines, facts = target / f"{task.label}.jsonl", {"model": run.model.path, "root": task.root, "slots": 0}
            sheets.append(Sheet.read(lines, streams, arm=name, fewer=True, **facts))
            print(f"{name}: {entry['strict']:.1%} of {entry['n']}", flush=True)
    # 2. compare
    print("\n".join(shown(table(sheets, "whole"), "whole")))


if __name__ == "__main__":
    run_command(main)
