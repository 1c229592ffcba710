"""The recipe of the assembled base: ridge by its definition, streams in the backbone's layout, packed questions."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.assembled import text_part
from torch import Tensor

from omnimem.assembly import adapter
from omnimem.assembly import bank as bank_module
from omnimem.assembly.adapter import Stage, StreamBank, Trainee, make_batch, run_batch, stage_at, train
from omnimem.assembly.bank import PARTS, Features, bank_world
from omnimem.assembly.projectors import (
    HEARD,
    SHOWN,
    Rows,
    cell_labels,
    fit_ridge,
    recognition,
    rows_of,
    second_labels,
    word_rows,
)
from omnimem.backbones import assembled
from omnimem.backbones.assembled import Bridge, Encoded, Prompts
from omnimem.backbones.prompt_text import PromptText
from omnimem.checksums import damage
from omnimem.commands.assemble import write_folder as save_base
from omnimem.recall.pictures import NAMES, STEP, WORDS, draw_pictures

WIDTH = 32
STAGES = (
    Stage(seconds=6, streams=2, steps=2, rate=1e-2, last=1e-2),
    Stage(seconds=12, streams=1, steps=2, rate=1e-2, last=0),
)


@pytest.fixture
def bridge() -> Bridge:
    torch.manual_seed(0)
    return Bridge(visual=6, audio=5, width=WIDTH, norm=2.0).requires_grad_(False)


@pytest.fixture
def bank(bridge) -> StreamBank:
    """Every name once, with random features."""
    torch.manual_seed(1)
    found = StreamBank(
        scenes={name: [torch.randn(3, 4, WIDTH)] for name in (None, *NAMES)},
        words={word: [torch.randn(WIDTH)] for word in WORDS},
        noises={name: [torch.randn(WIDTH)] for name in HEARD[len(WORDS) :]},
    )
    return found


@pytest.fixture
def trainee() -> Trainee:
    text, tokenizer = text_part()
    return Trainee.create(text, Prompts(PromptText(tokenizer)), seed=0, rank=2, alpha=4.0)


# ---------------------------------------------------------------------------------------------------------- projectors


def test_ridge_is_at_the_minimum_of_its_definition() -> None:
    torch.manual_seed(0)
    features, targets = torch.randn(60, 5).double() * 3 + 1, torch.randn(60, 4).double()
    layer = fit_ridge(features.float(), targets.float(), penalty=0.3)
    mean, scale = features.mean(0), features.std(0)
    inputs = (features - mean) / scale
    weight = (layer.weight.double() * scale).requires_grad_(True)
    bias = (layer.bias.double() + layer.weight.double() @ mean).requires_grad_(True)
    loss = (inputs @ weight.T + bias - targets).square().sum() + 0.3 * 60 * weight.square().sum()
    for gradient in torch.autograd.grad(loss, (weight, bias)):
        assert gradient.abs().max() < 1e-3


def test_a_constant_feature_does_no_harm() -> None:
    features = torch.randn(30, 3)
    features[:, 1] = 7.0
    assert torch.isfinite(fit_ridge(features, torch.randn(30, 2))(features)).all()


def test_labels_name_what_the_scene_shows_and_says() -> None:
    world = draw_pictures(5, 64, "fit")
    cells, seconds = cell_labels(world), second_labels(world)
    assert cells.shape == (32, 4)
    assert seconds.shape == (64,)
    for scene in world.scenes:
        for step in range(scene.start // STEP, (scene.start + scene.seconds) // STEP):
            names = [SHOWN[index] for index in cells[step]]
            assert names.count(scene.texture) == (4 if scene.picture is None else 3)
            assert scene.picture is None or names[scene.corner] == scene.picture
        spoken = {word.at: word.text for word in scene.words}
        for second in range(scene.start, scene.start + scene.seconds):
            assert HEARD[seconds[second]] == spoken.get(second, scene.noise)


def test_recognition_counts_named_and_empty_rows_apart() -> None:
    table = torch.eye(4)
    layer = torch.nn.Linear(4, 4, bias=False)
    layer.weight.data = torch.eye(4)
    rows = Rows(features=table[[0, 1, 0, 2, 3, 3]], labels=torch.tensor([0, 1, 1, 2, 3, 2]))
    found = recognition(layer, rows, table, named=2)
    assert (found.named, found.empty) == pytest.approx((2 / 3, 2 / 3))


def test_rows_leave_out_worlds_without_the_track() -> None:
    world = bank_world(PARTS[0], 0)
    seen = Features(world=world, visual=torch.zeros(33, 4, 6), audio=None)
    heard = Features(world=world, visual=None, audio=torch.zeros(66, 5))
    assert rows_of([seen, heard], "visual").features.shape == (132, 6)
    assert rows_of([seen, heard], "audio").labels.tolist() == second_labels(world).tolist()


def test_a_word_of_several_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="word 1 has 2 tokens"):
        word_rows(torch.eye(4), [[0], [1, 2]])


def test_the_adapters_media_show_and_say_every_name() -> None:
    worlds = [bank_world(part, n) for part in PARTS if part.media == "adapter" for n in range(part.count)]
    assert {scene.picture for world in worlds for scene in world.scenes} == {None, *NAMES}
    heard = [bank_world(part, n) for part in PARTS if part.name == "adapter" for n in range(part.count)]
    assert {word.text for world in heard for scene in world.scenes for word in scene.words} == set(WORDS)


def test_files_of_the_bank_are_complete_and_as_readable_as_others(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(bank_module, "encode", lambda *_: {"visual": torch.ones(2, 3, 6)})
    before = os.umask(0o022)
    try:
        (features,) = bank_module.build(None, tmp_path, replace(PARTS[0], count=1))
    finally:
        os.umask(before)
    assert (features.visual.shape, features.audio) == ((2, 3, 6), None)
    assert [(path.suffix, path.stat().st_mode & 0o777) for path in tmp_path.iterdir()] == [(".safetensors", 0o644)]


def test_parts_share_no_world_and_projectors_see_other_media_than_the_adapter() -> None:
    seeds = [bank_world(part, n).seed for part in PARTS for n in range(part.count)]
    assert len(set(seeds)) == len(seeds)
    assert {part.media for part in PARTS} == {"fit", "adapter"}


# -------------------------------------------------------------------------------------------------------------- streams


def test_a_stream_has_the_layout_of_the_backbone(bank, trainee) -> None:
    world = draw_pictures(2, 12, "adapter")
    stream = bank.stream(world, np.random.default_rng(0))
    tokens = stream.view(-1, 6, WIDTH)
    step = 0
    for scene in world.scenes:
        spoken = {word.at: word.text for word in scene.words}
        for within in range(scene.seconds // STEP):
            assert torch.equal(tokens[step, :4], bank.scenes[scene.picture][0][min(within, 2)])
            for offset in range(STEP):
                second = STEP * step + offset
                source = bank.words[spoken[second]] if second in spoken else bank.noises[scene.noise]
                assert torch.equal(tokens[step, 4 + offset], source[0])
            step += 1


def _one_shot(trainee: Trainee, stream: Tensor, ids: list[int]) -> Tensor:
    """Logits after one stream and one question, without packing."""
    table = trainee.model.get_input_embeddings()
    places = trainee.places[torch.tensor([0, 1, 2, 3, 4, 4]).repeat(len(stream) // 6)]
    opening, asked = table(torch.tensor(trainee.prompts.opening())), table(torch.tensor(ids))
    return trainee.model(inputs_embeds=torch.cat([opening, stream + places, asked])[None]).logits[0, -1]


def test_packed_questions_get_the_loss_of_single_ones(bank, trainee, monkeypatch) -> None:
    monkeypatch.setattr(adapter, "SHORT_SHARE", 0.5)
    for layer in trainee.layers.values():
        torch.nn.init.normal_(layer.b, std=0.1)
    torch.nn.init.normal_(trainee.places)
    batch = make_batch(trainee, bank, STAGES[0], step=0, seed=3)
    answers = batch.kinds != adapter.IGNORED
    losses, ends = [], []
    for row in range(2):
        for block in range(int(batch.blocks[row].max()) + 1):
            inside = batch.blocks[row] == block
            ids, targets = batch.ids[row][inside], batch.targets[row][inside]
            for place in (targets != adapter.IGNORED).nonzero()[:, 0].tolist():
                logits = _one_shot(trainee, batch.streams[row], ids[: place + 1].tolist())
                loss = torch.nn.functional.cross_entropy(logits, targets[place]).item()
                (losses if answers[row][inside][place] else ends).append(loss)
    loss, _ = run_batch(trainee, batch)
    assert loss.item() == pytest.approx(np.mean(losses) + 0.1 * np.mean(ends), rel=1e-3)


# ------------------------------------------------------------------------------------------------------------- training


def test_an_interrupted_training_continues_to_the_same_weights(bank, tmp_path, monkeypatch) -> None:
    def trained(path, *, stop_at: int | None = None) -> dict[str, Tensor]:
        text, tokenizer = text_part()
        one = Trainee.create(text, Prompts(PromptText(tokenizer)), seed=0, rank=2, alpha=4.0)
        for record in train(one, bank, path, seed=1, stages=STAGES):
            if record["step"] == stop_at:
                break
        return {name: each.detach().clone() for name, each in one.tensors().items()}

    monkeypatch.setattr(adapter, "SAVE_EVERY", 2)
    whole = trained(tmp_path / "whole.pt")
    trained(tmp_path / "parts.pt", stop_at=3)
    continued = trained(tmp_path / "parts.pt")
    assert all(torch.equal(whole[name], continued[name]) for name in whole)
    assert any(bool(each.any()) for name, each in whole.items() if name.endswith(".b"))


def test_the_rate_rises_and_falls_as_the_stages_say() -> None:
    found = [stage_at(step, STAGES) for step in range(5)]
    assert found[4] is None
    rates = [each[1] for each in found[:4] if each is not None]
    assert rates == pytest.approx([1e-2 * (n + 1) / adapter.WARM_UP for n in range(3)] + [5e-3 * 4 / adapter.WARM_UP])


def test_the_folder_gives_the_model_that_was_trained(bank, trainee, bridge, tmp_path, monkeypatch) -> None:
    loaders = {"text": lambda dtype: text_part(), "vision": torch.nn.Identity, "audio": _audio}
    packages = {kind: f"small-{kind}" for kind in loaders}
    monkeypatch.setattr("omnimem.commands.assemble.PACKAGES", packages)
    monkeypatch.setattr(assembled, "LOADERS", {kind: {packages[kind]: load} for kind, load in loaders.items()})
    monkeypatch.setattr("omnimem.commands.assemble.RANK", 2)
    monkeypatch.setattr("omnimem.commands.assemble.ALPHA", 4.0)
    with torch.no_grad():
        for each in trainee.tensors().values():
            each.copy_((0.1 * torch.randn(each.shape)).bfloat16())
    (tmp_path / "base" / "work").mkdir(parents=True)
    (tmp_path / "base" / "work" / "adapter.pt").touch()  # grows while the recipe goes on
    save_base(tmp_path / "base", bridge, trainee)
    (tmp_path / "base" / "work" / "adapter.pt").write_bytes(b"1")
    assert damage(tmp_path / "base") is None
    loaded = assembled.Assembled.load(assembled.ModelOptions(path=str(tmp_path / "base")))
    stream = bank.stream(draw_pictures(2, 12, "adapter"), np.random.default_rng(0))
    ids = loaded.prompts.question("Which food was shown?")
    segments = [_encoded(loaded, part, number) for number, part in enumerate(stream.view(-1, 6, WIDTH))]
    chunks = list(loaded.chunks(segments, tracks="both", chunk_tokens=100))
    asked = loaded.text_model.get_input_embeddings()(torch.tensor([ids]))
    inputs = torch.cat([*(chunk.embeddings for chunk in chunks), asked], dim=1)
    with torch.no_grad():
        got = loaded.head(loaded.text_model(inputs_embeds=inputs).last_hidden_state)[0, -1]
        assert torch.allclose(got, _one_shot(trainee, stream, ids), atol=1e-4)


def _audio() -> torch.nn.Module:
    module = torch.nn.Module()
    module.conv1 = torch.nn.Conv1d(8, 4, 3)
    return module


def _encoded(loaded: assembled.Assembled, tokens: Tensor, number: int) -> Encoded:
    places = loaded.model.bridge.places
    return Encoded(
        visual=(tokens[:4] + places[:4])[None],
        audio=(tokens[4:] + places[4])[None],
        grid=(1, 2, 2),
        start=2.0 * number,
        seconds=2.0,
        seconds_per_grid=2.0,
    )
