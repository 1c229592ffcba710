"""Train a tiny base that is shipped on audio-visual recall.

omnimem pretrain-tiny [--base tiny|tiny_salmonn] --seed 0 --out DIR

`tiny` is a Qwen2.5-Omni thinker, `tiny_salmonn` a video-SALMONN 2+, where questions about colours need the deepstack.

Training the towers and the text model together fails (the towers collapse before cross-modal recall is learned), so:
1. the text model learns recall in embedding space, where a symbol is the sum of two word embeddings;
2. the same with the chat template around the question;
3. the towers learn to output those sums from frames and audio samples;
4. the text model is fine-tuned on the towers' outputs, half of them after H.264 and AAC, unless it already answers
   every question of a check; the result is checked.

Weights are saved after every stage: the same command continues a run that was stopped.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from omnimem.checksums import seal
from omnimem.cli.parser import Parser
from omnimem.recall.worlds import CELLS, KINDS, SHAPES, World, WorldOptions
from omnimem.tiny.base import Layout, TinyBase
from omnimem.tiny.batches import (
    IGNORE,
    Concepts,
    Questions,
    Streams,
    Style,
    assemble,
    attention_mask,
    choose_cells,
    imagine,
    pack_questions,
)
from omnimem.tiny.omni import OmniBase
from omnimem.tiny.progress import Progress
from omnimem.tiny.salmonn import SalmonnBase
from omnimem.tiny.towers import TOWER_STAGES, Clip, decode_clips, fit_towers, fresh_worlds, render_clips


@final
@dataclass(frozen=True, kw_only=True)
class Stage:
    """Steps with the same settings; ends early when the accuracy of every kind of question passes `goal`."""

    name: str
    seconds: int = 64
    batch: int
    steps: int
    learning_rate: float = 2e-3
    final_rate: float = 2e-3
    goal: float = 2.0  # running accuracy; above 1: never ends early
    cells: int = CELLS  # visual tokens per grid
    style: Style = "key_last"
    spoken_share: float = 1.0
    questions: int = 24  # at most, per stream
    name_silent: bool = True  # the auxiliary target names the shape at every second, else only at words
    warm_up: int = 0
    real: bool = False  # features of the towers instead of imagined ones


RECALL: tuple[Stage, ...] = (
    Stage(name="4s", seconds=4, batch=64, steps=80, cells=4, warm_up=100),
    Stage(name="8s", seconds=8, batch=64, steps=400, cells=4, goal=0.9),
    Stage(name="16s", seconds=16, batch=32, steps=100, cells=4, goal=0.9),
    Stage(name="32s", seconds=32, batch=16, steps=60, goal=0.9),
    Stage(name="64s", batch=16, steps=100, final_rate=5e-4, goal=0.98, spoken_share=0.45, name_silent=False),
)
_CHAT = Stage(
    name="chat-64s",
    batch=16,
    steps=90,
    learning_rate=1e-3,
    final_rate=1e-4,
    style="chat",
    spoken_share=0.45,
    name_silent=False,
)
_SHORT = replace(_CHAT, final_rate=1e-3, cells=4, spoken_share=1.0, name_silent=True)
CHAT: tuple[Stage, ...] = (
    replace(_SHORT, name="chat-8s", seconds=8, batch=64, steps=40, warm_up=20),
    replace(_SHORT, name="chat-16s", seconds=16, batch=32, steps=32),
    _CHAT,
)
REAL = replace(_CHAT, name="files-64s", batch=8, steps=40, learning_rate=2e-4, final_rate=2e-5, warm_up=10, real=True)

BASES: dict[str, type[TinyBase]] = {"tiny": OmniBase, "tiny_salmonn": SalmonnBase}
CHECKED = "towers checked"  # the name of that stage in progress.pt


class Log:
    """One line per record, on stdout and in log.jsonl."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "log.jsonl"
        self._start = time.monotonic()

    def clear(self) -> None:
        """Start an empty log.jsonl."""
        self._path.write_text("", encoding="utf-8")

    def write(self, **record: object) -> None:
        """Write a record with the seconds since the start; numbers are rounded."""
        record["wall"] = round(time.monotonic() - self._start, 1)
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in record.items()})
        print(line, flush=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


@final
@dataclass(frozen=True, kw_only=True)
class Trainee:
    """The model in training and its auxiliary parts."""

    seed: int
    base: TinyBase
    concepts: Concepts
    namers: nn.ModuleList  # auxiliary heads on the last two layers: the shape on screen
    log: Log


def draw_worlds(rng: np.random.Generator, stage: Stage) -> list[World]:
    """New worlds; if every symbol is spoken about, every slot has an event."""
    options = WorldOptions(event_rate=1.0 if stage.spoken_share == 1.0 else 0.8, spoken_share=stage.spoken_share)
    return fresh_worlds(rng, stage.batch, stage.seconds, options)


def batches(trainee: Trainee, stage: Stage) -> Iterator[tuple[Streams, Questions]]:
    """Batches; each is a function of the seed, the stage and the step."""
    layout = trainee.base.layout(stage.seconds)
    for step in range(stage.steps):
        rng = np.random.default_rng([trainee.seed, *stage.name.encode(), step])
        worlds = draw_worlds(rng, stage)
        if stage.real:
            half = len(worlds) // 2
            geometry = trainee.base.geometry
            clips = [*render_clips(worlds[:half], geometry), *decode_clips(worlds[half:], geometry)]
            features = perceive(trainee, clips)
        else:
            features = imagine(trainee.concepts, worlds, rng)
        yield make_batch(trainee, stage, layout, worlds, features, rng)


@torch.no_grad()
def perceive(trainee: Trainee, clips: Sequence[Clip]) -> tuple[Tensor, Tensor]:
    """Outputs of the towers, without gradient."""
    frames, mel = [clip.frames for clip in clips], [clip.mel for clip in clips]
    return trainee.base.look(frames), trainee.base.listen(mel)


def make_batch(
    trainee: Trainee,
    stage: Stage,
    layout: Layout,
    worlds: list[World],
    features: tuple[Tensor, Tensor],
    rng: np.random.Generator,
) -> tuple[Streams, Questions]:
    """Streams of `features` and their questions."""
    kept = choose_cells(worlds, stage.cells, rng)
    streams = assemble(layout, worlds, *features, kept, name_silent=stage.name_silent)
    asked = [world.questions[: stage.questions] for world in worlds]
    return streams, pack_questions(trainee.base, asked, stage.style)


@final
@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Losses of one pass, and which answers are correct."""

    answer: Tensor
    key: Tensor
    end: Tensor
    naming: Tensor
    correct: dict[str, Tensor]  # per kind: bool, one per question


def run_pass(trainee: Trainee, streams: Streams, questions: Questions) -> Outcome:
    """The text model over streams and questions, with the head on the question rows only."""
    # 1. embed the streams
    base, (video, audio) = trainee.base, trainee.base.placeholders
    shown = streams.ids == video
    stream = functional.embedding(streams.ids, base.table)
    stream = stream.masked_scatter(shown[..., None], streams.visual[0])
    stream = stream.masked_scatter((streams.ids == audio)[..., None], streams.audio)
    # 2. append the questions, all at the same positions
    batch, tokens = streams.ids.shape
    block = torch.arange(questions.block_tokens).repeat(questions.blocks) + streams.next_position
    positions = torch.cat([streams.positions, block.expand(3, batch, -1)], dim=2)
    asked = questions.ids.flatten(1)
    deeper = [level.flatten(0, 1) for level in streams.visual[1:]]
    where = torch.cat([shown, torch.zeros_like(asked, dtype=torch.bool)], dim=1)
    hidden = base.text(
        inputs_embeds=torch.cat([stream, functional.embedding(asked, base.table)], dim=1),
        attention_mask=attention_mask(tokens, questions),
        position_ids=positions,
        use_cache=False,
        output_hidden_states=True,
        **({"visual_pos_masks": where, "deepstack_visual_embeds": deeper} if deeper else {}),
    ).hidden_states
    # 3. losses
    logits = base.parts.lm_head(hidden[-1][:, tokens:])
    return Outcome(
        answer=cross_entropy(logits, questions.targets),
        key=cross_entropy(logits, questions.key_targets),
        end=cross_entropy(logits, questions.end_targets),
        naming=naming_loss(trainee, streams, [states[:, :tokens] for states in hidden[-2:]]),
        correct=mark(logits.detach(), questions),
    )


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the targets that are not ignored; 0 if there are none."""
    counts = (targets != IGNORE).flatten()
    if not counts.any():
        return logits.new_zeros(())
    return functional.cross_entropy(logits.flatten(0, 1)[counts], targets.flatten()[counts])


def naming_loss(trainee: Trainee, streams: Streams, states: list[Tensor]) -> Tensor:
    """Auxiliary loss: the shape on screen, predicted at every audio token; without it cross-modal recall plateaus."""
    heard = streams.ids == trainee.base.placeholders[1]
    losses = [
        functional.cross_entropy(head(state[heard]), streams.shown.flatten())
        for head, state in zip(trainee.namers, states, strict=True)
    ]
    return torch.stack(losses).mean()


def mark(logits: Tensor, questions: Questions) -> dict[str, Tensor]:
    """Whether the most likely token is the answer, by kind of question."""
    where = (questions.targets != IGNORE).flatten(1)
    right = logits[where].argmax(-1) == questions.targets.flatten(1)[where]
    kinds = questions.kinds[questions.kinds != IGNORE]
    return {kind: right[kinds == i] for i, kind in enumerate(KINDS)}


def train_recall(trainee: Trainee, stages: tuple[Stage, ...], progress: Progress) -> None:
    """Stages of the text model that are not finished, with one optimizer for all of them."""
    text = [*trainee.base.text.parameters(), *trainee.base.parts.lm_head.parameters()]
    parameters = [*text, *trainee.namers.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01)
    done = progress.continue_optimizer(optimizer, [stage.name for stage in stages])
    for stage in stages:
        if stage.name not in progress.done:
            done += train_stage(trainee, stage, optimizer, parameters, done)
            progress.save(stage.name, optimizer, done)


def train_stage(
    trainee: Trainee, stage: Stage, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], done: int
) -> int:
    """One stage; returns the number of its steps."""
    running: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for step, (streams, questions) in enumerate(batches(trainee, stage)):
        # 1. take a step
        rate = stage.learning_rate + (stage.final_rate - stage.learning_rate) * step / stage.steps
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (done + step + 1) / max(1, stage.warm_up))
        outcome = run_pass(trainee, streams, questions)
        loss = outcome.answer + 0.5 * outcome.key + 0.1 * outcome.end + 0.5 * outcome.naming
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        # 2. log the running accuracies
        for kind, right in outcome.correct.items():
            if len(right):
                running[kind] += 0.15 * (right.float().mean().item() - running[kind])
        if step % 10 == 9 or step == stage.steps - 1:
            trainee.log.write(
                stage=stage.name, step=step + 1, loss=outcome.answer.item(), naming=outcome.naming.item(), **running
            )
        if min(running.values()) > stage.goal:
            trainee.log.write(stage=stage.name, step=step + 1, passed=stage.goal, **running)
            return step + 1
    return stage.steps


@torch.no_grad()
def check(trainee: Trainee, *, seconds: int, streams: int) -> dict[str, dict[str, float]]:
    """Accuracy by kind of question on new streams, straight from the renderer ("direct") and through "mp4" files."""
    layout, geometry = trainee.base.layout(seconds), trainee.base.geometry
    stage = replace(CHAT[-1], name="check", seconds=seconds, batch=8, questions=10**6)
    # 1. answer
    marks: dict[str, list[dict[str, Tensor]]] = {"direct": [], "mp4": []}
    for start in range(0, streams, stage.batch):
        rng = np.random.default_rng([trainee.seed, *b"check", seconds, start])
        worlds = draw_worlds(rng, stage)
        for way, clips in (("direct", render_clips(worlds, geometry)), ("mp4", decode_clips(worlds, geometry))):
            batch = make_batch(trainee, stage, layout, worlds, perceive(trainee, clips), rng)
            marks[way].append(run_pass(trainee, *batch).correct)
    # 2. average and log
    found: dict[str, dict[str, float]] = {}
    for way, parts in marks.items():
        right = {kind: torch.cat([part[kind] for part in parts]).float() for kind in KINDS}
        found[way] = {kind: marked.mean().item() for kind, marked in right.items()}
        questions = sum(len(marked) for marked in right.values())
        trainee.log.write(stage="check", seconds=seconds, way=way, streams=streams, questions=questions, **found[way])
    return found


def create(name: str, seed: int, out: Path) -> Trainee:
    """An untrained base of a name of `BASES`, and its auxiliary parts."""
    base = BASES[name].create(seed)
    width = base.model.config.get_text_config().hidden_size
    namers = nn.ModuleList(nn.Linear(width, len(SHAPES) + 1) for _ in range(2))
    return Trainee(seed=seed, base=base, concepts=Concepts(base), namers=namers, log=Log(out))


def main(arguments: Sequence[str]) -> None:
    """Run the recipe; write the checkpoint with its log and its card."""
    given = _parser().parse(arguments)
    torch.set_num_threads(1)  # at this size a second thread is slower
    trainee = create(given.base, given.seed, given.out)
    base = trainee.base
    progress = Progress(given.out, nn.ModuleList([base.model, trainee.namers]), given.seed)
    if not progress.done:
        trainee.log.clear()
    # 1. and 2. recall in embedding space, without and with the chat template
    train_recall(trainee, RECALL, progress)
    train_recall(trainee, CHAT, progress)
    # 3. the towers; the text model is frozen
    for stage in TOWER_STAGES:
        if stage.name not in progress.done:
            for record in fit_towers(base, trainee.concepts, stage, seed=trainee.seed):
                trainee.log.write(stage=stage.name, **record)
            progress.save(stage.name)
    if CHECKED not in progress.done:
        found = check(trainee, seconds=64, streams=32)
        progress.save(CHECKED)
        if min(min(kinds.values()) for kinds in found.values()) == 1.0:
            progress.save(REAL.name)  # nothing is left to learn from the encoders' mistakes
    # 4. recall from the towers' outputs
    train_recall(trainee, (REAL,), progress)
    # 5. save and report
    base.save(given.out)
    accuracies = {seconds: check(trainee, seconds=seconds, streams=64) for seconds in (64, 32, 128)}
    base.write_card(given.out, seed=given.seed, accuracies=accuracies)
    progress.remove()
    seal(given.out)


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--base", choices=BASES, default="tiny", help="the model (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the checkpoint")
    return parser
