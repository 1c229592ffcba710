"""The towers of the tiny checkpoint: worlds as patches and mel, and the stage that teaches towers what to say."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from omnimem.media import FileSource, Geometry, LogMel, SourceOptions, patchify
from omnimem.recall.renderer import render_audio, render_frames, write_mp4
from omnimem.recall.worlds import CELLS, COLOURS, SHAPES, VOICES, WORDS, World, WorldOptions, draw_world
from omnimem.tiny.batches import Concepts
from omnimem.tiny.checkpoint import IMAGE_MEAN, IMAGE_STD

GEOMETRY = Geometry(
    patch=14,
    merge=2,
    temporal_patch=2,
    mean=IMAGE_MEAN,
    std=IMAGE_STD,
    mel=LogMel(mels=64, hop=4000, n_fft=4096),
    segment_seconds=2.0,
)


@final
@dataclass(frozen=True, kw_only=True)
class Clip:
    """What the towers read of a stream: one frame a second, and the mel spectrogram of the whole."""

    frames: Tensor  # seconds 3 height width, uint8
    mel: Tensor  # mels mel_frames


def render_sight(world: World) -> Tensor:
    """Frames straight from the renderer."""
    return torch.from_numpy(render_frames(world))


def render_sound(world: World) -> Tensor:
    """The mel spectrogram of samples straight from the renderer."""
    return GEOMETRY.mel.clip(torch.from_numpy(render_audio(world)))


def render_clips(worlds: Sequence[World]) -> list[Clip]:
    """Both, for each world."""
    return [Clip(frames=render_sight(world), mel=render_sound(world)) for world in worlds]


def decode_clips(worlds: Sequence[World]) -> list[Clip]:
    """The same through mp4 files and the very source that evaluation reads."""
    clips = []
    with TemporaryDirectory() as folder:
        for world in worlds:
            path = Path(folder) / f"{world.seed}.mp4"
            write_mp4(world, path)
            segments = list(FileSource(path, options=SourceOptions(), geometry=GEOMETRY))
            frames = torch.cat([segment.frames for segment in segments if segment.frames is not None])
            mel = torch.cat([segment.mel for segment in segments if segment.mel is not None], dim=1)
            # AAC fills its last block beyond the end of the stream
            clips.append(Clip(frames=frames[: world.seconds], mel=mel[:, : 4 * world.seconds]))
    return clips


def see(model: Qwen2_5OmniThinkerForConditionalGeneration, frames: Sequence[Tensor]) -> Tensor:
    """Visual features (streams grids cells width); the tower never looks beyond a grid, so streams can be joined."""
    patches, grid = patchify(
        torch.cat(list(frames)),
        patch=GEOMETRY.patch,
        merge=GEOMETRY.merge,
        temporal_patch=GEOMETRY.temporal_patch,
        mean=GEOMETRY.mean,
        std=GEOMETRY.std,
    )
    features = model.get_submodule("model.visual")(patches, grid_thw=torch.tensor([grid])).pooler_output
    return features.view(len(frames), -1, CELLS, features.shape[-1])


def hear(model: Qwen2_5OmniThinkerForConditionalGeneration, mels: Sequence[Tensor]) -> Tensor:
    """Audio features (streams seconds width)."""
    lengths = torch.tensor([mel.shape[1] for mel in mels])
    tower = model.get_submodule("model.audio_tower")
    features = tower(torch.cat(list(mels), dim=1), feature_lens=lengths).last_hidden_state
    return features.view(len(mels), -1, features.shape[-1])


def fresh_worlds(rng: np.random.Generator, count: int, seconds: int, options: WorldOptions) -> list[World]:
    """Worlds never seen before; their seeds lie above those of every data split."""
    return [draw_world(int(seed), seconds, options) for seed in rng.integers(2**40, 2**41, count)]


@final
@dataclass(frozen=True, kw_only=True)
class Likeness:
    """How near features come to what they should say."""

    loss: Tensor
    error: float  # squared distance to the target, relative to its square, where there is something to say
    background: float  # the same where there is nothing
    named: float  # share of features nearest to the right one of each family of words

    @property
    def numbers(self) -> dict[str, float]:
        """What a log line says of it."""
        return {"error": self.error, "background": self.background, "named": self.named}


def likeness(features: Tensor, targets: Tensor, nothing: Tensor, families: Sequence[tuple[Tensor, Tensor]]) -> Likeness:
    """Relative squared error + half of it on the background + 0.3 cross-entropy against the table of each family.

    `families` holds, for each part of a symbol, the embeddings of all its names and the index of the right one.
    The cosine alone would leave the scale wrong.
    """
    says = (targets != nothing).any(-1)
    relative = (features - targets).square().sum(-1) / targets.square().sum(-1)
    error, background = relative[says].mean(), relative[~says].mean()
    loss, right = error + 0.5 * background, torch.ones(int(says.sum()), dtype=torch.bool)
    for table, index in families:
        logits = features[says] @ table.T / table.square().sum(-1).mean().sqrt()
        loss = loss + 0.3 * functional.cross_entropy(logits, index)
        right &= logits.argmax(-1) == index
    named = right.float().mean().item()
    return Likeness(loss=loss, error=error.item(), background=background.item(), named=named)


def families(
    concepts: Concepts, targets: Tensor, nothing: Tensor, names: Sequence[Sequence[str]]
) -> list[tuple[Tensor, Tensor]]:
    """Tables of the names and, recovered from the clean targets, which of them each symbol or word is."""
    symbols = targets[(targets != nothing).any(-1)]
    first, second = (torch.stack([concepts.word(name) for name in family]) for family in names)
    sums = (first[:, None] + second[None]).flatten(0, 1)
    index = torch.cdist(symbols, sums).argmin(-1)
    return [(first, index // len(second)), (second, index % len(second))]


def judge_sight(
    model: Qwen2_5OmniThinkerForConditionalGeneration,
    concepts: Concepts,
    worlds: Sequence[World],
    frames: Sequence[Tensor],
) -> Likeness:
    """How well the vision tower says what these worlds show."""
    targets, _ = concepts.targets(worlds)
    symbols = families(concepts, targets, concepts.visual_nothing, (SHAPES, COLOURS))
    return likeness(see(model, frames), targets, concepts.visual_nothing, symbols)


def judge_hearing(
    model: Qwen2_5OmniThinkerForConditionalGeneration,
    concepts: Concepts,
    worlds: Sequence[World],
    mels: Sequence[Tensor],
) -> Likeness:
    """How well the audio tower says what is heard in these worlds."""
    _, targets = concepts.targets(worlds)
    words = families(concepts, targets, concepts.audio_nothing, (VOICES, WORDS))
    return likeness(hear(model, mels), targets, concepts.audio_nothing, words)


@final
@dataclass(frozen=True, kw_only=True)
class Lesson:
    """Some steps of the towers."""

    name: str
    steps: int
    sight_rate: float  # learning rates, with cosine decay to a fiftieth
    sound_rate: float
    files: bool  # half of the streams through H.264 and AAC


LESSONS: tuple[Lesson, ...] = (
    Lesson(name="towers", steps=300, sight_rate=4e-3, sound_rate=8e-3, files=False),
    Lesson(name="towers-files", steps=100, sight_rate=1e-3, sound_rate=2e-3, files=True),
)
SIGHTS = WorldOptions(event_rate=1.0)  # 8 streams of 32 s a step
SOUNDS = WorldOptions(event_rate=0.0, stray_rate=0.8)  # 16 streams of 16 s a step, nearly all words
FILES = WorldOptions(event_rate=1.0, stray_rate=0.5)  # 8 streams of 32 s a step, both tracks


def teach(
    model: Qwen2_5OmniThinkerForConditionalGeneration, concepts: Concepts, lesson: Lesson, *, seed: int
) -> Iterator[dict[str, float | int]]:
    """Regresses both towers on the concepts; yields a record every 20 steps. Every draw is fixed by seed and step."""
    eyes, ears = (list(model.get_submodule(f"model.{tower}").parameters()) for tower in ("visual", "audio_tower"))
    rates = (lesson.sight_rate, lesson.sound_rate)
    optimizer = torch.optim.AdamW([{"params": eyes}, {"params": ears}], betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(lesson.steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, (step + 1) / 20) * (0.51 + 0.49 * np.cos(np.pi * step / lesson.steps))
        rng = np.random.default_rng([seed, *lesson.name.encode(), step])
        sight, sound = _judge_fresh(model, concepts, rng, files=lesson.files)
        optimizer.zero_grad()
        (sight.loss + sound.loss).backward()
        nn.utils.clip_grad_norm_(eyes, 1.0)
        nn.utils.clip_grad_norm_(ears, 1.0)
        optimizer.step()
        if step % 20 == 19 or step == lesson.steps - 1:
            yield {"step": step + 1, **_record("sight", sight), **_record("sound", sound)}


def _judge_fresh(
    model: Qwen2_5OmniThinkerForConditionalGeneration, concepts: Concepts, rng: np.random.Generator, *, files: bool
) -> tuple[Likeness, Likeness]:
    """Both towers on new worlds; without files each on worlds crowded with what it must learn."""
    if files:
        shown = heard = fresh_worlds(rng, 8, 32, FILES)
        half = len(shown) // 2  # without the other half they would unlearn the renderer's own sharp flicker
        clips = [*render_clips(shown[:half]), *decode_clips(shown[half:])]
        frames, mels = [clip.frames for clip in clips], [clip.mel for clip in clips]
    else:
        shown, heard = fresh_worlds(rng, 8, 32, SIGHTS), fresh_worlds(rng, 16, 16, SOUNDS)
        frames, mels = [render_sight(world) for world in shown], [render_sound(world) for world in heard]
    return judge_sight(model, concepts, shown, frames), judge_hearing(model, concepts, heard, mels)


def _record(prefix: str, found: Likeness) -> dict[str, float]:
    return {f"{prefix}_{name}": value for name, value in found.numbers.items()}
