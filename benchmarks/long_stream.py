"""An hour of video through a memory of fixed size: is memory flat, is time flat, is every question answered?

python benchmarks/long_stream.py --config tiny.yaml [--minutes 60] [--every 10] [--out DIR] [key=value ...]

Makes a real mp4 of a recall world as long as asked, with known answers: words are asked about 10 seconds after a
symbol, a colour at every mark, all else at the end. The file is evaluated as train/evaluate.py does it, decoding in
the same process, once under the run's slots per layer and, up to the first mark, with full memory; each in a process
of its own. Writes long_stream.json into --out (runs/long_stream) and prints a table. Exit code 1 when the peak of
resident memory at the first mark is not within 5 % of that at the end, when the last stretch takes a fifth more CPU
time than the first, when entries are above the budget, or when a question has no answer.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Any, final

import torch

from omnimem import data
from omnimem.backbones import load_backbone
from omnimem.cli.build import budget_of, feeder_of, policies_of
from omnimem.cli.parser import Parser, leave, run_command
from omnimem.commands.synthesize import Stream, evidence, make
from omnimem.config import RunConfig, load
from omnimem.data import Sample
from omnimem.evaluation import Arm, Evaluation
from omnimem.recall.worlds import SLOT, Question, World, WorldOptions, draw_world
from omnimem.run import RunFolder, provenance, read_json, sha256, write_json
from omnimem.streaming.attach import attach
from omnimem.tasks import RecallOptions
from omnimem.tasks.base import Defect, Gap, Verdict
from omnimem.training.arguments import train_section

ARMS = ("budget", "full_memory")
SPOKEN = WorldOptions(spoken_share=1.0)  # every symbol has a word, so that all sixteen are asked about
DELAY = 10  # seconds from a symbol to the question about its word
MEMORY, TIME = 1.05, 1.2  # by how much the end may be above the first mark
SETTINGS = (  # one stream, nothing kept beside it, and a budget that needs no calibration
    "train={}",
    "data.cache=false",
    "memory.budget={name: split, visual_audio_ratio: 2}",
    "evaluate.batch_size=1",
    "evaluate.decoders=0",
)


@final
@dataclass(frozen=True, kw_only=True)
class Mark:
    """What the stream had cost when a question was answered."""

    minutes: float  # of the stream that had been read
    peak_memory: int  # bytes resident in the process, the most so far
    cpu_seconds: float  # of the process so far, decoding and answering included
    entries: float  # audio and visual, a layer
    peak_entries: float  # the most so far: memory and the chunk that is read
    bytes: int  # of the memory


@final
class Noting:
    """The recall task; notes the CPU time when an answer is there, which is when it is judged."""

    def __init__(self, task: RecallOptions) -> None:
        self._task = task
        self.label, self.rules, self.annotations = task.label, task.rules, task.annotations
        self.cpu_seconds: dict[str, float] = {}  # by question

    def gaps(self) -> list[Gap]:
        return self._task.gaps()

    def samples(self) -> list[Sample]:
        return self._task.samples()

    def defects(self) -> list[Defect]:
        return self._task.defects()

    def judge(self, question: data.Question, prediction: str) -> Verdict:
        self.cpu_seconds[question.item.id] = time.process_time()
        return self._task.judge(question, prediction)


# ----------------------------------------------------------------------------------------------------------- the stream


def world_of(minutes: int, every: int) -> World:
    """The first world in which a symbol is over at the first mark."""
    worlds = (draw_world(seed, 60 * minutes, SPOKEN) for seed in count())
    return next(world for world in worlds if any(end <= 60 * every for end, _ in _symbols(world)))


def asked(world: World, every: int, end: int) -> Iterator[tuple[Question, int | None]]:
    """The questions about the first `end` seconds with the second at which each is asked; None: at the end."""
    for question in world.questions:
        over = evidence(world, question)[1]
        if over <= end:
            soon = over + DELAY if question.kind == "cross_modal" else end
            yield question, soon if soon < end else None
    for mark in range(60 * every, end, 60 * every):
        yield max((over, question.key, question) for over, question in _symbols(world) if over <= mark)[2], mark


def _symbols(world: World) -> list[tuple[int, Question]]:
    """The questions about colours, each with the second at which its symbol is gone."""
    return [(evidence(world, asking)[1], asking) for asking in world.questions if asking.kind == "visual"]


def manifest_line(stream: Stream, every: int, end: int) -> dict[str, Any]:
    """The stream up to `end` seconds, with its questions."""
    messages: list[dict[str, Any]] = []
    kinds = []
    for question, at in asked(stream.world, every, end):
        messages.append({"role": "user", "content": question.text, "at": at})
        messages.append({"role": "assistant", "content": question.answer})
        kinds.append(question.kind)
    return {"id": stream.id, "video": stream.video, "end": end, "messages": messages, "meta": {"kinds": kinds}}


def prepare(out: Path, minutes: int, every: int) -> Path:
    """The file and a manifest an arm, in `out`; the file is kept for the next time."""
    world = world_of(minutes, every)
    stream = Stream(id=f"world-{world.seed}-{minutes}-minutes", world=world)
    video = out / stream.video
    video.parent.mkdir(parents=True, exist_ok=True)
    if not video.is_file():
        make(out, stream)
    for arm, end in zip(ARMS, (60 * minutes, 60 * every), strict=True):
        (out / f"{arm}.jsonl").write_text(json.dumps(manifest_line(stream, every, end)) + "\n")
    return video


# ------------------------------------------------------------------------------------------------------------ measuring


def measure(run: RunConfig, out: Path, arm: str) -> None:
    """Evaluate the arm's stream in this process; what it cost goes to out/<arm>.json."""
    torch.set_num_threads(1)
    task, folder = Noting(RecallOptions(root=str(out), split=arm)), out / "eval" / arm
    shutil.rmtree(folder, ignore_errors=True)  # nothing may count as answered
    backbone = load_backbone(run.model)
    feeder = feeder_of(run, backbone)
    with attach(backbone.text_model) as attached:
        policies = policies_of(run, budget_of(run, attached, feeder, RunFolder(path=folder)))
        policy = policies(run.memory.slots_per_layer if arm == "budget" else None)
        began = time.process_time()
        Evaluation(attached=attached, feeder=feeder, options=run.evaluate).run(
            Arm(name=arm, policy=policy), task, folder
        )
    lines = [json.loads(line) for line in (folder / f"{task.label}.jsonl").read_text().splitlines()]
    marks = {line["stream_seconds"]: mark_of(line, task.cpu_seconds[line["id"]] - began) for line in lines}
    write_json(
        out / f"{arm}.json",
        {
            "questions": len(lines),
            "answered": sum(line["parsed"] for line in lines),
            "right": {
                when: [sum(line["correct"] for line in some), len(some)]
                for when, some in (
                    ("on the way", [line for line in lines if line["at"] is not None]),
                    ("at the end", [line for line in lines if line["at"] is None]),
                )
            },
            "marks": [asdict(mark) for _, mark in sorted(marks.items())],
        },
    )


def mark_of(line: dict[str, Any], cpu_seconds: float) -> Mark:
    """A line of the results, with the CPU time at which it was there."""
    same = {key: line[key] for key in ("peak_memory", "entries", "peak_entries", "bytes")}
    return Mark(minutes=line["stream_seconds"] / 60, cpu_seconds=cpu_seconds, **same)


# ------------------------------------------------------------------------------------------------------------ judgement


def rows_of(marks: Sequence[Mark], every: int) -> list[dict[str, float]]:
    """A row a mark: the stretch that ended there."""
    at = [mark for mark in marks if mark.minutes % every < 1e-6 or mark is marks[-1]]
    starts = [(0.0, 0.0), *((mark.minutes, mark.cpu_seconds) for mark in at)]
    spans = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(starts)]
    return [
        {**asdict(mark), "cpu_per_video_second": seconds / (60 * minutes)}
        for mark, (minutes, seconds) in zip(at, spans, strict=True)
    ]


def problems(rows: Sequence[dict[str, float]], found: dict[str, Any], slots: int, chunk: int) -> Iterator[str]:
    """What is not as it must be."""
    first, last = rows[0], rows[-1]
    grown = last["peak_memory"] / first["peak_memory"]
    if grown > MEMORY:
        yield f"resident memory grew by {grown - 1:.1%} from minute {first['minutes']:g} to {last['minutes']:g}"
    slower = last["cpu_per_video_second"] / first["cpu_per_video_second"]
    if slower > TIME:
        yield f"the last stretch took {slower - 1:.0%} more CPU time a video second than the first"
    for mark in found["marks"]:
        if mark["entries"] > slots or mark["peak_entries"] > slots + chunk:
            held = f"{mark['entries']:g} entries a layer, at most {mark['peak_entries']:g} with a chunk"
            yield f"minute {mark['minutes']:.1f}: {held}; the budget is {slots} and a chunk has {chunk}"
    if found["answered"] < found["questions"]:
        yield f"{found['questions'] - found['answered']} of {found['questions']} questions have no answer"


def table(rows: Sequence[dict[str, float]], full: dict[str, float]) -> str:
    """The rows, and full memory at the first mark."""
    lines = ["| | minutes | peak RSS, MB | CPU-ms a video second | entries a layer | memory, kB |", "|---" * 6 + "|"]
    for name, row in [*(("budget", row) for row in rows), ("full memory", full)]:
        cells = [f"{row['minutes']:g}", f"{row['peak_memory'] / 1e6:.1f}", f"{1e3 * row['cpu_per_video_second']:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['entries']:g} | {row['bytes'] / 1e3:.1f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Prepare, measure each arm in a process of its own, judge, write and print."""
    given = _parser().parse(arguments)
    if not 0 < given.every <= given.minutes or 60 * given.every < SLOT:
        _parser().error(f"--every {given.every} must be a number of minutes up to --minutes {given.minutes}")
    run = load(given.config, [*SETTINGS, *given.overrides], train=train_section())
    if given.measure:
        return measure(run, given.out, given.measure)
    video = prepare(given.out, given.minutes, given.every)
    for arm in ARMS:
        again = [sys.executable, str(Path(__file__).resolve()), *arguments, "--measure", arm]
        if (code := subprocess.run(again, check=False).returncode) != 0:
            sys.exit(code)
    found, whole = (read_json(given.out / f"{arm}.json") for arm in ARMS)
    rows, (full,) = (rows_of([Mark(**mark) for mark in arm["marks"]], given.every) for arm in (found, whole))
    wrong = list(problems(rows, found, run.memory.slots_per_layer, run.stream.chunk_tokens))
    facts = provenance(command=["benchmarks/long_stream.py", *arguments], seed=0, sha256={"video": sha256(video)})
    arms = {"budget": {**found, "rows": rows}, "full_memory": {**whole, "rows": [full]}}
    write_json(given.out / "long_stream.json", {"provenance": facts, "minutes": given.minutes, **arms, "wrong": wrong})
    print(table(rows, full))
    for name, arm in zip(("budget", "full memory"), (found, whole), strict=True):
        right = ", ".join(f"{some} of {all} right {when}" for when, (some, all) in arm["right"].items())
        print(f"{name}: {arm['answered']} of {arm['questions']} questions answered; {right}")
    if wrong:
        leave(wrong, 1)


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_config()
    parser.add_argument("--minutes", type=int, default=60, help="length of the video (%(default)s)")
    parser.add_argument("--every", type=int, default=10, help="minutes between marks (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/long_stream"))
    parser.add_argument("--measure", choices=ARMS, help="this arm alone, of what is prepared: in a process of its own")
    return parser


if __name__ == "__main__":
    run_command(main)
