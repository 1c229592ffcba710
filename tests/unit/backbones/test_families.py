"""Conformance of every family: names, encoders, layouts, streams, questions in between, tuning and export."""

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import families
from support.families import NAMES, noise
from torch import Tensor
from torch.nn import functional as F
from transformers import WhisperFeatureExtractor

from omnimem.backbones import Backbone, CheckpointError, Encoded, LayoutError, ModelOptions, Turn, load_backbone
from omnimem.backbones.load import FAMILIES, read_shapes
from omnimem.budget import Budget
from omnimem.data import Message, Sample
from omnimem.media import FileSource, LogMel
from omnimem.policies import PerturbationOptions
from omnimem.policies.baselines.hermes import HermesOptions
from omnimem.policies.baselines.recent_frames import RecentFramesOptions
from omnimem.recall.renderer import write_mp4
from omnimem.recall.worlds import draw_world
from omnimem.streaming.attach import attach
from omnimem.streaming.feeder import Feeder, feed_until_due
from omnimem.streaming.options import StreamOptions
from omnimem.streaming.stream import Stream
from omnimem.tokens import Chunk, Modality
from omnimem.tuning import LoraOptions, add_adapter

STAMPED = [name for name in NAMES if name != "qwen2_5_omni"]
HEARING = [name for name in NAMES if not name.startswith("qwen3_vl")]
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The folder of a family, written once."""
    made: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in made:
            made[name] = families.write(tmp_path_factory.mktemp("families") / name, name)
        return made[name]

    return find


@pytest.fixture(scope="module")
def loaded(folder: Folder) -> Callable[[str], Backbone]:
    """A family's backbone, loaded once; tests do not change it."""
    made: dict[str, Backbone] = {}

    def find(name: str) -> Backbone:
        if name not in made:
            made[name] = load_backbone(ModelOptions(path=str(folder(name))), "cpu")
        return made[name]

    return find


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    write_mp4(draw_world(3, 8), path)
    return path


def tracks_of(backbone: Backbone) -> str:
    return backbone.senses[0]


def encoded(backbone: Backbone, seconds: float, **settings: Any) -> list[Encoded]:
    settings = {"tracks": tracks_of(backbone), **settings}
    return list(backbone.encode(noise(backbone, seconds, **settings), fps=settings.get("fps", 1.0)))


def joined(chunks: list[Chunk]) -> dict[str, Tensor]:
    axes = {"embeddings": 1, "positions": 2, "modality": 1, "places": 2}
    return {name: torch.cat([getattr(chunk, name) for chunk in chunks], dim=axis) for name, axis in axes.items()}


# ------------------------------------------------------------------------------------------------ files and names


def test_every_configuration_is_claimed_by_one_family(folder) -> None:
    claimed = {}
    for name in NAMES:
        table = json.loads((folder(name) / "config.json").read_text())
        claimed[name] = next(type(family) for family in FAMILIES if family.claims(table))
    assert len(set(claimed.values())) == 4
    assert claimed["video_salmonn2_plus"] is claimed["video_salmonn2_plus_moe"] is not claimed["qwen3_vl"]


@pytest.mark.parametrize("given", [{"model_type": "llama"}, {}, {"model_type": None, "audio_config": {}}])
def test_a_folder_of_no_family_is_refused_with_the_known_ones(tmp_path, given) -> None:
    (tmp_path / "config.json").write_text(json.dumps(given))
    with pytest.raises(CheckpointError, match=r"no known family.*video-SALMONN 2\+.*Qwen3-VL.*Qwen2\.5-Omni"):
        load_backbone(ModelOptions(path=str(tmp_path)), "cpu")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", STAMPED)
def test_released_names_load_and_are_saved_again(tmp_path, name, tied) -> None:
    folder = families.write(tmp_path / "m", name, tied=tied, processor=tmp_path / "base")
    backbone = load_backbone(ModelOptions(path=str(folder), processor=str(tmp_path / "base")), "cpu")
    released = load_file(folder / "model.safetensors")
    backbone.model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    unused = {"model.audio.qformer.bert.embeddings.position_ids"} if "salmonn" in name else set()
    assert again.keys() == released.keys() - unused
    assert all(torch.equal(again[key], released[key]) for key in again)
    assert ("lm_head.weight" in released) != tied
    if unused:
        assert {f"model.audio.{key}" for key in ("q_tokens", "audio_proj.weight", "conv1.bias")} <= released.keys()
        inside = "model.audio.qformer.bert.encoder.layer.1."
        assert f"{inside}crossattention.self.query.weight" in released
        assert f"{inside}attention.output.LayerNorm.bias" in released


def test_a_thinker_loads_from_the_folder_of_the_whole_model(folder, loaded, tmp_path) -> None:
    plain, whole = folder("qwen3_omni"), tmp_path / "whole"
    whole.mkdir()
    for file in plain.iterdir():
        (whole / file.name).write_bytes(file.read_bytes())
    weights = {f"thinker.{key}": value for key, value in load_file(plain / "model.safetensors").items()}
    extra = {f"{part}.proj.weight": torch.ones(2, 2) for part in ("talker", "code2wav")}
    save_file(weights | extra, whole / "model.safetensors", metadata={"format": "pt"})
    table = json.loads((plain / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps({"model_type": "qwen3_omni_moe", "thinker_config": table}))
    ours, expected = load_backbone(ModelOptions(path=str(whole)), "cpu").model.state_dict(), loaded("qwen3_omni").model
    assert all(torch.equal(ours[key], value) for key, value in expected.state_dict().items())
    assert read_shapes(whole).parameters == read_shapes(plain).parameters
    assert any(".experts.3.up_proj.weight" in key for key in weights)


@pytest.mark.parametrize("name", STAMPED)
@pytest.mark.parametrize("change", ["missing", "extra"])
def test_missing_and_extra_weights_are_named(tmp_path, name, change) -> None:
    folder = families.write(tmp_path / "m", name)
    weights = load_file(folder / "model.safetensors")
    blocks = next(key for key in sorted(weights) if key.endswith("visual.blocks.0.norm1.weight"))
    key = blocks if change == "missing" else "model.ttt_memory.weight"
    weights = {k: v for k, v in weights.items() if k != key} | ({key: torch.ones(3)} if change == "extra" else {})
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=key):
        load_backbone(ModelOptions(path=str(folder)), "cpu")


def test_an_audio_branch_without_its_configuration_is_refused(tmp_path) -> None:
    folder = families.write(tmp_path / "m", "video_salmonn2_plus")
    table = json.loads((folder / "config.json").read_text())
    del table["audio_config"]
    (folder / "config.json").write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=r"no place.*model\.audio"):
        load_backbone(ModelOptions(path=str(folder)), "cpu")


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_known_from_the_configuration_alone(folder, loaded, name) -> None:
    backbone, shapes = loaded(name), read_shapes(folder(name))
    assert shapes.parameters == sum(weight.numel() for weight in backbone.model.parameters())
    assert repr(shapes.geometry) == repr(backbone.geometry)
    for mel_frames in (0, 1, 31, 32, 64, 100):
        heard = backbone.audio_tokens(mel_frames)
        assert heard == (0 if tracks_of(backbone) == "video" else heard)


@pytest.mark.parametrize(
    ("name", "options", "what"),
    [
        ("qwen3_vl", {"tracks": "both"}, "no audio encoder"),
        ("qwen3_vl", {"tracks": "video", "positions": "compact"}, "compact"),
        ("video_salmonn2_plus", {"positions": "compact"}, "compact"),
        ("qwen2_5_omni", {"timestamps": 4}, "timestamps"),
        ("video_salmonn2_plus", {"fps": 1.001}, "fps"),
    ],
)
def test_what_a_model_cannot_read_is_refused(loaded, name, options, what) -> None:
    with pytest.raises(LayoutError, match=what):
        Feeder(loaded(name), StreamOptions(**options))


def test_a_policy_that_moves_tokens_is_refused_where_positions_cannot_move(loaded) -> None:
    backbone = loaded("video_salmonn2_plus")
    feeder = Feeder(backbone, StreamOptions())
    with attach(backbone.text_model) as attached, pytest.raises(ValueError, match="reindex"):
        feeder.stream(attached, HermesOptions(reindex=True).build(Budget.shared(3, 12)))


# ------------------------------------------------------------------------------------------------------- encoders


@pytest.mark.parametrize("samples", [480_000, 479_999, 160_123, 1])
def test_the_mel_of_a_window_is_that_of_the_feature_extractor(samples) -> None:
    generator = torch.Generator().manual_seed(1)
    clip = (torch.rand(samples, generator=generator) - 0.5) * torch.linspace(0.01, 1, samples)
    expected = WhisperFeatureExtractor(feature_size=128)(clip.numpy(), sampling_rate=16000, return_tensors="pt")
    assert torch.allclose(LogMel(mels=128).window(clip, 3000), expected["input_features"][0], atol=2e-5)


def plain_audio(weights: dict[str, Tensor], mel: Tensor, heads: int, query_heads: int, states: int) -> Tensor:
    """The audio branch from the released names, in plain operations; one window."""
    w = {key.removeprefix("model.audio."): value for key, value in weights.items() if key.startswith("model.audio.")}

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def attention(q: Tensor, k: Tensor, v: Tensor, count: int) -> Tensor:
        q, k, v = (part.unflatten(-1, (count, -1)).transpose(-2, -3) for part in (q, k, v))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        return (scores.softmax(-1) @ v).transpose(-2, -3).flatten(-2)

    # 1. Whisper's encoder
    x = F.gelu(F.conv1d(mel[None], w["conv1.weight"], w["conv1.bias"], padding=1))
    x = F.gelu(F.conv1d(x, w["conv2.weight"], w["conv2.bias"], stride=2, padding=1))[0].T
    x = x + w["embed_positions.weight"]
    for number in range(1 + max(int(key.split(".")[1]) for key in w if key.startswith("layers."))):
        layer = f"layers.{number}"
        y = norm(f"{layer}.self_attn_layer_norm", x, 1e-5)
        q, k, v = (linear(f"{layer}.self_attn.{part}_proj", y) for part in "qkv")
        x = x + linear(f"{layer}.self_attn.out_proj", attention(q, k, v, heads))
        y = norm(f"{layer}.final_layer_norm", x, 1e-5)
        x = x + linear(f"{layer}.fc2", F.gelu(linear(f"{layer}.fc1", y)))
    x = norm("layer_norm", x, 1e-5)
    # 2. one query over each window of states
    found = []
    for first in range(0, len(x) - states + 1, states):
        heard = x[first : first + states]
        y = norm("qformer.bert.embeddings.LayerNorm", w["q_tokens"][0], 1e-12)
        for number in range(2):
            layer = f"qformer.bert.encoder.layer.{number}"
            for part, source in (("attention", None), ("crossattention", heard)):
                read = y if source is None else source
                q = linear(f"{layer}.{part}.self.query", y)
                k, v = (linear(f"{layer}.{part}.self.{which}", read) for which in ("key", "value"))
                mixed = linear(f"{layer}.{part}.output.dense", attention(q, k, v, query_heads))
                y = norm(f"{layer}.{part}.output.LayerNorm", mixed + y, 1e-12)
            inner = F.gelu(linear(f"{layer}.intermediate_query.dense", y))
            y = norm(f"{layer}.output_query.LayerNorm", linear(f"{layer}.output_query.dense", inner) + y, 1e-12)
        found.append(linear("audio_proj", y))
    return torch.cat(found)


def test_the_audio_branch_is_a_plain_one_on_the_released_names(folder, loaded) -> None:
    backbone, weights = loaded("video_salmonn2_plus"), load_file(folder("video_salmonn2_plus") / "model.safetensors")
    segments = list(noise(backbone, 20, tracks="audio"))
    heard = list(backbone.encode(iter(segments), fps=1.0))
    assert [segment.audio.shape[1] for segment in heard] == [8, 8, 8]
    for segment, tokens in zip(segments, heard, strict=True):
        expected = plain_audio(weights, segment.mel, heads=2, query_heads=2, states=2)
        assert (tokens.audio[0] - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_segments_are_encoded_alike_alone_and_together(loaded, name) -> None:
    backbone, settings = loaded(name), {"tracks": tracks_of(loaded(name))}
    together = encoded(backbone, 40)
    alone = list(backbone.encode(noise(backbone, 40, **settings), fps=1.0, per_pass=1))
    assert len(together) == len(alone) > 2
    for a, b in zip(together, alone, strict=True):
        assert a.layout == b.layout
        for x, y in zip((a.visual, a.audio, *a.deepstack), (b.visual, b.audio, *b.deepstack), strict=True):
            assert (x is None) == (y is None)
            assert x is None or (x - y).abs().max() < 1e-5
    counted = [0, *(backbone.audio_tokens(sum(s.mel.shape[1] for s in part)) for part in prefixes(backbone, settings))]
    heard = [0 if segment.audio is None else segment.audio.shape[1] for segment in together]
    assert heard == [b - a for a, b in pairwise(counted)]


def prefixes(backbone: Backbone, settings: dict[str, Any]) -> list[list[Any]]:
    segments = [segment for segment in noise(backbone, 40, **settings) if segment.mel is not None]
    every = [segments[: number + 1] for number in range(len(segments))]
    return every or [[]] * len(list(noise(backbone, 40, **settings)))


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_gives_back_what_was_encoded_without_decoding(loaded, film, name, tmp_path, monkeypatch) -> None:
    backbone = loaded(name)
    messages = tuple(Message(role="user", content="what ?", at=at) for at in (3.37, 5.0, None))
    sample = Sample(id="v", video=film, audio=None, messages=messages)
    options = StreamOptions(tracks=tracks_of(backbone), max_pixels=12544)
    expected, first = (Feeder(backbone, options, cache).open(sample) for cache in (None, tmp_path))
    monkeypatch.setattr(type(backbone), "encode", None)
    monkeypatch.setattr(FileSource, "__iter__", None)
    second = Feeder(backbone, options, tmp_path).open(sample)
    assert expected.heard == first.heard == second.heard
    assert [each.at for each in second.segments if each.at is not None] == [3.37, 5.0]
    for old, *others in zip(expected.segments, first.segments, second.segments, strict=True):
        for new in others:
            assert (old.layout, old.repeated, len(old.deepstack)) == (new.layout, new.repeated, len(new.deepstack))
            parts = [(old.visual, new.visual), (old.audio, new.audio), *zip(old.deepstack, new.deepstack, strict=True)]
            assert all((a is b is None) or torch.equal(a, b) for a, b in parts)
    assert bool(expected.segments[0].deepstack) == (name != "qwen2_5_omni")


# -------------------------------------------------------------------------------------------------------- layouts


def released_layout(
    segments: list[Encoded], words: Callable[[str], list[int]], frames: int, fps: float, total: int | None, rate: float
) -> tuple[list[Any], list[tuple[int, int, int]]]:
    """Ids ("v" and "a" for visual and audio tokens) and positions of the release, in plain loops over the file."""
    grids = sum(segment.grid[0] for segment in segments)
    heard = sum(0 if segment.audio is None else segment.audio.shape[1] for segment in segments)
    rows, columns = segments[0].grid[1:]
    spacing = 2 / fps
    # 1. audio of each grid; the last one takes the rest
    ends = [min(heard, int(rate * spacing * (i + 1) + 1e-6)) for i in range(grids)]
    if grids:
        ends[-1] = heard
    audio = [b - a for a, b in zip([0, *ends], ends, strict=False)]
    size = math.ceil(grids / total) if total and grids > total else 1
    ids: list[Any] = []
    positions: list[tuple[int, int, int]] = []
    at = 0

    def text(tokens: list[Any]) -> None:
        nonlocal at
        for token in tokens:
            ids.append(token)
            positions.append((at, at, at))
            at += 1

    # 2. group by group
    for first in range(0, grids, size):
        members = range(first, min(first + size, grids))
        times = [min(2 * first + n, frames - 1) / fps for n in (0, 1)]
        text(words(f"<{sum(times) / 2:.1f} seconds>") + words("<|vision_start|>"))
        for t, _ in enumerate(members):
            for row in range(rows):
                for column in range(columns):
                    ids.append("v")
                    positions.append((at + t, at + row, at + column))
        at += max(len(members), rows, columns)
        text(["a"] * sum(audio[i] for i in members) + words("<|vision_end|>"))
    if not grids:
        text(["a"] * heard)
    return ids, positions


CASES = [
    (16.0, None, 1.0),
    (15.0, None, 1.0),
    (13.0, None, 2.0),
    (40.0, None, 0.5),
    (11.0, 20.5, 1.0),
    (20.0, 3.0, 1.0),
]


@pytest.mark.parametrize("total", [None, 1, 3])
@pytest.mark.parametrize(
    ("name", "tracks"), [("video_salmonn2_plus", "both"), ("video_salmonn2_plus", "video"), ("qwen3_vl", "video")]
)
@pytest.mark.parametrize(("seconds", "audio_seconds", "fps"), CASES)
def test_ids_and_positions_are_those_of_the_release(loaded, name, seconds, audio_seconds, fps, tracks, total) -> None:
    backbone = loaded(name)
    segments = encoded(backbone, seconds, audio_seconds=audio_seconds, fps=fps, tracks=tracks)
    grids, frames = sum(segment.grid[0] for segment in segments), int(seconds * fps)
    group = math.ceil(grids / total) if total and grids else 1
    opening, *chunks = backbone.chunks(segments, tracks=tracks, chunk_tokens=400, group=group)
    found = joined(chunks)
    ids, offsets, _ = backbone.turn(Turn(text="what ?"), tracks=tracks)
    words = backbone.tokenizer
    expected, positions = released_layout(
        segments, lambda text: words(text, add_special_tokens=False)["input_ids"], frames, fps, total, 1.0
    )
    # the last vision_end stands before the question
    first = opening.count
    ours = found["positions"][0].T.tolist()
    end = int(found["positions"].max()) + 1
    ours += [[end + offset] * 3 for offset in offsets[: len(expected) - len(ours)]]
    assert ours == [[first + axis for axis in row] for row in positions]
    kinds = {int(Modality.VISUAL): "v", int(Modality.AUDIO): "a"}
    names = [kinds.get(int(kind)) for kind in found["modality"][0]]
    table = backbone.text_model.get_input_embeddings().weight
    for name_, token, row in zip(names, expected, found["embeddings"][0], strict=False):
        assert name_ == token if name_ else torch.equal(row, table[token])
    assert ids[: len(expected) - len(names)] == expected[len(names) :]


def test_positions_are_those_of_get_rope_index(loaded) -> None:
    backbone = loaded("qwen3_vl")
    segments = encoded(backbone, 9)
    chunks = list(backbone.chunks(segments, tracks="video", chunk_tokens=60))
    found = joined(chunks)
    kinds = (found["modality"] == Modality.VISUAL).int() * 2
    grids = torch.tensor([[sum(segment.grid[0] for segment in segments), 4, 6]])
    expected, _ = backbone.model.model.get_rope_index(torch.zeros_like(kinds).long(), kinds, video_grid_thw=grids)
    assert torch.equal(found["positions"][0], expected[:, 0])


@pytest.mark.parametrize("group", [1, 3])
def test_places_tell_frames_cells_and_groups(loaded, group) -> None:
    backbone = loaded("video_salmonn2_plus")
    found = joined(list(backbone.chunks(encoded(backbone, 16), tracks="both", chunk_tokens=400, group=group))[1:])
    frame, row, column, number = found["places"][0]
    visual, audio = (found["modality"][0] == kind for kind in (Modality.VISUAL, Modality.AUDIO))
    assert frame[visual].tolist() == [grid for grid in range(8) for _ in range(6)]
    assert row[visual].tolist() == [0, 0, 0, 1, 1, 1] * 8
    assert column[visual].tolist() == [0, 1, 2] * 16
    assert frame[audio].tolist() == [second // 2 for second in range(16)]
    assert number[visual].tolist() == [each // group for each in frame[visual].tolist()]
    text = ~visual & ~audio
    assert set(frame[text].tolist()) == {-1}
    assert set(number[text].tolist()) == set(range(math.ceil(8 / group)))


# -------------------------------------------------------------------------------------------------------- streams


def streamed(backbone: Backbone, chunks: list[Chunk], budget: Budget, **settings: Any) -> tuple[Stream, Tensor]:
    """The stream after its chunks, and the logits of a question."""
    feeder = Feeder(backbone, StreamOptions(tracks=tracks_of(backbone)))
    with attach(backbone.text_model) as attached, torch.no_grad():
        stream = feeder.stream(attached, PerturbationOptions(**settings).build(budget))
        for chunk in chunks:
            stream.feed(chunk)
        asked = feeder.prompt([[Turn(text="what was it ?")]], tracks_of(backbone))
        return stream, backbone.head(stream.ask(asked).hidden)[0]


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_stream_in_chunks_equals_one_shot(loaded, name, group) -> None:
    backbone = loaded(name)
    group = group if backbone.stamped else 1
    segments, full = encoded(backbone, 20), Budget.full(len(backbone.text_model.layers))
    settings = {"tracks": tracks_of(backbone), "group": group}
    few, many = (list(backbone.chunks(segments, chunk_tokens=size, **settings)) for size in (60, 5000))
    assert len(few) > len(many)
    (_, ours), (_, whole) = (streamed(backbone, chunks, full) for chunks in (few, many))
    assert (ours - whole).abs().max() < 1e-5 * max(1.0, float(whole.abs().max()))
    if backbone.stamped:  # the stock model in one call
        at = joined(many)
        asked = Feeder(backbone, StreamOptions(tracks=tracks_of(backbone))).prompt(
            [[Turn(text="what was it ?")]], tracks_of(backbone)
        )
        after = asked.offsets + int(at["positions"].max()) + 1
        rows = torch.cat([at["embeddings"], backbone.embed(asked.ids[0].tolist())], dim=1)
        ids = torch.cat([at["positions"], after[:, None].expand(-1, 3, -1)], dim=2).transpose(0, 1)
        mask = F.pad(at["modality"] == Modality.VISUAL, (0, asked.ids.shape[1]))
        levels = [torch.cat(level) for level in zip(*(c.deepstack.features for c in many if c.deepstack), strict=True)]
        with torch.no_grad():
            states = backbone.text_model(
                inputs_embeds=rows, position_ids=ids, visual_pos_masks=mask, deepstack_visual_embeds=levels
            ).last_hidden_state
            stock = backbone.head(states[:, -asked.ids.shape[1] :])[0]
        assert (ours - stock).abs().max() < 1e-5 * max(1.0, float(stock.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_holds_and_whole_frames_are_kept(loaded, name) -> None:
    backbone = loaded(name)
    layers = len(backbone.text_model.layers)
    chunks = list(backbone.chunks(encoded(backbone, 32), tracks=tracks_of(backbone), chunk_tokens=60))
    stream, _ = streamed(backbone, chunks, Budget.shared(layers, 14))
    assert all(int((layer.modality > 0).sum()) == 14 for layer in stream.memory.layers)
    feeder = Feeder(backbone, StreamOptions(tracks=tracks_of(backbone)))
    with attach(backbone.text_model) as attached, torch.no_grad():
        stream = feeder.stream(attached, RecentFramesOptions(frames=1).build(Budget.shared(layers, 40)))
        for chunk in chunks:
            stream.feed(chunk)
    kept = stream.memory.layers[0]
    visual = kept.modality[0] == Modality.VISUAL
    assert kept.place[0, 0][visual].unique().tolist() == [15]
    assert int(visual.sum()) == max(segment.grid[1] * segment.grid[2] for segment in encoded(backbone, 2))


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_question_within_a_segment_sees_the_file_cut_there(loaded, name, group) -> None:
    """And leaves nothing in the stream; also at a time where only a group of frames is incomplete."""
    backbone = loaded(name)
    tracks, group = tracks_of(backbone), group if loaded(name).stamped else 1
    asks, seconds = (3.0, 8.0, 13.5), 18.0
    settings = {"tracks": tracks, "chunk_tokens": 60, "group": group}
    whole = list(backbone.chunks(encoded(backbone, seconds, asks=asks), cuts=asks, **settings))
    assert {chunk.at for chunk in whole if chunk.at is not None} >= {3.0, 13.5}
    policy = PerturbationOptions().build(Budget.full(len(backbone.text_model.layers)))
    feeder = Feeder(backbone, StreamOptions(tracks=tracks))
    with attach(backbone.text_model) as attached, torch.no_grad():
        asked = 0
        for due in feed_until_due(feeder.stream(attached, policy), whole, [*asks, None]):
            at = seconds if due.moments == [None] else due.moments[0]
            cut = feeder.stream(attached, policy)
            frames = int(min(at, seconds) if float(at).is_integer() else math.ceil(at))
            alone = encoded(backbone, frames, audio_seconds=at)
            if tracks == "both" and not backbone.geometry.windowed:  # a running maximum needs the earlier part
                alone = [each for each in encoded(backbone, frames, audio_seconds=at, asks=(at,)) if each.at is None]
            for chunk in backbone.chunks(alone, **settings):
                cut.feed(chunk)
            asked += 1
            for ours, theirs in zip(due.stream.memory.layers, cut.memory.layers, strict=True):
                assert torch.equal(ours.positions, theirs.positions)
                assert torch.equal(ours.modality, theirs.modality)
                assert (ours.keys - theirs.keys).abs().max() < 1e-4
    assert asked == 4


# ---------------------------------------------------------------------------------------------- tuning and export


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_of_tuning_then_merged_export_give_the_same_logits(folder, name, tmp_path) -> None:
    backbone = load_backbone(ModelOptions(path=str(folder(name))), "cpu")
    tracks, layers = tracks_of(backbone), len(backbone.text_model.layers)
    chunks = list(backbone.chunks(encoded(backbone, 20), tracks=tracks, chunk_tokens=60))
    lora = LoraOptions(r=4, alpha=8.0, dropout=0.0, targets=("q_proj", "k_proj", "v_proj"))
    adapted = add_adapter(backbone.model, lora)
    names = [key for key, weight in adapted.named_parameters() if weight.requires_grad]
    assert len(names) == layers * 3 * 2
    assert not any(part in key for key in names for part in ("visual", "audio"))
    feeder = Feeder(backbone, StreamOptions(tracks=tracks))
    optimizer = torch.optim.AdamW([w for w in adapted.parameters() if w.requires_grad], lr=0.05)
    for _ in range(2):
        with attach(backbone.text_model) as attached:
            stream = feeder.stream(attached, PerturbationOptions().build(Budget.shared(layers, 14)))
            for chunk in chunks:
                stream.feed(chunk)
            asked = feeder.prompt([[Turn(text="what was it ?", answer="red")]], tracks)
            logits = backbone.head(stream.ask(asked).hidden)
            F.cross_entropy(logits[0], asked.labels[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    _, before = streamed(backbone, chunks, Budget.shared(layers, 14))
    adapted.merge_and_unload()
    backbone.model.save_pretrained(tmp_path / "merged")
    backbone.tokenizer.save_pretrained(tmp_path / "merged")
    beside = folder(name) / "preprocessor_config.json"
    (tmp_path / "merged" / beside.name).write_text(beside.read_text())
    again = load_backbone(ModelOptions(path=str(tmp_path / "merged")), "cpu")
    assert type(again) is type(backbone)
    _, after = streamed(again, chunks, Budget.shared(layers, 14))
    assert (before - after).abs().max() < 1e-5 * max(1.0, float(before.abs().max()))


@pytest.mark.parametrize("tracks", ["both", "video", "audio"])
@pytest.mark.parametrize(("seconds", "audio_seconds", "fps"), [(16.0, None, 1.0), (9.0, 4.3, 2.0), (3.0, 20.7, 1.0)])
def test_merged_positions_are_those_of_get_rope_index(loaded, seconds, audio_seconds, fps, tracks) -> None:
    backbone = loaded("qwen3_omni")
    segments = encoded(backbone, seconds, audio_seconds=audio_seconds, fps=fps, tracks=tracks)
    chunks = list(backbone.chunks(segments, tracks=tracks, chunk_tokens=200))
    found = joined(chunks)
    ids, offsets, _ = backbone.turn(Turn(text="what ?"), tracks=tracks)
    config, opening = backbone.model.config, chunks[0].count
    text = backbone.text.ids(backbone._opening)
    begin = backbone.tokenizer.convert_tokens_to_ids(
        {"both": ["<|vision_start|>", "<|audio_start|>"], "video": ["<|vision_start|>"], "audio": ["<|audio_start|>"]}[
            tracks
        ]
    )
    named = {int(Modality.VISUAL): config.video_token_id, int(Modality.AUDIO): config.audio_token_id}
    stream = [named[int(kind)] for kind in found["modality"][0, opening:]]
    whole = torch.tensor([[*text, *begin, *stream, *ids]])
    following = chunks[-1].next_position
    after = int(found["positions"].max()) + 1 if following is None else following
    ours = torch.cat([found["positions"][0], (torch.tensor(offsets) + after).expand(3, -1)], dim=1)
    grids = sum(segment.grid[0] for segment in segments)
    frames = sum(0 if s.mel is None else s.mel.shape[1] for s in noise(backbone, seconds, audio_seconds=audio_seconds))
    expected, _ = backbone.model.get_rope_index(
        whole,
        video_grid_thw=None if tracks == "audio" else torch.tensor([[grids, 4, 6]]),
        attention_mask=torch.ones_like(whole),
        use_audio_in_video=tracks == "both",
        audio_seqlens=None if tracks == "video" else torch.tensor([frames]),
        second_per_grids=torch.tensor([2.0 / fps]),
    )
    assert torch.equal(ours, expected[:, 0].long())
