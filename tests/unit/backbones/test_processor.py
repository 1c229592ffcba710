"""Ids, positions, pixels and mel of made files equal those recorded of Qwen2_5OmniProcessor and get_rope_index."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.paths import ROOT
from support.processor_cases import CASES, NATIVE, QUESTION, Case, source, summary, write_case
from support.thinkers import write_folder
from torch import Tensor

from omnimem.backbones import ModelOptions, Turn
from omnimem.backbones.qwen2_5_omni import Qwen25Omni
from omnimem.policies import PerturbationOptions
from omnimem.streaming.attach import attach
from omnimem.streaming.stream import Stream
from omnimem.tokens import Modality

RECORDED = load_file(ROOT / "tests" / "recorded" / "qwen2_5_omni.safetensors")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Qwen25Omni:
    return Qwen25Omni.load(ModelOptions(path=str(write_folder(tmp_path_factory.mktemp("model") / "thinker"))))


def check(name: str, values: Tensor, within: float) -> None:
    for key, found in summary(name, values):
        assert found.shape == RECORDED[key].shape, key
        assert (found - RECORDED[key]).abs().max() <= within, key


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_file_becomes_what_the_stock_processor_makes_of_it(tmp_path, backbone, case: Case) -> None:
    path = write_case(case, Path(tmp_path))
    # 1. ours
    segments = list(source(case, path, backbone.geometry))
    encoded = list(backbone.encode(segments, fps=case.fps))
    opening, *chunks = backbone.chunks(encoded, tracks=case.tracks, chunk_tokens=200)
    asked, offsets, _ = backbone.turn(Turn(text=QUESTION), tracks=case.tracks)
    config = backbone.model.config
    sign = torch.tensor([0, config.audio_token_id, config.video_token_id])
    assert [int(Modality.AUDIO), int(Modality.VISUAL)] == [1, 2]
    streamed = torch.cat([sign[chunk.modality[0].long()] for chunk in chunks])
    with attach(backbone.text_model) as attached, torch.no_grad():
        stream = Stream(attached, PerturbationOptions().build(None))
        for chunk in (opening, *chunks):
            stream.feed(chunk)
    positions = torch.cat([chunk.positions[0] for chunk in (opening, *chunks)], dim=1)
    after = (torch.tensor(offsets) + stream.next_position).expand(3, -1)
    positions = torch.cat([positions, after], dim=1)
    # 2. ids and positions
    ids, expected = RECORDED[f"{case.name}.ids"], RECORDED[f"{case.name}.positions"]
    first, end = opening.count, len(ids) - len(asked)
    assert torch.equal(opening.embeddings[0], backbone.text_model.get_input_embeddings()(ids[:first]))
    ours = torch.cat([ids[:first], streamed, torch.tensor(asked)])
    assert torch.equal(ours[end:], ids[end:])
    assert torch.equal(positions[:, end:], expected[:, end:])
    if case.name.startswith("half_a_frame"):  # the same tokens in another order: ours is that of time
        ours, ids = (torch.cat([table, p])[:, :end] for table, p in ((ours[None], positions), (ids[None], expected)))
        assert sorted(ours.T.tolist()) == sorted(ids.T.tolist())
        assert torch.equal(ours[1].sort().values, ours[1])
        one_grid = case.frames * case.fps / NATIVE <= 2
        assert torch.equal(ids[1].sort().values, ids[1]) == one_grid
    else:
        assert torch.equal(ours, ids)
        assert torch.equal(positions, expected)
    # 3. pixels and mel
    if case.frames:
        patches = [backbone.geometry.patches(s.frames) for s in segments if s.frames is not None]
        grid = [sum(grid[0] for _, grid in patches), *patches[0][1][1:]]
        assert grid == RECORDED[f"{case.name}.grid"].tolist()
        check(f"{case.name}.pixels", torch.cat([rows for rows, _ in patches]), within=0.0)
    if case.samples:
        mel = torch.cat([segment.mel for segment in segments if segment.mel is not None], dim=1)
        check(f"{case.name}.mel", mel, within=1e-5)
