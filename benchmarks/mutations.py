"""Breaks one line at a time and checks that a test fails: python benchmarks/mutations.py [NAME ...] (about 15 minutes).

A copy of the tree is mutated, never the tree itself. A mutation whose line is gone is an error, so the list stays true.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import final

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", ".cache", "data", "runs", "__pycache__")
SAMPLER, TRAINER = "omnimem/training/sampler.py", "omnimem/training/trainer.py"
FEEDER, STREAM = "omnimem/streaming/feeder.py", "omnimem/streaming/stream.py"
CACHE = "omnimem/streaming/encoder_cache.py"
ANSWERING, RESULTS = "omnimem/evaluation/answering.py", "omnimem/evaluation/results.py"
DIFFERENCES, STATISTICS = "omnimem/comparison/differences.py", "omnimem/comparison/statistics.py"
FINETUNE = "tests/e2e/test_finetune.py"
EVALUATION = ("tests/integration/test_evaluation.py", "tests/unit/tasks")
ERRORS = "omnimem/errors.py"
COMPARISON = ("tests/unit/comparison",)
STREAMING = ("tests/integration/test_stream.py", "tests/unit/streaming")
CYCLE = ("tests/integration/test_policy_cycle.py", "tests/integration/test_text_streams.py")
SAMPLING = ("tests/unit/training",)
LEFT_OUT_OF, LEFT = "omnimem/evaluation/left_out.py", ("tests/integration/test_left_out.py",)
PROJECTORS, PROJECTED = "omnimem/backbones/projectors.py", ("tests/integration/test_projectors.py",)
SKETCHES, SKETCHED = "omnimem/sketches.py", ("tests/unit/test_sketches.py", "tests/unit/scoring")
MIDWAY, ROWS = ("tests/integration/test_asked_midway.py",), ("tests/unit/test_rows.py",)


@final
@dataclass(frozen=True)
class Mutation:
    """`old` in `file` becomes `new`; one of `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = (
    # trainer
    Mutation("weight of uneven steps", SAMPLER, "self.taken(step) / self.size", "1.0", SAMPLING),
    Mutation("drop_last ignored", SAMPLER, "if self.drop_last else", "if False else", SAMPLING),
    Mutation("same order in every epoch", SAMPLER, "seed_of(self.seed, epoch, ", "seed_of(self.seed, ", SAMPLING),
    Mutation("sum of micro-steps", TRAINER, "loss / self.current_gradient_accumulation_steps", "loss / 1", (FINETUNE,)),
    Mutation("loss not weighted by batch", TRAINER, "outcome.loss * len(batch)", "outcome.loss", (FINETUNE,)),
    Mutation(
        "draws without the step", TRAINER, "self.args.seed, self.state.global_step, *(", "self.args.seed, *(", SAMPLING
    ),
    Mutation("budget of the step ignored", TRAINER, "self.policies(step.slots)", "self.policies(None)", SAMPLING),
    Mutation("failed samples not counted", TRAINER, "self.failed.record(failure_of(", "str(failure_of(", (FINETUNE,)),
    # feeder and stream
    Mutation(
        "later audio in earlier tokens",
        FEEDER,
        "asks=[time for time in sample.times if time is not None]",
        "asks=()",
        STREAMING,
    ),
    Mutation(
        "no cut at a question",
        FEEDER,
        "if moment is not None],\n            system",
        "if False],\n            system",
        STREAMING,
    ),
    Mutation(
        "question sees its next chunk",
        FEEDER,
        "chunk.seconds > moment]",
        "chunk.seconds - 2 > moment]",
        (*STREAMING, *EVALUATION),
    ),
    Mutation("chunk length of the step ignored", FEEDER, "chunk_tokens or self.options", "self.options", STREAMING[1:]),
    Mutation("start of the sample ignored", FEEDER, "start=sample.start,", "start=0.0,", STREAMING),
    Mutation(
        "fork shares no past",
        STREAM,
        "twin = copy(self)",
        "twin = Stream(self.attached, self.policy, batch=self.memory.batch)",
        STREAMING,
    ),
    Mutation(
        "text always after the audio",
        "omnimem/backbones/qwen2_5_omni.py",
        "self.visual_last if video_is_last else self.audio_tokens - 1",
        "self.audio_tokens - 1",
        ("tests/unit/backbones/test_processor.py",),
    ),
    Mutation(
        "question not moved with its chunk",
        STREAM,
        "tuple(after - moved for moved in self._moved)",
        "tuple(after for moved in self._moved)",
        ("tests/unit/test_positions.py",),
    ),
    Mutation(
        "empty packets decoded",
        "omnimem/media/container.py",
        "packet.size == 0 and packet.pts is not None",
        "False",
        ("tests/unit/media/test_table.py",),
    ),
    Mutation("positions not shifted", STREAM, "if not any(self._moved):", "if True:", CYCLE),
    # evaluation
    Mutation("answered twice", ANSWERING, 'in lines if line["id"] not in done]', "in lines]", EVALUATION),
    Mutation(
        "failure of a batch swallowed",
        ANSWERING,
        "return [line for sample in samples for line in self._failed(sample, *reason)]",
        "return []",
        EVALUATION,
    ),
    Mutation(
        "tracks of an arm ignored",
        ANSWERING,
        "replace(self.feeder.options, tracks=arm.tracks)",
        "self.feeder.options",
        EVALUATION,
    ),
    Mutation("late questions not marked", ANSWERING, "time <= due.seconds + LATE", "True", EVALUATION),
    Mutation(
        "failed lines count as answers",
        RESULTS,
        'line is not None and not line.get("failed")',
        "line is not None",
        EVALUATION,
    ),
    Mutation("torn line kept", RESULTS, "os.truncate(path, len(whole[0]) + len(whole[1]))", "pass", EVALUATION),
    # comparison
    Mutation("unequal entries accepted", DIFFERENCES, "SAME_ENTRIES = 0.001", "SAME_ENTRIES = 1.0", COMPARISON),
    Mutation("only means compared", DIFFERENCES, "unequal[:1] or _entry_differences(a, b)", "unequal[:1]", COMPARISON),
    Mutation("percentiles not expanded", STATISTICS, "math.sqrt(clusters / (clusters - 1)) * t", "t", COMPARISON),
    Mutation("answers resampled, not videos", STATISTICS, "sorted(set(videos))", "sorted(videos)", COMPARISON),
    Mutation("no adjustment over benchmarks", STATISTICS, "np.arange(order.size, 0, -1)", "1", COMPARISON),
    Mutation(
        "unanswered pairs compared",
        "omnimem/comparison/summary.py",
        "for key in of_a if key in of_b]",
        "for key in of_a]",
        COMPARISON,
    ),
    # questions within a grid, tracks, left-out questions, ranges
    Mutation(
        "rest counted as part of the stream",
        CACHE,
        "total = heard if whole.at is None else total",
        "total = heard",
        EVALUATION,
    ),
    Mutation("stream without tokens accepted", FEEDER, "if not tokens:", "if False:", ("tests/unit/test_rows.py",)),
    Mutation(
        "compaction failure under a budget excused",
        LEFT_OUT_OF,
        "isinstance(error, PositionsError) and policy.budget is None",
        "isinstance(error, PositionsError)",
        LEFT,
    ),
    Mutation("cause of an error not looked at", ERRORS, "cause = cause.__cause__", "cause = None", LEFT),
    Mutation("arm of a missing track fails", ANSWERING, 'present not in ("both", arm.tracks)', "False", EVALUATION[:1]),
    Mutation(
        "left-out questions are not tried again",
        RESULTS,
        'for line in self._lines() if not line.get("failed")}',
        "for line in self._lines()}",
        LEFT,
    ),
    Mutation(
        "left-out questions counted as wrong",
        "omnimem/evaluation/summary.py",
        "lines = [line for line in lines if not is_left_out(line)]",
        "pass",
        LEFT,
    ),
    Mutation(
        "left-out questions compared",
        "omnimem/comparison/load.py",
        "answer.failed is not None and is_left_out(record)",
        "False",
        (*COMPARISON, *LEFT),
    ),
    Mutation(
        "dear arms first",
        "omnimem/cli/arms.py",
        "sorted(names, key=BY_COST.index)",
        "list(names)",
        ("tests/unit/cli/test_arms.py",),
    ),
    Mutation("question after `end` accepted", "omnimem/rows.py", "min(seconds, sample.end)", "seconds", ROWS),
    Mutation("silent audio file accepted", "omnimem/rows.py", "not (alone and video)", "not video", ROWS),
    Mutation(
        "range of other processes not said",
        ANSWERING,
        'self.feeder.trained.note(summary["beyond_trained"]["reached"])',
        "pass",
        LEFT,
    ),
    Mutation(
        "subtitles do not follow the frames",
        "omnimem/config/__init__.py",
        "each.subtitle_fps or fps",
        "each.subtitle_fps or 3.0",
        ("tests/unit/config",),
    ),
    # trained projectors, sketches
    Mutation("a batch is one stream", PROJECTORS, "tokens.unflatten(0, states.shape[:2])", "tokens[None]", PROJECTED),
    Mutation(
        "the base's projector never used", PROJECTORS, "if original or module.disable", "if module.disable", PROJECTED
    ),
    Mutation(
        "the adapter's projector while it is off",
        "omnimem/backbones/base.py",
        "original = original or not adapter_is_on(self.text_model)",
        "original = bool(original)",
        PROJECTED,
    ),
    Mutation("a sketch without its last number", SKETCHES, "if part.shape[-1] < size:", "if False:", SKETCHED),
    Mutation("codes are cut, not rounded", SKETCHES, "OFFSETS[bits] + 0.5", "OFFSETS[bits]", SKETCHED),
    Mutation("the latest chunk sets the reference", SKETCHES, "layer not in self._of or", "True or", SKETCHED),
    Mutation(
        "cosines of codes as those of numbers",
        SKETCHES,
        "(apart > 1, 2 - found, found)",
        "(apart > 1, apart, apart)",
        SKETCHED,
    ),
)


def survived(mutation: Mutation, tree: Path) -> bool:
    """Whether all tests pass with the mutation. Raises ValueError when the line is not there exactly once."""
    # 1. mutate
    file = tree / mutation.file
    text = file.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.name}: {mutation.old!r} is not once in {mutation.file}")
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    # 2. test, restore
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutation.tests]
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    finally:
        file.write_text(text, encoding="utf-8")
    if done.returncode > 1:
        raise ValueError(f"{mutation.name}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}")
    last = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))] or [""]
    print(f"{'SURVIVED' if done.returncode == 0 else 'caught'}\t{mutation.name}\t{last[0][:140]}", flush=True)
    return done.returncode == 0


def main(names: list[str]) -> int:
    """Exit code 1 if a mutation survives."""
    chosen = [mutation for mutation in MUTATIONS if not names or mutation.name in names]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=LEFT_OUT, symlinks=True)
        alive = [mutation.name for mutation in chosen if survived(mutation, tree)]
    print(f"{len(chosen) - len(alive)} of {len(chosen)} caught")
    return bool(alive)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
