"""The adapter of the assembled base: LoRA on streams put together from the feature bank, questions packed behind them.

A row holds the opening of the chat template, a stream, and one block of tokens per question. A block attends to the
stream and itself, and its positions continue from the end of the stream, as if it were the only question.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from omnimem.assembly.bank import Features
from omnimem.backbones.assembled import TARGETS, Bridge, Prompts
from omnimem.recall.pictures import CORNERS, STEP, Direction, PictureOptions, PictureWorld, direction_of, draw_pictures
from omnimem.recall.worlds import KINDS

IGNORED = -100
# wordings of training alone, without the template's end: a third of the tokens per question
SHORT: dict[Direction, str] = {
    "shown_kind": "\n{key} shown:",
    "spoken_kind": "\n{key} spoken:",
    "spoken_with": "\nspoken with {key}:",
    "shown_with": "\nshown with {key}:",
}
SHORT_SHARE = 0.75  # of the questions


@final
@dataclass(frozen=True, kw_only=True)
class Stage:
    """Steps on streams of one length; the learning rate goes from `rate` to `last` linearly."""

    seconds: int
    streams: int  # per step
    steps: int
    rate: float
    last: float
    lengths: tuple[int, ...] = (2, 3)  # steps of a scene
    pairs: int = 8  # questions about pairs per stream, at most


STAGES: tuple[Stage, ...] = (
    Stage(seconds=12, streams=4, steps=100, rate=1e-3, last=1e-3, lengths=(1, 2)),
    Stage(seconds=32, streams=2, steps=80, rate=1e-3, last=1e-3, lengths=(1, 2, 3)),
    Stage(seconds=64, streams=2, steps=110, rate=1e-3, last=1e-5),
    Stage(seconds=64, streams=2, steps=120, rate=7e-4, last=1e-5),
)
WARM_UP = 15
RANK, ALPHA = 16, 32.0
SAVE_EVERY = 10  # steps


# -------------------------------------------------------------------------------------------------------------- streams


@final
@dataclass(frozen=True, kw_only=True)
class StreamBank:
    """Pseudo-tokens of a bank, without places, by what they show or say."""

    scenes: Mapping[str | None, list[Float[Tensor, "steps cells width"]]]  # by picture
    words: Mapping[str, list[Float[Tensor, " width"]]]
    noises: Mapping[str, list[Float[Tensor, " width"]]]

    @classmethod
    @torch.no_grad()
    def of(cls, bank: Iterable[Features], bridge: Bridge) -> "StreamBank":
        """The pseudo-tokens of worlds."""
        scenes: dict[str | None, list[Tensor]] = {}
        words: dict[str, list[Tensor]] = {}
        noises: dict[str, list[Tensor]] = {}
        for each in bank:
            visual = None if each.visual is None else bridge.words(bridge.visual, each.visual)
            audio = None if each.audio is None else bridge.words(bridge.audio, each.audio)
            for scene in each.world.scenes:
                end = scene.start + scene.seconds
                if visual is not None:
                    scenes.setdefault(scene.picture, []).append(visual[scene.start // STEP : end // STEP])
                spoken = {word.at: word.text for word in scene.words}
                if audio is not None:
                    for second in range(scene.start, end):
                        group = words if second in spoken else noises
                        group.setdefault(spoken.get(second, scene.noise), []).append(audio[second])
        return cls(scenes=scenes, words=words, noises=noises)

    def stream(self, world: PictureWorld, rng: np.random.Generator) -> Float[Tensor, "tokens width"]:
        """A stream of the world, in the layout of the backbone: per step its cells, then its seconds."""
        steps = []
        for scene in world.scenes:
            shown = self.scenes[scene.picture]
            visual = shown[int(rng.integers(len(shown)))]
            spoken = {word.at: word.text for word in scene.words}
            for step in range(scene.seconds // STEP):
                seconds = [scene.start + STEP * step + offset for offset in range(STEP)]
                heard = [self.words[spoken[s]] if s in spoken else self.noises[scene.noise] for s in seconds]
                steps.append(visual[min(step, len(visual) - 1)])
                steps.append(torch.stack([each[int(rng.integers(len(each)))] for each in heard]))
        return torch.cat(steps)


# ---------------------------------------------------------------------------------------------------------------- model


@final
class Lora(nn.Module):
    """A frozen projection plus (alpha / r) B A x; A and B are float32, whatever the precision of the projection."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, inputs: Tensor) -> Tensor:
        low = self.scale * (inputs @ self.a.to(inputs.dtype).T)
        return self.base(inputs) + low @ self.b.to(inputs.dtype).T


@final
@dataclass(kw_only=True)
class Trainee:
    """The language model with its adapter, and one learned vector per kind of token."""

    model: Any  # LlamaForCausalLM
    prompts: Prompts
    layers: dict[str, Lora]
    places: nn.Parameter  # cells, then sound: [5, width]
    step: int = 0
    running: dict[str, float] = field(default_factory=dict)

    @classmethod
    def create(cls, model: Any, prompts: Prompts, *, seed: int, rank: int = RANK, alpha: float = ALPHA) -> "Trainee":
        """Replace the projections of the model by adapted ones."""
        torch.manual_seed(seed)
        model.requires_grad_(False)
        layers = {}
        for number, layer in enumerate(model.model.layers):
            for name in TARGETS:
                parent = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
                layers[f"{number}.{name}"] = Lora(getattr(parent, name), rank, alpha)
                setattr(parent, name, layers[f"{number}.{name}"])
        places = nn.Parameter(torch.zeros(CORNERS + 1, model.config.hidden_size))
        return cls(model=model, prompts=prompts, layers=layers, places=places)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.places, *(each for layer in self.layers.values() for each in (layer.a, layer.b))]

    def tensors(self) -> dict[str, Tensor]:
        """What is learned, by name."""
        found = {f"lora.{name}.{part}": getattr(layer, part) for name, layer in self.layers.items() for part in "ab"}
        return {"places": self.places, **found}


@final
@dataclass(frozen=True, kw_only=True)
class Batch:
    """Streams and their packed questions."""

    streams: Float[Tensor, "batch tokens width"]
    ids: Tensor  # batch asked
    blocks: Tensor  # batch asked: number of the question; -1 for padding
    offsets: Tensor  # batch asked: position within the question
    targets: Tensor  # batch asked
    kinds: Tensor  # batch asked: index into KINDS where the answer is predicted, else IGNORED


def make_batch(trainee: Trainee, bank: StreamBank, stage: Stage, step: int, seed: int) -> Batch:
    """A function of the seed and the step."""
    # 1. the worlds and their streams
    rng = np.random.default_rng([seed, step, 17])
    options = PictureOptions(lengths=stage.lengths, pair_questions=stage.pairs, kind_questions=3)
    worlds = []
    while len(worlds) < stage.streams:
        world = draw_pictures(int(rng.integers(2**40)), stage.seconds, "adapter", options)
        if world.questions:
            worlds.append(world)
    streams = torch.stack([bank.stream(world, rng) for world in worlds])
    # 2. the questions
    rows = [list(_columns(trainee.prompts, world, rng)) for world in worlds]
    width = max(map(len, rows))
    padding = (trainee.prompts.stop, -1, 0, IGNORED, IGNORED)
    table = torch.tensor([row + [padding] * (width - len(row)) for row in rows])
    ids, blocks, offsets, targets, kinds = table.unbind(-1)
    return Batch(streams=streams, ids=ids, blocks=blocks, offsets=offsets, targets=targets, kinds=kinds)


def _columns(
    prompts: Prompts, world: PictureWorld, rng: np.random.Generator
) -> Iterator[tuple[int, int, int, int, int]]:
    """id, question, offset, target and kind of each token of the packed questions; targets: the answer and the end."""
    for number, question in enumerate(world.questions):
        short = rng.random() < SHORT_SHARE
        text = SHORT[direction_of(question)].format(key=question.key)
        asked = prompts.text.ids(text) if short else prompts.question(question.text)
        answer = prompts.answer(question.answer)
        tokens = [*asked, *answer, *([] if short else [prompts.stop])]
        ids, targets = tokens[:-1], [*[IGNORED] * (len(asked) - 1), *tokens[len(asked) :]]
        kind = KINDS.index(question.kind)
        for offset, (token, target) in enumerate(zip(ids, targets, strict=True)):
            yield token, number, offset, target, kind if offset == len(asked) - 1 else IGNORED


def run_batch(trainee: Trainee, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Loss of the answers, and the share of right answers by kind."""
    # 1. embeddings: opening, stream with its learned vectors, questions
    model, table = trainee.model, trainee.model.get_input_embeddings()
    count, tokens = batch.streams.shape[:2]
    opening = table(torch.tensor(trainee.prompts.opening())).expand(count, -1, -1)
    pattern = torch.tensor([*range(CORNERS), *[CORNERS] * STEP]).repeat(tokens // (CORNERS + STEP))
    stream = (batch.streams + trainee.places[pattern]).to(table.weight.dtype)
    inputs = torch.cat([opening, stream, table(batch.ids)], dim=1)
    # 2. positions and mask
    before = opening.shape[1] + tokens
    positions = torch.cat([torch.arange(before).expand(count, -1), before + batch.offsets], dim=1)
    blocks = torch.cat([torch.full((count, before), -2), batch.blocks], dim=1)
    visible = (blocks[:, None, :] == -2) | (blocks[:, None, :] == blocks[:, :, None])
    visible = visible.tril()[:, None]
    mask = torch.zeros(visible.shape, dtype=inputs.dtype).masked_fill(~visible, float("-inf"))
    # 3. the model, and its head on the rows that predict something
    hidden = model.model(inputs_embeds=inputs, position_ids=positions, attention_mask=mask, use_cache=False)
    rows = batch.targets != IGNORED
    logits = (hidden.last_hidden_state[:, before:][rows] @ table.weight.T).float()
    targets, kinds = batch.targets[rows], batch.kinds[rows]
    right = logits.argmax(-1) == targets
    shares = {kind: right[kinds == i].float().mean().item() for i, kind in enumerate(KINDS) if (kinds == i).any()}
    answers = kinds != IGNORED
    loss = cross_entropy(logits[answers], targets[answers])
    if not answers.all():
        loss = loss + 0.1 * cross_entropy(logits[~answers], targets[~answers])
    return loss, shares


# ------------------------------------------------------------------------------------------------------------- training


def stage_at(step: int, stages: Sequence[Stage] = STAGES) -> tuple[Stage, float] | None:
    """The stage of a step and its learning rate; None after the last."""
    first = 0
    for stage in stages:
        if step < first + stage.steps:
            part = (step - first) / stage.steps
            rate = stage.rate + (stage.last - stage.rate) * part
            return stage, rate * min(1.0, (step + 1) / WARM_UP)
        first += stage.steps
    return None


def train(
    trainee: Trainee, bank: StreamBank, checkpoint: Path, *, seed: int, stages: Sequence[Stage] = STAGES
) -> Iterator[dict[str, Any]]:
    """Take the remaining steps; yields a record per step. A checkpoint is written every SAVE_EVERY steps."""
    optimizer = torch.optim.AdamW(trainee.parameters, betas=(0.9, 0.98), weight_decay=0.0)
    if checkpoint.is_file():
        _restore(trainee, optimizer, checkpoint)
    while (found := stage_at(trainee.step, stages)) is not None:
        stage, rate = found
        # 1. a step
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, shares = run_batch(trainee, make_batch(trainee, bank, stage, trainee.step, seed))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trainee.parameters, 1.0)
        optimizer.step()
        trainee.step += 1
        # 2. record, save
        for kind, share in shares.items():
            trainee.running[kind] = trainee.running.get(kind, 0.0) * 0.9 + 0.1 * share
        if trainee.step % SAVE_EVERY == 0 or stage_at(trainee.step, stages) is None:
            _save(trainee, optimizer, checkpoint)
        yield {"step": trainee.step, "seconds": stage.seconds, "rate": rate, "loss": loss.item(), **trainee.running}


def _save(trainee: Trainee, optimizer: torch.optim.Optimizer, path: Path) -> None:
    part = path.with_suffix(f".{os.getpid()}.part")
    state = {"step": trainee.step, "running": trainee.running, "optimizer": optimizer.state_dict()}
    torch.save({**state, "tensors": {name: each.detach() for name, each in trainee.tensors().items()}}, part)
    part.replace(path)


def _restore(trainee: Trainee, optimizer: torch.optim.Optimizer, path: Path) -> None:
    state = torch.load(path, weights_only=True)
    trainee.step, trainee.running = state["step"], state["running"]
    optimizer.load_state_dict(state["optimizer"])
    with torch.no_grad():
        for name, each in trainee.tensors().items():
            each.copy_(state["tensors"][name])
