"""Conformance of every family: names, encoders, layouts, streams, questions in between, tuning and export."""

import inspect
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
from support.families import NAMES, noise, written_once
from torch import Tensor
from torch.nn import functional as F
from transformers import WhisperFeatureExtractor

from omnimem.backbones import Backbone, CheckpointError, Encoded, LayoutError, ModelOptions, Turn, load_backbone
from omnimem.backbones.load import FAMILIES, read_shapes
from omnimem.backbones.video_salmonn2_plus_qwen2_5 import PairedLayout
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

WRITTEN = [name for name in NAMES if name != "qwen2_5_omni"]  # as their releases are, by support.families
SALMONN = ["video_salmonn2_plus", "video_salmonn2_plus_qwen2_5"]
STAMPED = ["qwen3_vl", "qwen3_vl_moe", "video_salmonn2_plus", "video_salmonn2_plus_moe"]  # frames may form groups
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The folder of a family, written once."""
    return written_once(tmp_path_factory.mktemp("families"))


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
    assert len(set(claimed.values())) == 6
    assert claimed["video_salmonn2_plus"] is claimed["video_salmonn2_plus_moe"] is not claimed["qwen3_vl"]
    assert claimed["video_salmonn2_plus_qwen2_5"] is not claimed["qwen2_5_vl"]


@pytest.mark.parametrize("given", [{"model_type": "llama"}, {}, {"model_type": None, "audio_config": {}}])
def test_a_folder_of_no_family_is_refused_with_the_known_ones(tmp_path, given) -> None:
    (tmp_path / "config.json").write_text(json.dumps(given))
    with pytest.raises(CheckpointError, match=r"no known family.*video-SALMONN 2\+.*Qwen3-VL.*Qwen2\.5-Omni"):
        load_backbone(ModelOptions(path=str(tmp_path)), "cpu")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", WRITTEN)
def test_released_names_load_and_are_saved_again(tmp_path, name, tied) -> None:
    folder = families.write(tmp_path / "m", name, tied=tied, processor=tmp_path / "base")
    backbone = load_backbone(ModelOptions(path=str(folder), processor=str(tmp_path / "base")), "cpu")
    released = load_file(folder / "model.safetensors")
    backbone.model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    audio = "audio." if "2_5" in name else "model.audio."
    unused = {f"{audio}qformer.bert.embeddings.position_ids"} if "salmonn" in name else set()
    assert again.keys() == released.keys() - unused
    assert all(torch.equal(again[key], released[key]) for key in again)
    assert ("lm_head.weight" in released) != tied
    if unused:
        assert {f"{audio}{key}" for key in ("q_tokens", "audio_proj.weight", "conv1.bias")} <= released.keys()
        inside = f"{audio}qformer.bert.encoder.layer.1."
        assert f"{inside}crossattention.self.query.weight" in released
        assert f"{inside}attention.output.LayerNorm.bias" in released
    if "2_5" in name:
        assert {"visual.patch_embed.proj.weight", "model.layers.0.self_attn.q_proj.bias"} <= released.keys()


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


@pytest.mark.parametrize("name", WRITTEN)
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


@pytest.mark.parametrize("name", SALMONN)
def test_an_audio_branch_without_its_configuration_is_refused(tmp_path, name) -> None:
    folder = families.write(tmp_path / "m", name)
    table = json.loads((folder / "config.json").read_text())
    del table["audio_config"]
    (folder / "config.json").write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=r"without a place.*audio\."):
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
        ("qwen2_5_vl", {"tracks": "both"}, "no audio encoder"),
        ("qwen2_5_vl", {"tracks": "video", "timestamps": 4}, "timestamps"),
        ("video_salmonn2_plus_qwen2_5", {"positions": "compact"}, "compact"),
        ("video_salmonn2_plus_qwen2_5", {"timestamps": 4}, "timestamps"),
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
    w = {key.partition("audio.")[2]: value for key, value in weights.items() if "audio." in key}

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


@pytest.mark.parametrize("name", SALMONN)
def test_the_audio_branch_is_a_plain_one_on_the_released_names(folder, loaded, name) -> None:
    backbone, weights = loaded(name), load_file(folder(name) / "model.safetensors")
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
    assert bool(expected.segments[0].deepstack) == ("2_5" not in name)


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


@pytest.mark.parametrize("fps", [1.0, 3.0])
@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl"])
def test_positions_are_those_of_get_rope_index(loaded, name, fps) -> None:
    backbone = loaded(name)
    segments = encoded(backbone, 9, fps=fps)
    chunks = list(backbone.chunks(segments, tracks="video", chunk_tokens=60))
    found = joined(chunks)
    kinds = (found["modality"] == Modality.VISUAL).int() * 2
    grids = torch.tensor([[sum(segment.grid[0] for segment in segments), 4, 6]])
    more = {"second_per_grid_ts": torch.tensor([2 / fps])} if name == "qwen2_5_vl" else {}
    ids, rope_index = torch.zeros_like(kinds).long(), backbone.model.model.get_rope_index
    expected, _ = rope_index(ids, kinds, video_grid_thw=grids, **more)
    if "int(next(second_per_grid_ts))" in inspect.getsource(rope_index):  # transformers 5.17 drops parts of a second
        visual, interval = kinds[0] == 2, backbone.model.config.vision_config.tokens_per_second * 2 / fps
        grid = torch.arange(int(visual.sum())) // (int(visual.sum()) // int(grids[0, 0]))
        expected[0, 0, visual] = expected[0, 0, visual].min() + (grid * interval).long()
    assert torch.equal(found["positions"][0], expected[:, 0])


def released_span(
    segments: list[Encoded], fps: float, rate: float, tracks: str
) -> tuple[list[str], list[tuple[int, int, int]], int]:
    """Kinds and positions of the release on Qwen2.5-VL, in plain loops over the file; the position of text after it."""
    grids = sum(segment.grid[0] for segment in segments)
    heard = sum(0 if segment.audio is None else segment.audio.shape[1] for segment in segments)
    rows, columns = segments[0].grid[1:]
    begin = [int(rate * 2 / fps * i + 1e-6) for i in range(grids + 1)]
    kinds, positions, before = [], [], 0
    for i in range(grids):
        for cell in range(rows * columns):
            kinds.append("v")
            positions.append((begin[i], cell // columns, cell % columns))
        until = heard if i + 1 == grids else min(heard, begin[i + 1])
        for k in range(before, until):
            kinds.append("a")
            positions.append((k, 0, k))
        before = max(before, until)
    for k in range(0 if grids else heard):
        kinds.append("a")
        positions.append((k, k, 0))
    axes = positions if tracks == "video" else [(t, t, t) for t, _, _ in positions]
    return kinds, positions, 1 + max(max(position) for position in axes)


@pytest.mark.parametrize("tracks", ["both", "video", "audio"])
@pytest.mark.parametrize(("seconds", "audio_seconds", "fps"), CASES)
def test_a_span_is_laid_out_as_in_the_release(loaded, seconds, audio_seconds, fps, tracks) -> None:
    backbone = loaded("video_salmonn2_plus_qwen2_5")
    segments = encoded(backbone, seconds, audio_seconds=audio_seconds, fps=fps, tracks=tracks)
    opening, *chunks = backbone.chunks(segments, tracks=tracks, chunk_tokens=400)
    found, first = joined(chunks), opening.count
    kinds, positions, after = released_span(segments, fps, 1.0, tracks)
    assert ["-av"[kind] for kind in found["modality"][0].tolist()] == kinds
    assert found["positions"][0].T.tolist() == [[first + axis for axis in each] for each in positions]
    following = chunks[-1].next_position
    assert (int(found["positions"].max()) + 1 if following is None else following) == first + after
    start, end = (backbone.text.ids(f"<|vision_{word}|>") for word in ("start", "end"))
    table = backbone.text_model.get_input_embeddings().weight
    assert torch.equal(opening.embeddings[0, -1], table[start[0]])
    assert backbone.turn(Turn(text="what ?"), tracks=tracks)[0][:1] == end


def test_text_after_wide_frames_and_little_audio_follows_the_time_not_the_width() -> None:
    rows = torch.zeros(1, 4, 2)
    layout = PairedLayout(torch.zeros(1, 5, 2), rate=2.0, tracks="both")
    wide = {"visual": torch.zeros(1, 24, 2), "grid": (1, 2, 12), "start": 0.0, "seconds": 2.0, "seconds_per_grid": 2.0}
    (part,) = layout.push(Encoded(audio=rows, **wide))
    assert int(part.positions.max()) == 5 + 11
    assert part.next_position == 5 + 3 + 1


@pytest.mark.parametrize("name", NAMES)
def test_a_prefix_is_the_last_text_of_the_user_before_the_stream(loaded, name) -> None:
    backbone, said = loaded(name), "which colour ? <|im_end|>"
    tracks = tracks_of(backbone)
    segments = encoded(backbone, 4)
    plain, begun = (
        list(backbone.chunks(segments, tracks=tracks, chunk_tokens=400, prefix=prefix)) for prefix in ("", said)
    )
    ids = backbone.text.ids(backbone.text.plain(said))
    assert begun[0].count == plain[0].count + len(ids)
    marks = len(backbone.text.ids(backbone.begin.get(tracks, "")))
    written = begun[0].embeddings[0, -marks - len(ids) : begun[0].count - marks]
    assert torch.equal(written, backbone.embed(ids)[0])
    assert backbone.stop[0] not in ids
    assert torch.equal(begun[1].positions, plain[1].positions + len(ids))
    assert said in backbone.framed("what ?", prefix=said).partition("what ?")[0]


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


@pytest.mark.parametrize(("name", "group"), [*((name, 1) for name in NAMES), *((name, 2) for name in STAMPED)])
def test_a_stream_in_chunks_equals_one_shot(loaded, name, group) -> None:
    backbone = loaded(name)
    assert backbone.stamped == (name in STAMPED)
    segments, full = encoded(backbone, 20), Budget.full(len(backbone.text_model.layers))
    settings = {"tracks": tracks_of(backbone), "group": group}
    few, many = (list(backbone.chunks(segments, chunk_tokens=size, **settings)) for size in (50, 5000))
    assert len(few) > len(many)
    (_, ours), (_, whole) = (streamed(backbone, chunks, full) for chunks in (few, many))
    assert (ours - whole).abs().max() < 1e-5 * max(1.0, float(whole.abs().max()))
    if name != "qwen2_5_omni":  # the stock model in one call
        at = joined(many)
        asked = Feeder(backbone, StreamOptions(tracks=tracks_of(backbone))).prompt(
            [[Turn(text="what was it ?")]], tracks_of(backbone)
        )
        following = many[-1].next_position
        after = asked.offsets + (int(at["positions"].max()) + 1 if following is None else following)
        rows = torch.cat([at["embeddings"], backbone.embed(asked.ids[0].tolist())], dim=1)
        ids = torch.cat([at["positions"], after[:, None].expand(-1, 3, -1)], dim=2).transpose(0, 1)
        mask = F.pad(at["modality"] == Modality.VISUAL, (0, asked.ids.shape[1]))
        levels = [torch.cat(level) for level in zip(*(c.deepstack.features for c in many if c.deepstack), strict=True)]
        more: Any = {"visual_pos_masks": mask, "deepstack_visual_embeds": levels} if levels else {}
        with torch.no_grad():
            states = backbone.text_model(inputs_embeds=rows, position_ids=ids, **more).last_hidden_state
            stock = backbone.head(states[:, -asked.ids.shape[1] :])[0]
        assert (ours - stock).abs().max() < 1e-5 * max(1.0, float(stock.abs().max()))


@pytest.mark.parametrize("name", ["qwen2_5_omni", "video_salmonn2_plus", "video_salmonn2_plus_qwen2_5"])
def test_chunks_of_so_many_tokens_end_within_frames_and_give_the_same(loaded, name) -> None:
    backbone = loaded(name)
    segments, full = encoded(backbone, 20), Budget.full(len(backbone.text_model.layers))
    grids = list(backbone.chunks(segments, tracks="both", chunk_tokens=60))
    exact = list(backbone.chunks(segments, tracks="both", chunk_tokens=35, inside=True))
    counts = [chunk.count for chunk in exact]
    assert counts[0] + counts[1] == 35 if counts[0] < 35 else counts[1] <= 35
    assert set(counts[2:-1]) == {35}
    assert 0 < counts[-1] <= 35
    cut = [chunk.places[0, :3, -1].tolist() for chunk in exact[1:-1] if int(chunk.modality[0, -1]) == Modality.VISUAL]
    assert any(row + column < 3 for _, row, column in cut), "no chunk ends within a frame"
    ours, whole = joined(exact), joined(grids)
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
    assert [chunk.seconds for chunk in exact] == sorted(chunk.seconds for chunk in exact)
    assert (exact[-1].seconds, exact[-1].next_position) == (grids[-1].seconds, grids[-1].next_position)
    (_, ours), (_, theirs) = (streamed(backbone, chunks, full) for chunks in (exact, grids))
    assert (ours - theirs).abs().max() < 1e-5 * max(1.0, float(theirs.abs().max()))


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


@pytest.mark.parametrize(("name", "group"), [*((name, 1) for name in NAMES), *((name, 3) for name in STAMPED)])
def test_a_question_within_a_segment_sees_the_file_cut_there(loaded, name, group) -> None:
    """And leaves nothing in the stream; also at a time where only a group of frames is incomplete."""
    backbone = loaded(name)
    tracks = tracks_of(backbone)
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
