"""The feature bank: what the encoders make of rendered media, once through H.264 and AAC, one file per world."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, final

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from omnimem.aside import written_aside
from omnimem.backbones.assembled import Encoders, geometry_of
from omnimem.checksums import share
from omnimem.media import FileSource, SourceOptions
from omnimem.recall.pictures import MEDIA, STEP, WORDS, Media, PictureOptions, PictureWorld, Word, draw_pictures
from omnimem.recall.pictures_renderer import SIZE, render_audio, render_frames
from omnimem.recall.renderer import SAMPLE_RATE, Bytes, Floats, write_stream

SECONDS = 66  # of a bank world: a multiple of one and of three steps
FRAME_RATE = 1  # of the files; one frame in two seconds is read
SILENT = 16  # pixels along a side of the frames of a world that is heard only


@final
@dataclass(frozen=True, kw_only=True)
class Part:
    """Worlds of one media set, of which one track or both are encoded."""

    name: str
    media: Media
    first: int  # number of the first world
    count: int
    tracks: Literal["both", "video", "audio"]
    length: int = 1  # steps of a scene; with 1 every frame is another rendering
    all_spoken: bool = False  # nine of ten scenes have a word in every second


PARTS: tuple[Part, ...] = (
    Part(name="fit", media="fit", first=0, count=31, tracks="both"),
    Part(name="fitv", media="fit", first=100, count=40, tracks="video"),
    Part(name="fita", media="fit", first=10_000, count=80, tracks="audio", all_spoken=True),
    Part(name="adapter", media="adapter", first=0, count=30, tracks="both", length=3),
    Part(name="adapterv", media="adapter", first=200, count=12, tracks="video"),
)


@final
@dataclass(frozen=True, kw_only=True)
class Features:
    """A bank world and its features; a track that was not encoded is None."""

    world: PictureWorld
    visual: Float[Tensor, "steps cells _"] | None
    audio: Float[Tensor, "seconds _"] | None


def bank_world(part: Part, number: int) -> PictureWorld:
    """World `number` of a part, deterministic."""
    index = part.first + number
    options = PictureOptions(dense=True, lengths=(part.length,))
    world = draw_pictures((MEDIA.index(part.media) << 32) + index, SECONDS, part.media, options)
    return _all_spoken(world, number) if part.all_spoken else world


def _all_spoken(world: PictureWorld, number: int) -> PictureWorld:
    """The world with another word in every second of nine scenes of ten."""
    rng = np.random.default_rng([number, 77])
    names = [WORDS[i] for i in rng.permutation(len(WORDS))[: world.seconds]]
    scenes = []
    for scene in world.scenes:
        spoken = rng.random() < 0.9
        seconds = range(scene.start, scene.start + scene.seconds) if spoken else ()
        scenes.append(replace(scene, words=tuple(Word(at=at, text=names[at]) for at in seconds)))
    return replace(world, scenes=tuple(scenes))


def build(encoders: Encoders, folder: Path, part: Part) -> Iterator[Features]:
    """The features of a part; missing files are made, and an existing file is always complete."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(part.count):
        path, world = folder / f"{part.name}-{number:04d}.safetensors", bank_world(part, number)
        if not path.exists():
            tensors = {name: each.half() for name, each in encode(encoders, world, part.tracks).items()}
            with written_aside(path) as partial:
                save_file(tensors, partial)
                share(partial)
        tensors = load_file(path)
        visual, audio = (tensors[name].float() if name in tensors else None for name in ("visual", "audio"))
        yield Features(world=world, visual=visual, audio=audio)


@torch.no_grad()
def encode(encoders: Encoders, world: PictureWorld, tracks: Literal["both", "video", "audio"]) -> dict[str, Tensor]:
    """Write the world to a file, read it as any stream is read, and encode it; a track left out is blank."""
    seen, heard = tracks != "audio", tracks != "video"
    size = SIZE if seen else SILENT

    def frames(start: int, end: int) -> Bytes:
        blank = np.zeros((FRAME_RATE * (end - start), 3, size, size), np.uint8)
        return render_frames(world, FRAME_RATE, start, end) if seen else blank

    def samples(start: int, end: int) -> Floats:
        blank = np.zeros((end - start) * SAMPLE_RATE, np.float32)
        return render_audio(world, start, end) if heard else blank

    options = SourceOptions(fps=1 / STEP, min_pixels=SIZE**2, max_pixels=SIZE**2, tracks=tracks)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stream.mp4"
        write_stream(path, world.seconds, frames, samples, size=size, frame_rate=FRAME_RATE)
        segments = list(FileSource(path, options=options, geometry=geometry_of(encoders.mels)))
    visual = [encoders.cells(each.frames) for each in segments if each.frames is not None]
    audio = [encoders.seconds(each.mel) for each in segments if each.mel is not None]
    found = {"visual": torch.cat(visual)[: world.seconds // STEP]} if seen else {}
    return found | ({"audio": torch.cat(audio)[: world.seconds]} if heard else {})
