"""Render the audio-visual recall task: seeded streams as mp4 files, and one manifest per split.

    omnimem synthesize --out data/recall --seconds 64 --train 512 --calibration 64 --test 80 --seed 1
    omnimem synthesize --world pictures --out data/pictures --train 16 --calibration 4 --test 24

Worlds: `symbols`, coloured shapes and artificial voices, for the bundled tiny checkpoint; `pictures`, emoji and spoken
English words, for the assembled one (needs espeak-ng, flite and the font Noto Color Emoji). The renderings and voices
of `pictures` in the test split occur in no other split, and not in the fit of that checkpoint.

Can be repeated: existing files are kept, missing ones are rendered. A folder belongs to one recipe (recipe.json);
another recipe is refused. The recipe does not include the number of streams: stream i of a split is always the same.
"""

import argparse
import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, final

import numpy as np
from tqdm import tqdm

from omnimem.aside import written_aside
from omnimem.cli.parser import Parser
from omnimem.errors import UserError, counted
from omnimem.recall import pictures_renderer, renderer
from omnimem.recall.pictures import Media, PictureOptions, PictureWorld, draw_pictures
from omnimem.recall.worlds import SLOT, Question, World, WorldOptions, draw_world
from omnimem.run import write_text
from omnimem.textfile import StoredFileError, read_stored

SPLITS = ("train", "calibration", "test")
MEDIA: dict[str, Media] = {"train": "adapter", "calibration": "adapter", "test": "test"}
SHORTEST = {"symbols": SLOT, "pictures": 6}  # seconds of a stream


@final
@dataclass(frozen=True, kw_only=True)
class Stream:
    """One file to render."""

    id: str
    world: World | PictureWorld

    @property
    def video(self) -> str:
        """The path of the file below the folder of the manifest."""
        return f"videos/{self.id}.mp4"


@final
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that determines stream i of a split."""

    seconds: int
    seed: int
    options: WorldOptions | PictureOptions

    def draw(self, seed: int, seconds: int, split: str) -> World | PictureWorld:
        """The world of a seed."""
        if isinstance(self.options, PictureOptions):
            return draw_pictures(seed, seconds, MEDIA[split], self.options)
        return draw_world(seed, seconds, self.options)

    def stream(self, split: str, index: int) -> Stream:
        """Stream `index` of a split: the first world of its seeds that has a question."""
        for attempt in count():
            numbers = (self.seed, SPLITS.index(split), index, attempt)
            seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 16
            world = self.draw(seed, self.seconds, split)
            if world.questions:
                return Stream(id=f"{split}-{index:05d}", world=world)
        raise AssertionError("count() does not end")

    def record(self) -> dict[str, Any]:
        """Content of recipe.json; the digest changes with the rules that worlds are drawn by."""
        example = self.draw(0, 64, "test")
        drawn_by = pictures_renderer if isinstance(self.options, PictureOptions) else renderer
        return {
            "seconds": self.seconds,
            "seed": self.seed,
            "options": json.loads(json.dumps(asdict(self.options))),
            "renderer_edition": drawn_by.EDITION,
            "rules_sha256": hashlib.sha256(repr(example).encode()).hexdigest(),
        }


class RecipeError(UserError):
    """A length that cannot be drawn, or a folder that holds streams of another recipe; one line per difference."""


def claim(out: Path, recipe: Recipe) -> None:
    """Write recipe.json into a new folder, or check that the existing one is the same.

    Raises RecipeError if it differs, cannot be read, or is missing although there are videos.
    """
    path, asked = out / "recipe.json", recipe.record()
    cure = f"choose another --out, or delete {out}"
    if path.exists():
        try:
            there = read_stored(path, dict[str, Any], cure)
        except StoredFileError as error:
            raise RecipeError(str(error)) from error
        different = [key for key in asked if there.get(key) != asked[key]]
        if different:
            lines = [f"{path} {key}: {there.get(key)!r} there, {asked[key]!r} now; {cure}" for key in different]
            raise RecipeError("\n".join(lines))
    elif any((out / "videos").glob("*.mp4")):
        raise RecipeError(f"{path}: missing beside videos of unknown origin; {cure}")
    else:
        (out / "videos").mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asked, indent=2) + "\n")


def synthesize(out: Path, recipe: Recipe, counts: dict[str, int], workers: int) -> int:
    """Render the missing files and write the manifests of splits that have streams; returns how many were rendered."""
    claim(out, recipe)
    splits = {split: [recipe.stream(split, index) for index in range(n)] for split, n in counts.items()}
    missing = [s for streams in splits.values() for s in streams if not (out / s.video).exists()]
    bar = tqdm(total=len(missing), desc=f"{out}: streams of {recipe.seconds} s", unit="stream", disable=not missing)
    with bar:
        for _ in _made(out, missing, workers):
            bar.update()
    for split, streams in ((split, streams) for split, streams in splits.items() if streams):
        write_text(out / f"{split}.jsonl", "".join(json.dumps(manifest_line(stream)) + "\n" for stream in streams))
    return len(missing)


def _made(out: Path, streams: Sequence[Stream], workers: int) -> Iterator[None]:
    """Render each stream, here or in several processes; yields once per stream."""
    if workers == 1 or len(streams) <= 1:
        for stream in streams:
            yield make(out, stream)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures: list[Future[None]] = [pool.submit(make, out, stream) for stream in streams]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:  # after an error or an interrupt, waiting jobs are not started
            pool.shutdown(cancel_futures=True)


def make(out: Path, stream: Stream) -> None:
    """Render under another name first: an existing file is always complete, whoever else renders it."""
    with written_aside(out / stream.video) as part:
        if isinstance(stream.world, PictureWorld):
            pictures_renderer.write_pictures(stream.world, part)
        else:
            renderer.write_mp4(stream.world, part)


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
        "evidence": [*world.evidence]
        if isinstance(world, PictureWorld)
        else [evidence(world, question) for question in world.questions],
    }
    return {"id": stream.id, "video": stream.video, "audio": None, "messages": messages, "meta": meta}


def evidence(world: World, question: Question) -> tuple[int, int]:
    """The seconds [start, end) that contain the answer."""
    if question.kind == "auditory":
        at = next(spoken.at for spoken in world.utterances if spoken.voice == question.key)
        return at, at + 1
    event = next(event for event in world.events if event.shape == question.key)
    return event.start, event.start + event.seconds


def main(arguments: Sequence[str]) -> None:
    """Render the missing streams and write the manifests; raises RecipeError if the folder has another recipe."""
    given = _parser().parse(arguments)
    if given.world == "pictures" and (given.seconds < SHORTEST["pictures"] or given.seconds % 2):
        raise RecipeError(f"--seconds {given.seconds}: scenes of pictures need an even number, at least 6")
    options = PictureOptions() if given.world == "pictures" else WorldOptions()
    recipe = Recipe(seconds=given.seconds, seed=given.seed, options=options)
    counts = {split: getattr(given, split) for split in SPLITS}
    made = synthesize(given.out, recipe, counts, given.workers)
    total = sum(counts.values())
    print(f"{given.out}: {counted(total, 'stream')} of {given.seconds} s ({made} made, {total - made} kept)")


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/recall"), help="folder (default: %(default)s)")
    parser.add_argument("--world", choices=SHORTEST, default="symbols", help="what is rendered (default: %(default)s)")
    parser.add_argument("--seconds", type=_at_least(SLOT), default=64, help="length of a stream (default: %(default)s)")
    for split, number in zip(SPLITS, (512, 64, 80), strict=True):
        parser.add_argument(f"--{split}", type=_at_least(0), default=number, help="streams (default: %(default)s)")
    parser.add_argument(
        "--seed",
        type=_at_least(0),
        default=1,
        help="another seed gives other streams (default: 1; the settings of tiny.yaml were chosen on seed 0)",
    )
    parser.add_argument("--workers", type=_at_least(1), default=2, help="processes (default: %(default)s)")
    return parser


def _at_least(lowest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if (value := int(text)) < lowest:
            raise argparse.ArgumentTypeError(f"{value} is too small; give {lowest} or more")
        return value

    return number
