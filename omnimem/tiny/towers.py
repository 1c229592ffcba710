"""The towers of the tiny checkpoint: worlds as patches and mel, and the training stages of the towers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from omnimem.media import FileSource, Geometry, SourceOptions
from omnimem.recall.renderer import render_audio, render_frames, write_mp4
from omnimem.recall.worlds import VOICES, WORDS, World, WorldOptions, draw_world
from omnimem.tiny.base import NAMES, TinyBase
from omnimem.tiny.batches import Concepts


@final
@dataclass(frozen=True, kw_only=True)
class Clip:
    """The input of the towers: one frame per second, and the mel spectrogram of the whole stream."""

    frames: Tensor  # seconds 3 height width, uint8
    mel: Tensor  # mels mel_frames


def rendered_frames(world: World) -> Tensor:
    """Frames directly from the renderer."""
    return torch.from_numpy(render_frames(world))


def rendered_mel(world: World, geometry: Geometry) -> Tensor:
    """The mel spectrogram of samples directly from the renderer."""
    samples, mel = torch.from_numpy(render_audio(world)), geometry.mel
    if not geometry.windowed:
        return mel.clip(samples)
    length = int(geometry.segment_seconds * mel.rate)
    return torch.cat([mel.window(part, length // mel.hop) for part in samples.split(length)], dim=1)


def render_clips(worlds: Sequence[World], geometry: Geometry) -> list[Clip]:
    """A clip of each world, directly from the renderer."""
    return [Clip(frames=rendered_frames(world), mel=rendered_mel(world, geometry)) for world in worlds]


def decode_clips(worlds: Sequence[World], geometry: Geometry) -> list[Clip]:
    """A clip of each world, written to an mp4 file and read with the source that evaluation uses."""
    clips = []
    with TemporaryDirectory() as folder:
        for world in worlds:
            path = Path(folder) / f"{world.seed}.mp4"
            write_mp4(world, path)
            segments = list(FileSource(path, options=SourceOptions(), geometry=geometry))
            frames = torch.cat([segment.frames for segment in segments if segment.frames is not None])
            mel = torch.cat([segment.mel for segment in segments if segment.mel is not None], dim=1)
            # AAC pads its last block beyond the end of the stream
            clips.append(Clip(frames=frames[: world.seconds], mel=mel[:, : 4 * world.seconds]))
    return clips


def fresh_worlds(rng: np.random.Generator, count: int, seconds: int, options: WorldOptions) -> list[World]:
    """New worlds; their seeds are above those of all data splits."""
    return [draw_world(int(seed), seconds, options) for seed in rng.integers(2**40, 2**41, count)]


@final
@dataclass(frozen=True, kw_only=True)
class FeatureMatch:
    """How well features match their targets."""

    loss: Tensor
    error: float  # squared distance to the target, relative to the target's square, at symbols and words
    background: float  # the same at the background
    named: float  # fraction of features whose nearest name is right in every family

    def metrics(self, prefix: str) -> dict[str, float]:
        """The metrics for the log."""
        return {f"{prefix}_{name}": getattr(self, name) for name in ("error", "background", "named")}


def match_features(
    concepts: Concepts, features: Tensor, targets: Tensor, nothing: Tensor, names: Sequence[Sequence[str]]
) -> FeatureMatch:
    """Relative squared error + half of it on the background + 0.3 cross-entropy against each family of names.

    `nothing` is the target of the background. The squared error is needed because a cosine would not determine the
    scale.
    """
    content = (targets != nothing).any(-1)
    relative = (features - targets).square().sum(-1) / targets.square().sum(-1)
    error, background = relative[content].mean(), relative[~content].mean()
    loss, right = error + 0.5 * background, torch.ones(int(content.sum()), dtype=torch.bool)
    for table, index in families(concepts, targets[content], names):
        logits = features[content] @ table.T / table.square().sum(-1).mean().sqrt()
        loss = loss + 0.3 * functional.cross_entropy(logits, index)
        right &= logits.argmax(-1) == index
    named = right.float().mean().item()
    return FeatureMatch(loss=loss, error=error.item(), background=background.item(), named=named)


def families(concepts: Concepts, content: Tensor, names: Sequence[Sequence[str]]) -> list[tuple[Tensor, Tensor]]:
    """For each family of names, their embeddings and the index of each symbol or word, found from its target."""
    tables = [torch.stack([concepts.word(name) for name in family]) for family in names]
    sums = torch.zeros(1, content.shape[-1])
    for table in tables:
        sums = (sums[:, None] + table[None]).flatten(0, 1)
    index = torch.unravel_index(torch.cdist(content, sums).argmin(-1), [len(table) for table in tables])
    return list(zip(tables, index, strict=True))


@final
@dataclass(frozen=True, kw_only=True)
class TowerStage:
    """A training stage of the towers."""

    name: str
    steps: int
    vision_rate: float  # learning rates, with cosine decay to a fiftieth
    audio_rate: float
    files: bool  # half of the streams through H.264 and AAC


TOWER_STAGES: tuple[TowerStage, ...] = (
    TowerStage(name="towers", steps=300, vision_rate=4e-3, audio_rate=8e-3, files=False),
    TowerStage(name="towers-files", steps=100, vision_rate=1e-3, audio_rate=2e-3, files=True),
)
VISION_WORLDS = WorldOptions(event_rate=1.0)  # 8 streams of 32 s per step
AUDIO_WORLDS = WorldOptions(event_rate=0.0, stray_rate=0.8)  # 16 streams of 16 s per step, nearly all words
FILE_WORLDS = WorldOptions(event_rate=1.0, stray_rate=0.5)  # 8 streams of 32 s per step, both tracks


def fit_towers(base: TinyBase, concepts: Concepts, stage: TowerStage, *, seed: int) -> Iterator[dict[str, float | int]]:
    """Regress both towers on the concepts; yields metrics every 20 steps. Seed and step determine all random draws."""
    # 1. one parameter group per tower
    visual, audio = (list(tower.parameters()) for tower in base.towers)
    rates = (stage.vision_rate, stage.audio_rate)
    optimizer = torch.optim.AdamW([{"params": visual}, {"params": audio}], betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(stage.steps):
        # 2. learning rates
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, (step + 1) / 20) * (0.51 + 0.49 * np.cos(np.pi * step / stage.steps))
        # 3. forward and backward on new worlds
        rng = np.random.default_rng([seed, *stage.name.encode(), step])
        matches = _match_new_worlds(base, concepts, rng, files=stage.files)
        optimizer.zero_grad()
        torch.stack([match.loss for match in matches.values()]).sum().backward()
        nn.utils.clip_grad_norm_(visual, 1.0)
        nn.utils.clip_grad_norm_(audio, 1.0)
        optimizer.step()
        if step % 20 == 19 or step == stage.steps - 1:
            yield {"step": step + 1} | {k: v for name, match in matches.items() for k, v in match.metrics(name).items()}


def _match_new_worlds(
    base: TinyBase, concepts: Concepts, rng: np.random.Generator, *, files: bool
) -> dict[str, FeatureMatch]:
    """Every level of the vision encoder and the audio encoder on new worlds; without files, each on its own worlds."""
    if files:
        shown = heard = fresh_worlds(rng, 8, 32, FILE_WORLDS)
        half = len(shown) // 2  # the rendered half keeps the towers accurate on the renderer's sharp flicker
        clips = [*render_clips(shown[:half], base.geometry), *decode_clips(shown[half:], base.geometry)]
        frames, mels = [clip.frames for clip in clips], [clip.mel for clip in clips]
    else:
        shown, heard = fresh_worlds(rng, 8, 32, VISION_WORLDS), fresh_worlds(rng, 16, 16, AUDIO_WORLDS)
        frames = [rendered_frames(world) for world in shown]
        mels = [rendered_mel(world, base.geometry) for world in heard]
    (symbols, _), (_, words) = concepts.targets(shown), concepts.targets(heard)
    matches = {
        ("sight", "deepstack")[level]: match_features(
            concepts, features, target, concepts.visual_nothing, [NAMES[name] for name in names]
        )
        for level, (names, features, target) in enumerate(zip(base.levels, base.look(frames), symbols, strict=True))
    }
    sound = match_features(concepts, base.listen(mels), words, concepts.audio_nothing, (VOICES, WORDS))
    return matches | {"sound": sound}
