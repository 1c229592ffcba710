"""The embedded tiny bases: what they weigh, that they load and recall, what the deepstack is for, their recipe."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from support.paths import ROOT
from torch import Tensor, nn

from omnimem.backbones import ModelOptions, load_backbone
from omnimem.budget import Budget
from omnimem.checksums import damage, is_sealed
from omnimem.commands.pretrain_tiny import (
    BASES,
    CHAT,
    RECALL,
    Trainee,
    create,
    make_batch,
    perceive,
    run_pass,
    train_recall,
)
from omnimem.media import LiveSource, SourceOptions, patchify
from omnimem.policies import PerturbationOptions
from omnimem.recall.renderer import render_audio, render_frames
from omnimem.recall.worlds import KINDS, World, WorldOptions, draw_world
from omnimem.streaming.attach import attach
from omnimem.streaming.feeder import Feeder
from omnimem.streaming.options import StreamOptions
from omnimem.tiny.batches import ANSWER_PROMPT, attention_mask, pack_questions
from omnimem.tiny.progress import Progress
from omnimem.tiny.towers import Clip, render_clips

MODELS = ROOT / "configs" / "models"
WORLD = draw_world(10_000_001, 16, WorldOptions(spoken_share=1.0))
UNSEEN = tuple(draw_world(20_000_000 + seed, 64) for seed in range(6))


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trainee]:
    """A base that is shipped, as at the end of its training."""

    @cache
    def load(name: str) -> Trainee:
        loaded = load_backbone(ModelOptions(path=str(MODELS / name)), "cpu")
        trainee = create(name, 0, tmp_path_factory.mktemp(name))
        trainee.base.model.load_state_dict(loaded.model.state_dict())
        trainee.base.model.eval().requires_grad_(False)
        return trainee

    return load


def answers(trainee: Trainee, worlds: Sequence[World], features: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    stage = replace(CHAT[-1], seconds=worlds[0].seconds, batch=len(worlds), questions=100)
    layout = trainee.base.layout(stage.seconds)
    return run_pass(
        trainee, *make_batch(trainee, stage, layout, list(worlds), features, np.random.default_rng(0))
    ).correct


def test_a_question_sees_the_stream_and_itself_alone(shipped) -> None:
    questions = pack_questions(shipped("tiny").base, [WORLD.questions[:3]], "chat")
    length = questions.block_tokens
    visible = attention_mask(5, questions)[0, 0] == 0
    assert visible[:5, :5].equal(torch.ones(5, 5).tril().bool())
    assert not visible[:5, 5:].any()
    for block in range(3):
        rows = visible[5 + block * length : 5 + (block + 1) * length]
        assert rows[:, :5].all()
        own = rows[:, 5 + block * length : 5 + (block + 1) * length]
        assert own.equal(torch.ones(length, length).tril().bool())
        assert rows.sum() == 5 * length + own.sum()


def whole_model_logits(trainee: Trainee, world: World, clip: Clip, text: str) -> Tensor:
    """Logits of Qwen2.5-Omni after the prompt of one question, by the stock forward of transformers alone."""
    base, at = trainee.base, trainee.base.geometry
    shape = {"patch": at.patch, "merge": at.merge, "temporal_patch": at.temporal_patch}
    patches, grid = patchify(clip.frames, mean=at.mean, std=at.std, **shape)
    ids = torch.cat([base.layout(world.seconds).ids, torch.tensor(base.tokenizer(text + ANSWER_PROMPT).input_ids)])[
        None
    ]
    return base.model(
        input_ids=ids,
        pixel_values_videos=patches,
        video_grid_thw=torch.tensor([grid]),
        video_second_per_grid=torch.tensor([2.0]),
        input_features=clip.mel[None],
        feature_attention_mask=torch.ones(1, clip.mel.shape[1], dtype=torch.long),
        attention_mask=torch.ones_like(ids),
        use_audio_in_video=True,
    ).logits[0, -1]


def test_questions_packed_in_one_pass_are_answered_as_if_asked_alone(shipped) -> None:
    trainee = shipped("tiny")
    clips = render_clips([WORLD], trainee.base.geometry)
    alone: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for question in WORLD.questions:
        logits = whole_model_logits(trainee, WORLD, clips[0], question.text)
        alone[question.kind].append(int(logits.argmax()) == trainee.base.id(question.answer))
    packed = answers(trainee, [WORLD], perceive(trainee, clips))
    assert {kind: marks.tolist() for kind, marks in packed.items()} == alone
    assert sum(map(sum, alone.values())) >= len(WORLD.questions) - 1


@pytest.mark.parametrize("name", BASES)
def test_a_stream_gives_the_answers_of_the_pass_in_training(shipped, name) -> None:
    trainee, backbone = shipped(name), load_backbone(ModelOptions(path=str(MODELS / name)), "cpu")
    source = LiveSource(
        ((float(at), torch.from_numpy(frame)) for at, frame in enumerate(render_frames(WORLD))),
        iter([torch.from_numpy(render_audio(WORLD))]),
        options=SourceOptions(max_pixels=112 * 112),
        geometry=backbone.geometry,
    )
    feeder = Feeder(backbone, StreamOptions(chunk_tokens=120))
    with attach(backbone.text_model) as attached, torch.no_grad():
        stream = feeder.stream(attached, PerturbationOptions().build(Budget.full(6)))
        for chunk in feeder.watch(source):
            stream.feed(chunk)
        said = feeder.answers(stream, [question.text for question in WORLD.questions], max_new_tokens=4)
    alone: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for question, answer in zip(WORLD.questions, said, strict=True):
        alone[question.kind].append(answer.strip() == question.answer)
    packed = answers(trainee, [WORLD], perceive(trainee, render_clips([WORLD], backbone.geometry)))
    assert {kind: marks.tolist() for kind, marks in packed.items()} == alone


@pytest.mark.parametrize("name", BASES)
def test_it_recalls_streams_it_never_saw(shipped, name) -> None:
    trainee = shipped(name)
    for kind, marks in answers(trainee, UNSEEN, seen(trainee, UNSEEN)).items():
        assert len(marks) > 20
        assert marks.float().mean() >= 0.9, kind


@cache
def seen(trainee: Trainee, worlds: tuple[World, ...]) -> tuple[Tensor, Tensor]:
    return perceive(trainee, render_clips(worlds, trainee.base.geometry))


def test_colours_are_in_the_deepstack_alone(shipped) -> None:
    trainee = shipped("tiny_salmonn")
    visual, audio = seen(trainee, UNSEEN)
    blank = torch.stack([visual[0], torch.zeros_like(visual[1])])
    marks = {kind: right.float().mean().item() for kind, right in answers(trainee, UNSEEN, (blank, audio)).items()}
    assert marks["visual"] < 0.3  # one of eight colours by chance
    assert min(marks["auditory"], marks["cross_modal"]) >= 0.9


@pytest.mark.parametrize("name", BASES)
def test_the_folder_is_whole_and_small(shipped, name) -> None:
    assert sum(weight.numel() for weight in shipped(name).base.model.parameters()) <= 900_000
    if name != "tiny":  # it was made before folders were sealed
        assert is_sealed(MODELS / name)
        assert damage(MODELS / name) is None


@pytest.mark.parametrize("name", BASES)
def test_the_recipe_repeats_bit_for_bit(tmp_path, name) -> None:
    short = replace(RECALL[0], steps=2, batch=4)
    trained = []
    for run in ("a", "b"):
        trainee = create(name, 7, tmp_path / run)
        progress = Progress(tmp_path / run, nn.ModuleList([trainee.base.model, trainee.namers]), 7)
        train_recall(trainee, (short,), progress)
        trained.append(trainee.base.model.state_dict())
    other = create(name, 8, tmp_path / "c").base.model.state_dict()
    assert all(trained[0][key].equal(trained[1][key]) for key in other)
    assert not all(trained[0][key].equal(other[key]) for key in other)
