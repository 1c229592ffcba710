"""The cost of answering by method, as in the paper's figure 4: memory beyond the model, time to first token, speed.

python benchmarks/cost.py --config tiny.yaml [--policy NAME]... [--minutes 4] [--video FILE --ask QUESTION...]
                          [--rounds 3] [--out DIR] [key=value ...]

Full memory and each policy at the run's slots per layer read one stream, each in a process of its own, in turn within
a round: memory that an allocator keeps of one arm would be counted for the next. The stream is a recall world made for
it (benchmarks/long_stream.py), or a file of yours with questions at its end. Writes cost.json and report.html, whose
section Cost is the figure, into --out (runs/cost) and prints medians over rounds and questions. Wall time: on a
shared machine compare arms, not runs.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.common import ONE_STREAM, evaluate_arm, load_config, measure_arm, recall_stream, write_manifest
from benchmarks.long_stream import manifest_line, world_of
from benchmarks.tables import markdown
from omnimem.cli.parser import Parser, run_command
from omnimem.comparison import compare
from omnimem.comparison.formatting import count, seconds, size
from omnimem.config import RunConfig
from omnimem.media import MediaError
from omnimem.run import provenance, sha256, write_json
from omnimem.tasks import RecallOptions

FULL = "full_memory"
RIVALS = ("distinct", "infinipot_v", "streammem", "uniform")
SPLIT = "cost"  # name of the manifest
COLUMNS = ("policy", "tokens in", "kept per layer", "media", "text model", "first token", "beyond the model", "memory")


def prepare(out: Path, minutes: int) -> Path:
    """Write a stream of a recall world and its manifest; the path of the video."""
    stream = recall_stream(out, world_of(minutes, minutes), minutes)
    write_manifest(out / f"{SPLIT}.jsonl", manifest_line(stream, minutes, 60 * minutes))
    return out / stream.video


def adopt(out: Path, video: Path, questions: Sequence[str]) -> Path:
    """Write a manifest for the user's own file. Raises MediaError if it is missing."""
    if not video.is_file():
        raise MediaError(video, "missing", "is not there; give --video a file")
    link = out / "videos" / video.name
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.resolve() != video.resolve():  # the file may be one of an earlier run
        link.unlink(missing_ok=True)
        link.symlink_to(video.resolve())
    messages = [{"role": "user", "content": question, "at": None} for question in questions]
    line = {"id": video.stem, "video": f"videos/{video.name}", "messages": messages}
    write_manifest(out / f"{SPLIT}.jsonl", line)
    return video


def measure(run: RunConfig, out: Path, name: str) -> None:
    """Evaluate one arm in this process and write its cost to out/<name>.json."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    task, folder = RecallOptions(root=str(out), split=SPLIT), out / "eval" / name
    found = evaluate_arm(run, task, folder, None if name == FULL else run.memory.slots_per_layer)
    facts = provenance(command=["benchmarks/cost.py"], seed=0, sha256={})
    write_json(folder / "summary.json", {"arm": name, "provenance": facts, "benchmarks": {task.label: found.entry}})
    last = max(found.lines, key=lambda line: line["stream_seconds"])
    write_json(
        out / f"{name}.json",
        {
            "tokens_in": sum(last["tokens_in"].values()),
            "kept": last["entries"],
            "media_seconds": last["seconds"]["media"] / last["stream_seconds"],
            "text_model_seconds": last["seconds"]["reading"] / last["stream_seconds"],
            "first_token_seconds": median(line["seconds"]["first_token"] for line in found.lines),
            "beyond_the_model": None if found.loaded is None else last["peak_memory"] - found.loaded,
            "bytes": last["bytes"],
        },
    )


def middle(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds."""
    return {key: None if first is None else median(row[key] for row in rounds) for key, first in rounds[0].items()}


def table(costs: dict[str, dict[str, Any]]) -> str:
    """A row per arm; media and text model per second of video."""
    rows = []
    for name, cost in costs.items():
        times = [seconds(cost[f"{part}_seconds"]) for part in ("media", "text_model", "first_token")]
        sizes = size(cost["beyond_the_model"]), size(cost["bytes"])
        rows.append([name, count(cost["tokens_in"]), count(cost["kept"]), *times, *sizes])
    return markdown(COLUMNS, rows)


def main(arguments: Sequence[str]) -> None:
    """Make the stream, measure each arm in a process of its own, compare, write and print."""
    parser = _parser()
    given = parser.parse(arguments)
    if bool(given.video) != bool(given.ask):
        parser.error("--video and --ask go together")
    if min(given.minutes, given.rounds) < 1:
        parser.error("--minutes and --rounds must be at least 1")
    run = load_config(given.config, [*ONE_STREAM, *given.overrides])
    if given.measure:
        return measure(run, given.out, given.measure)
    policies = {name: [f"memory.policy={{name: {name}}}"] for name in given.policy or RIVALS}
    for policy in policies.values():  # unknown names are refused before anything is measured
        load_config(given.config, [*ONE_STREAM, *given.overrides, *policy])
    video = adopt(given.out, given.video, given.ask) if given.video else prepare(given.out, given.minutes)
    arms = {FULL: [], **policies}
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for _ in range(given.rounds):
        for name, policy in arms.items():
            rounds[name].append(measure_arm(__file__, [*arguments, *policy], given.out, name))
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
    parser.add_argument("--video", type=Path, metavar="FILE", help="a file instead")
    parser.add_argument("--ask", action="append", metavar="QUESTION", help="asked at its end; may be repeated")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/cost"))
    parser.add_argument("--measure", metavar="NAME", help="only this arm, in this process, on the prepared stream")
    return parser


if __name__ == "__main__":
    run_command(main)
