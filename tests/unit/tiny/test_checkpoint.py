"""The embedded tiny checkpoint: what it weighs, that transformers loads it, that it recalls, and how it was trained."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.paths import ROOT
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker

from omnimem.commands.pretrain_tiny import CHAT, RECALL, Trainee, create, make_batch, perceive, run_pass, train_recall
from omnimem.media import patchify
from omnimem.recall.worlds import KINDS, World, WorldOptions, draw_world
from omnimem.tiny.batches import ANSWER_PROMPT, attention_mask, pack_questions, stream_layout
from omnimem.tiny.progress import Progress
from omnimem.tiny.towers import GEOMETRY, Clip, render_clips

FOLDER = ROOT / "configs" / "models" / "tiny"
TOKENIZER = AutoTokenizer.from_pretrained(FOLDER)
WORLD = draw_world(10_000_001, 16, WorldOptions(spoken_share=1.0))


@pytest.fixture(scope="module")
def model() -> Thinker:
    return Thinker.from_pretrained(FOLDER).eval().requires_grad_(False)


@pytest.fixture
def trainee(model: Thinker, tmp_path: Path) -> Trainee:
    return replace(create(0, tmp_path), model=model, tokenizer=TOKENIZER)


def test_a_question_sees_the_stream_and_itself_alone() -> None:
    questions = pack_questions(TOKENIZER, [WORLD.questions[:3]], "chat")
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


def whole_model_logits(model: Thinker, world: World, clip: Clip, text: str) -> Tensor:
    """Logits after the prompt of one question, by the stock forward of transformers alone."""
    shape = {"patch": GEOMETRY.patch, "merge": GEOMETRY.merge, "temporal_patch": GEOMETRY.temporal_patch}
    patches, grid = patchify(clip.frames, mean=GEOMETRY.mean, std=GEOMETRY.std, **shape)
    stream = stream_layout(model, TOKENIZER, world.seconds).ids
    ids = torch.cat([stream, torch.tensor(TOKENIZER(text + ANSWER_PROMPT).input_ids)])[None]
    return model(
        input_ids=ids,
        pixel_values_videos=patches,
        video_grid_thw=torch.tensor([grid]),
        video_second_per_grid=torch.tensor([2.0]),
        input_features=clip.mel[None],
        feature_attention_mask=torch.ones(1, clip.mel.shape[1], dtype=torch.long),
        attention_mask=torch.ones_like(ids),
        use_audio_in_video=True,
    ).logits[0, -1]


def test_questions_packed_in_one_pass_are_answered_as_if_asked_alone(model, trainee) -> None:
    clips = render_clips([WORLD])
    stage = replace(CHAT[-1], seconds=WORLD.seconds, batch=1)
    layout = stream_layout(model, TOKENIZER, WORLD.seconds)
    batch = make_batch(trainee, stage, layout, [WORLD], perceive(trainee, clips), np.random.default_rng(0))
    packed = run_pass(trainee, *batch).correct
    alone: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for question in WORLD.questions:
        logits = whole_model_logits(model, WORLD, clips[0], question.text)
        alone[question.kind].append(int(logits.argmax()) == TOKENIZER.convert_tokens_to_ids(question.answer))
    assert {kind: marks.tolist() for kind, marks in packed.items()} == alone
    assert sum(map(sum, alone.values())) >= len(WORLD.questions) - 1


def test_it_recalls_streams_it_never_saw(trainee, model) -> None:
    worlds = [draw_world(20_000_000 + seed, 64) for seed in range(6)]
    stage = replace(CHAT[-1], batch=len(worlds), questions=100)
    layout = stream_layout(model, trainee.tokenizer, 64)
    clips = perceive(trainee, render_clips(worlds))
    batch = make_batch(trainee, stage, layout, worlds, clips, np.random.default_rng(0))
    for kind, marks in run_pass(trainee, *batch).correct.items():
        assert len(marks) > 20
        assert marks.float().mean() >= 0.9, kind


def test_the_recipe_repeats_bit_for_bit(tmp_path) -> None:
    short = replace(RECALL[0], steps=2, batch=4)
    trained = []
    for run in ("a", "b"):
        trainee = create(7, tmp_path / run)
        progress = Progress(tmp_path / run, nn.ModuleList([trainee.model, trainee.namers]), 7)
        train_recall(trainee, (short,), progress)
        trained.append(trainee.model.state_dict())
    other = create(8, tmp_path / "c").model.state_dict()
    assert all(trained[0][name].equal(trained[1][name]) for name in other)
    assert not all(trained[0][name].equal(other[name]) for name in other)
