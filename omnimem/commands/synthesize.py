"""Writes the audio-visual recall task: seeded streams as mp4 files, and a manifest a split.

    python data_prep/synthesize.py --out data/recall --seconds 64 --train 512 --calibration 64 --test 80 --seed 1

May be repeated: what is there is kept, what is missing is made. A folder belongs to one recipe, kept in recipe.json;
another one is refused. The number of streams is no part of it: stream i of a split is the same in every folder.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, final

import numpy as np
from tqdm import tqdm

from omnimem.recall.renderer import EDITION, write_mp4
from omnimem.recall.worlds import SLOT, Question, World, WorldOptions, draw_world

SPLITS = ("train", "calibration", "test")


@final
@dataclass(frozen=True, kw_only=True)
class Stream:
    """One file to make."""

    id: str
    world: World

    @property
    def video(self) -> str:
        """The path of the file below the folder of the manifest."""
        return f"videos/{self.id}.mp4"


@final
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides what stream i of a split looks and sounds like."""

    seconds: int
    seed: int
    options: WorldOptions

    def stream(self, split: str, index: int) -> Stream:
        """Stream `index` of a split: the first world of its seeds in which there is something to ask."""
        for attempt in count():
            numbers = (self.seed, SPLITS.index(split), index, attempt)
            seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 16)
            world = draw_world(seed, self.seconds, self.options)
            if world.questions:
                return Stream(id=f"{split}-{index:05d}", world=world)
        raise AssertionError("count() does not end")

    def record(self) -> dict[str, Any]:
        """What recipe.json says; the digest changes when worlds are drawn by other rules."""
        example = draw_world(0, 64, self.options)
        return {
            "seconds": self.seconds,
            "seed": self.seed,
            "options": asdict(self.options),
            "renderer_edition": EDITION,
            "rules_sha256": hashlib.sha256(repr(example).encode()).hexdigest(),
        }


class RecipeError(ValueError):
    """The folder holds streams of another recipe; one line a difference."""


def claim(out: Path, recipe: Recipe) -> None:
    """Writes recipe.json into a new folder, or checks that the one there is the same.

    Raises RecipeError where it differs, is unreadable, or is missing beside videos.
    """
    path, asked = out / "recipe.json", recipe.record()
    cure = f"choose another --out, or delete {out}"
    if path.exists():
        there = _read_recipe(path, cure)
        different = [key for key in asked if there.get(key) != asked[key]]
        if different:
            lines = [f"{path} {key}: {there.get(key)!r} there, {asked[key]!r} now; {cure}" for key in different]
            raise RecipeError("\n".join(lines))
    elif any((out / "videos").glob("*.mp4")):
        raise RecipeError(f"{path}: missing beside videos of unknown origin; {cure}")
    else:
        (out / "videos").mkdir(parents=True, exist_ok=True)
        _write(path, json.dumps(asked, indent=2) + "\n")


def _read_recipe(path: Path, cure: str) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise RecipeError(f"{path}: not JSON ({error}); {cure}") from error
    if not isinstance(record, dict):
        raise RecipeError(f"{path}: not a JSON object; {cure}")
    return record


def synthesize(out: Path, recipe: Recipe, counts: dict[str, int], workers: int) -> int:
    """Makes the missing files and all manifests; returns how many files were made."""
    claim(out, recipe)
    splits = {split: [recipe.stream(split, index) for index in range(n)] for split, n in counts.items()}
    missing = [s for streams in splits.values() for s in streams if not (out / s.video).exists()]
    bar = tqdm(total=len(missing), desc=f"{out}: streams of {recipe.seconds} s", unit="stream", disable=not missing)
    with bar:
        for _ in _made(out, missing, workers):
            bar.update()
    for split, streams in splits.items():
        _write(out / f"{split}.jsonl", "".join(json.dumps(manifest_line(stream)) + "\n" for stream in streams))
    return len(missing)


def _made(out: Path, streams: Sequence[Stream], workers: int) -> Iterator[None]:
    """Makes each stream, here or in several processes; yields once a stream."""
    if workers == 1 or len(streams) <= 1:
        for stream in streams:
            yield make(out, stream)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures: list[Future[None]] = [pool.submit(make, out, stream) for stream in streams]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:  # after an error or an interrupt, what has not begun is not begun
            pool.shutdown(cancel_futures=True)


def make(out: Path, stream: Stream) -> None:
    """Writes the file under another name first, so that a file that is there is whole."""
    path = out / stream.video
    part = path.with_suffix(".part")
    write_mp4(stream.world, part)
    part.replace(path)


def manifest_line(stream: Stream) -> dict[str, Any]:
    """The line of the manifest: every question of the stream, asked after its end."""
    world = stream.world
    messages: list[dict[str, Any]] = []
    for question in world.questions:
        messages.append({"role": "user", "content": question.text, "at": None})
        messages.append({"role": "assistant", "content": question.answer})
    meta = {
        "seconds": world.seconds,
        "seed": world.seed,
        "kinds": [question.kind for question in world.questions],
        "evidence": [evidence(world, question) for question in world.questions],
    }
    return {"id": stream.id, "video": stream.video, "audio": None, "messages": messages, "meta": meta}


def evidence(world: World, question: Question) -> tuple[int, int]:
    """The seconds [start, end) that show or say what is asked about."""
    if question.kind == "auditory":
        at = next(spoken.at for spoken in world.utterances if spoken.voice == question.key)
        return at, at + 1
    event = next(event for event in world.events if event.shape == question.key)
    return event.start, event.start + event.seconds


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def _at_least(lowest: int) -> Any:
    def number(text: str) -> int:
        if (value := int(text)) < lowest:
            raise argparse.ArgumentTypeError(f"{value} is too small; give {lowest} or more")
        return value

    return number


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with 2 when it is wrong."""
    parser = argparse.ArgumentParser(description="Write the audio-visual recall task.", allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("data/recall"), help="folder (default: %(default)s)")
    parser.add_argument("--seconds", type=_at_least(SLOT), default=64, help="length of a stream (default: %(default)s)")
    for split, number in zip(SPLITS, (512, 64, 80), strict=True):
        parser.add_argument(f"--{split}", type=_at_least(0), default=number, help="streams (default: %(default)s)")
    parser.add_argument(
        "--seed",
        type=_at_least(0),
        default=1,
        help="another seed, other streams (default: 1; the settings of tiny.yaml were chosen on 0)",
    )
    parser.add_argument("--workers", type=_at_least(1), default=2, help="processes (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 done, 2 refused."""
    asked = parse(arguments)
    recipe = Recipe(seconds=asked.seconds, seed=asked.seed, options=WorldOptions())
    counts = {split: getattr(asked, split) for split in SPLITS}
    try:
        made = synthesize(asked.out, recipe, counts, asked.workers)
    except RecipeError as error:
        print(error, file=sys.stderr)
        return 2
    total = sum(counts.values())
    print(f"{asked.out}: {total} streams of {asked.seconds} s ({made} made, {total - made} kept)")
    return 0
