"""An hour of video through a memory of fixed size: is memory flat, is time flat, is every question answered?

python benchmarks/long_stream.py --config tiny.yaml [--minutes 60] [--every 10] [--out DIR] [key=value ...]

Makes a real mp4 of a recall world of that length, with known answers: words are asked about 10 seconds after a
symbol, a colour at every mark, all else at the end. The file is evaluated as train/evaluate.py does it, decoding in
the same process, once under the run's slots per layer and, up to the first mark, with full memory; each in a process
of its own. Writes long_stream.json into --out (runs/long_stream) and prints a table. Exit code 1 when the peak of
resident memory at the first mark is not within 5 % of that at the end, when the last segment takes a fifth more CPU
time than the first, when entries are above the budget, or when a question has no answer.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from itertools import count, pairwise
from pathlib import Path
from typing import Any, final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.common import (
    ONE_STREAM,
    WrappedTask,
    evaluate_arm,
    load_config,
    measure_arm,
    recall_stream,
    write_manifest,
)
from benchmarks.tables import markdown
from omnimem import data
from omnimem.cli.parser import Parser, leave, run_command
from omnimem.commands.synthesize import Stream, evidence
from omnimem.config import RunConfig
from omnimem.recall.worlds import SLOT, Question, World, WorldOptions, draw_world
from omnimem.run import provenance, sha256, write_json
from omnimem.tasks import RecallOptions
from omnimem.tasks.base import Verdict

ARMS = ("budget", "full_memory")
SPOKEN = WorldOptions(spoken_share=1.0)  # every symbol has a word, so that all sixteen are asked about
DELAY = 10  # seconds from a symbol to the question about its word
MEMORY, TIME = 1.05, 1.2  # largest ratio of the end to the first mark


@final
class TimedTask(WrappedTask):
    """The recall task; notes the CPU time of each answer, which is judged as soon as it is given."""

    def __init__(self, inner: RecallOptions) -> None:
        super().__init__(inner)
        self.cpu_seconds: dict[str, float] = {}  # by question

    def judge(self, question: data.Question, prediction: str) -> Verdict:
        self.cpu_seconds[question.item.id] = time.process_time()
        return super().judge(question, prediction)


def world_of(minutes: int, every: int) -> World:
    """The first world in which a symbol has ended at the first mark."""
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
    """The questions about colours, each with the second at which its symbol has ended."""
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
    """Write the video and a manifest per arm into `out`; an existing video is kept."""
    stream = recall_stream(out, world_of(minutes, every), minutes)
    for arm, end in zip(ARMS, (60 * minutes, 60 * every), strict=True):
        write_manifest(out / f"{arm}.jsonl", manifest_line(stream, every, end))
    return out / stream.video


def measure(run: RunConfig, out: Path, arm: str) -> None:
    """Evaluate the arm's stream in this process and write its cost to out/<arm>.json."""
    torch.set_num_threads(1)
    task = TimedTask(RecallOptions(root=str(out), split=arm))
    found = evaluate_arm(run, task, out / "eval" / arm, run.memory.slots_per_layer if arm == "budget" else None)
    lines = found.lines
    marks = {  # by time: CPU seconds of the process so far, peaks so far, entries per layer, bytes of the memory
        line["stream_seconds"]: {
            "minutes": line["stream_seconds"] / 60,
            "cpu_seconds": task.cpu_seconds[line["id"]] - found.began,
            **{key: line[key] for key in ("peak_memory", "entries", "peak_entries", "bytes")},
        }
        for line in lines
    }
    times = {
        "on the way": [line["correct"] for line in lines if line["at"] is not None],
        "at the end": [line["correct"] for line in lines if line["at"] is None],
    }
    write_json(
        out / f"{arm}.json",
        {
            "questions": len(lines),
            "answered": sum(line["parsed"] for line in lines),
            "right": {when: [sum(correct), len(correct)] for when, correct in times.items()},
            "marks": [mark for _, mark in sorted(marks.items())],
        },
    )


def rows_of(marks: Sequence[dict[str, float]], every: int) -> list[dict[str, float]]:
    """A row per mark: the segment that ends there."""
    at = [mark for mark in marks if mark["minutes"] % every < 1e-6 or mark is marks[-1]]
    starts = [(0.0, 0.0), *((mark["minutes"], mark["cpu_seconds"]) for mark in at)]
    spans = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(starts)]
    return [
        {**mark, "cpu_per_video_second": seconds / (60 * minutes)}
        for mark, (minutes, seconds) in zip(at, spans, strict=True)
    ]


def problems(rows: Sequence[dict[str, float]], found: dict[str, Any], slots: int, chunk: int) -> Iterator[str]:
    """One line per requirement that is not met."""
    first, last = rows[0], rows[-1]
    grown = last["peak_memory"] / first["peak_memory"]
    if grown > MEMORY:
        yield f"resident memory grew by {grown - 1:.1%} from minute {first['minutes']:g} to {last['minutes']:g}"
    slower = last["cpu_per_video_second"] / first["cpu_per_video_second"]
    if slower > TIME:
        yield f"the last segment took {slower - 1:.0%} more CPU time per video second than the first"
    for mark in found["marks"]:
        if mark["entries"] > slots or mark["peak_entries"] > slots + chunk:
            held = f"{mark['entries']:g} entries per layer, at most {mark['peak_entries']:g} with a chunk"
            yield f"minute {mark['minutes']:.1f}: {held}; the budget is {slots} and a chunk has {chunk}"
    if found["answered"] < found["questions"]:
        yield f"{found['questions'] - found['answered']} of {found['questions']} questions have no answer"


def table(rows: Sequence[dict[str, float]], full: dict[str, float]) -> str:
    """The rows, and full memory at the first mark."""
    titles = ["", "minutes", "peak RSS, MB", "CPU-ms per video second", "entries per layer", "memory, kB"]
    lines = [
        [name, f"{row['minutes']:g}", f"{row['peak_memory'] / 1e6:.1f}", f"{1e3 * row['cpu_per_video_second']:.2f}",
         f"{row['entries']:g}", f"{row['bytes'] / 1e3:.1f}"]
        for name, row in [*(("budget", row) for row in rows), ("full memory", full)]
    ]  # fmt: skip
    return markdown(titles, lines)


def main(arguments: Sequence[str]) -> None:
    """Prepare, measure each arm in a process of its own, judge, write and print."""
    given = _parser().parse(arguments)
    if not 0 < given.every <= given.minutes or 60 * given.every < SLOT:
        _parser().error(f"--every {given.every} must be a number of minutes up to --minutes {given.minutes}")
    run = load_config(given.config, [*ONE_STREAM, *given.overrides])
    if given.measure:
        return measure(run, given.out, given.measure)
    video = prepare(given.out, given.minutes, given.every)
    found, whole = (measure_arm(__file__, arguments, given.out, arm) for arm in ARMS)
    rows, (full,) = (rows_of(arm["marks"], given.every) for arm in (found, whole))
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
    parser.add_argument("--measure", choices=ARMS, help="only this arm, in this process, on the prepared stream")
    return parser


if __name__ == "__main__":
    run_command(main)
