"""What answering costs by method, the paper's figure 4: memory beyond the model, time to the first token, speed.

python benchmarks/cost.py --config tiny.yaml [--policy NAME]... [--minutes 4] [--video FILE --ask QUESTION...]
                          [--rounds 3] [--out DIR] [key=value ...]

Full memory and each policy at the run's slots per layer read one stream, each in a process of its own, in turn within
a round: memory that an allocator keeps of one arm would count for the next. The stream is a recall world made for it
(benchmarks/long_stream.py), or a file of yours with questions at its end. Writes cost.json and report.html, whose
section Cost is the figure, into --out (runs/cost) and prints medians over rounds and questions. Wall time: on a
shared machine compare arms, not runs.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


import torch

from benchmarks.long_stream import SETTINGS, manifest_line, world_of
from omnimem.backbones import load_backbone
from omnimem.cli.build import budget_of, feeder_of, policies_of
from omnimem.cli.parser import Parser, run_command
from omnimem.commands.synthesize import Stream, make
from omnimem.comparison import compare
from omnimem.comparison.formatting import count, seconds, size
from omnimem.config import RunConfig, load
from omnimem.evaluation import Arm, Evaluation
from omnimem.evaluation.cost import PeakMemory
from omnimem.media import MediaError
from omnimem.run import RunFolder, provenance, read_json, sha256, write_json
from omnimem.streaming.attach import attach
from omnimem.tasks import RecallOptions
from omnimem.training.arguments import train_section

FULL = "full_memory"
RIVALS = ("distinct", "infinipot_v", "streammem", "uniform")
SPLIT = "cost"  # name of the manifest
COLUMNS = ("policy", "tokens in", "kept a layer", "media", "text model", "first token", "beyond the model", "memory")


def prepare(out: Path, minutes: int) -> Path:
    """A stream of a recall world and its manifest."""
    world = world_of(minutes, minutes)
    stream = Stream(id=f"world-{world.seed}-{minutes}-minutes", world=world)
    (out / "videos").mkdir(parents=True, exist_ok=True)
    if not (out / stream.video).is_file():
        make(out, stream)
    _write_manifest(out, manifest_line(stream, minutes, 60 * minutes))
    return out / stream.video


def adopt(out: Path, video: Path, questions: Sequence[str]) -> Path:
    """A file of the user's own and its manifest. Raises MediaError when it is not there."""
    if not video.is_file():
        raise MediaError(video, "missing", "is not there; give --video a file")
    (out / "videos").mkdir(parents=True, exist_ok=True)
    link = out / "videos" / video.name
    if link.resolve() != video.resolve():  # a file of an earlier run may be given again
        link.unlink(missing_ok=True)
        link.symlink_to(video.resolve())
    messages = [{"role": "user", "content": question, "at": None} for question in questions]
    _write_manifest(out, {"id": video.stem, "video": f"videos/{video.name}", "messages": messages})
    return video


def _write_manifest(out: Path, line: dict[str, Any]) -> None:
    (out / f"{SPLIT}.jsonl").write_text(json.dumps(line) + "\n")


def measure(run: RunConfig, out: Path, name: str) -> None:
    """Evaluate one arm in this process; its cost goes to out/<name>.json."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    task, folder = RecallOptions(root=str(out), split=SPLIT), out / "eval" / name
    shutil.rmtree(folder, ignore_errors=True)  # nothing may count as answered
    backbone = load_backbone(run.model)
    feeder = feeder_of(run, backbone)
    with attach(backbone.text_model) as attached:
        policies = policies_of(run, budget_of(run, attached, feeder, RunFolder(path=folder)))
        arm = Arm(name=name, policy=policies(None if name == FULL else run.memory.slots_per_layer))
        loaded = PeakMemory().bytes
        entry = Evaluation(attached=attached, feeder=feeder, options=run.evaluate).run(arm, task, folder)
    facts = provenance(command=["benchmarks/cost.py"], seed=0, sha256={})
    write_json(folder / "summary.json", {"arm": name, "provenance": facts, "benchmarks": {task.label: entry}})
    lines = [json.loads(line) for line in (folder / f"{task.label}.jsonl").read_text().splitlines()]
    write_json(out / f"{name}.json", cost_of(lines, loaded))


def cost_of(lines: Sequence[dict[str, Any]], loaded: int | None) -> dict[str, Any]:
    """What the lines of one stream say: of the last question asked, and the first token as a median over them."""
    last = max(lines, key=lambda line: line["stream_seconds"])
    media, reading = (last["seconds"][part] / last["stream_seconds"] for part in ("media", "reading"))
    beyond = None if loaded is None else last["peak_memory"] - loaded
    return {
        "tokens_in": sum(last["tokens_in"].values()),
        "kept": last["entries"],
        "media_seconds": media,
        "text_model_seconds": reading,
        "first_token_seconds": median(line["seconds"]["first_token"] for line in lines),
        "beyond_the_model": beyond,
        "bytes": last["bytes"],
    }


def middle(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of each number."""
    return {key: None if first is None else median(row[key] for row in rounds) for key, first in rounds[0].items()}


def table(costs: dict[str, dict[str, Any]]) -> str:
    """A row an arm; media and text model for each second of video."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for name, cost in costs.items():
        times = [seconds(cost[f"{part}_seconds"]) for part in ("media", "text_model", "first_token")]
        cells = [name, count(cost["tokens_in"]), count(cost["kept"]), *times]
        lines.append(f"| {' | '.join([*cells, size(cost['beyond_the_model']), size(cost['bytes'])])} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Make the stream, measure each arm in a process of its own, compare, write and print."""
    parser = _parser()
    given = parser.parse(arguments)
    if bool(given.video) != bool(given.ask):
        parser.error("--video and --ask go together")
    if min(given.minutes, given.rounds) < 1:
        parser.error("--minutes and --rounds must be at least 1")
    run = load(given.config, [*SETTINGS, *given.overrides], train=train_section())
    if given.measure:
        return measure(run, given.out, given.measure)
    policies = {name: [f"memory.policy={{name: {name}}}"] for name in given.policy or RIVALS}
    for policy in policies.values():  # a name that is not known is told before anything is measured
        load(given.config, [*SETTINGS, *given.overrides, *policy], train=train_section())
    video = adopt(given.out, given.video, given.ask) if given.video else prepare(given.out, given.minutes)
    arms = {FULL: [], **policies}
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for _ in range(given.rounds):
        for name, policy in arms.items():
            again = [sys.executable, str(Path(__file__).resolve()), *arguments, *policy, "--measure", name]
            if (code := subprocess.run(again, check=False).returncode) != 0:
                sys.exit(code)
            rounds[name].append(read_json(given.out / f"{name}.json"))
    costs = {name: middle(found) for name, found in rounds.items()}
    facts = provenance(command=["benchmarks/cost.py", *arguments], seed=0, sha256={"video": sha256(video)})
    write_json(given.out / "cost.json", {"provenance": facts, "median": costs, "rounds": rounds})
    compare([given.out / "eval" / name for name in arms], given.out, allow_different=True)
    print(table(costs))
    print(f"report: {given.out / 'report.html'}")


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_config()
    parser.add_argument("--policy", action="append", metavar="NAME", help=f"may be repeated ({', '.join(RIVALS)})")
    parser.add_argument("--minutes", type=int, default=4, help="of the recall world (%(default)s)")
    parser.add_argument("--video", type=Path, metavar="FILE", help="in place of it")
    parser.add_argument("--ask", action="append", metavar="QUESTION", help="asked at the end of it; may be repeated")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/cost"))
    parser.add_argument("--measure", metavar="NAME", help="this arm alone, of what is prepared, in this process")
    return parser


if __name__ == "__main__":
    run_command(main)
