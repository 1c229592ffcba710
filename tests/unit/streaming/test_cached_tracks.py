"""Streams of both tracks and of one share entries, to the bit, in every family and whichever was read first."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.assembled import LOADERS
from support.assembled import write_folder as write_assembled
from support.families import write, written_once
from support.media_files import write_image, write_wav
from torch import Tensor

import omnimem.media.source as sources
from omnimem.backbones import Backbone, ModelOptions, assembled, load_backbone
from omnimem.data import Message, Sample
from omnimem.media import FileSource, FrameList, MediaError, Segment, Source
from omnimem.media.prefetch import DecodedFile, _Decoder, _pack
from omnimem.recall.renderer import write_mp4
from omnimem.recall.worlds import draw_world
from omnimem.streaming.encoder_cache import EncodedSegment, EncoderCache, MediaStats, fingerprint, separable
from omnimem.streaming.feeder import Feeder
from omnimem.streaming.options import StreamOptions
from omnimem.tokens import Tracks
from omnimem.tuning import LoraOptions, add_adapter
from omnimem.tuning.saved_modules import projectors_of

FAMILIES = ("qwen2_5_omni", "video_salmonn2_plus_qwen2_5", "video_salmonn2_plus", "qwen3_omni", "assembled")
PROJECTED = "video_salmonn2_plus, projectors trained"  # deepstack
FILES: dict[str, tuple[str, str | None]] = {  # video, audio
    "one file": ("both.mp4", None),
    "audio ends first": ("images", "short.wav"),
    "video ends first": ("images", "long.wav"),
}
SPANS: dict[str, dict[str, Any]] = {
    "whole": {},
    "a part": {"start": 1.3, "end": 8.9},
    "asked": {"end": 14.0, "times": (3.37, 8.0, 9.5, None)},
    "asked early": {"times": (3.37, None)},
    "asked as a segment begins": {"times": (3.37, 8.0005)},  # audio has a rest, and frames have none
}
CASES = [
    ("one file", "a part"),
    ("audio ends first", "asked"),
    ("video ends first", "whole"),
    ("video ends first", "asked early"),
    ("one file", "asked as a segment begins"),
]
ORDERS: tuple[tuple[tuple[Tracks, ...], tuple[Tracks, ...]], ...] = (  # read, and decoded where tracks are shared
    (("both", "video", "audio"), ("both",)),
    (("audio", "both", "video"), ("audio", "video")),
)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Backbone]]:
    """The backbone of a family, loaded once."""
    root, made = tmp_path_factory.mktemp("families"), dict[str, Backbone]()
    folder = written_once(root)

    def load(name: str) -> Backbone:
        family, trained = name.split(", ") if "," in name else (name, None)
        if name not in made:
            path = write_assembled(root / family) if family == "assembled" else folder(family)
            made[name] = load_backbone(ModelOptions(path=str(path)), "cpu")
        if trained and not made[name].unprojected:
            model = made[name].model
            add_adapter(model, LoraOptions(r=2, alpha=4.0, modules_to_save=tuple(projectors_of(model))))
        return made[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembled, "LOADERS", LOADERS)
        yield load


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video with audio, images, and noise of some lengths."""
    folder, random = tmp_path_factory.mktemp("media"), np.random.default_rng(0)
    write_mp4(draw_world(3, 10), folder / "both.mp4")
    for number in range(3):
        write_image(folder / f"{number}.png", random.integers(0, 255, (56, 84, 3), np.uint8))
    for name, seconds in (("short", 5.003), ("long", 67.21)):
        write_wav(folder / f"{name}.wav", 0.1 * random.standard_normal(round(16000 * seconds)).astype(np.float32))
    return folder


def sample_of(media: Path, files: str, span: str) -> Sample:
    name, beside = FILES[files]
    images = FrameList(tuple(media / f"{number}.png" for number in range(3)), 0.046)  # 65.2 s: more than one pass
    video, audio, given = images if name == "images" else media / name, beside and media / beside, dict(SPANS[span])
    times = [given.get("start", 0.0) + at if at is not None else at for at in given.pop("times", (None,))]
    turns = tuple(Message(role="user", content="what ?", at=at) for at in times)
    return Sample(id="a", video=video, audio=audio, messages=turns, **given)


def options_of(tracks: Tracks) -> StreamOptions:
    return StreamOptions(tracks=tracks, max_pixels=12544)


def encoded(backbone: Backbone, source: FileSource) -> list[EncodedSegment]:
    """The encoded segments of a file, with the media up to the end of each, without feeder and cache."""
    mel, total, heard = backbone.geometry.mel, MediaStats(), list[MediaStats]()

    def noted() -> Iterator[Segment]:
        nonlocal total
        for segment in source:
            frames = 0 if segment.frames is None else segment.frames.shape[0]
            audio = 0 if segment.mel is None else segment.mel.shape[1]
            audio_seconds = segment.audio_seconds if segment.padded else audio * mel.hop / mel.rate
            seconds = total.audio_seconds + min(segment.seconds, audio_seconds)
            heard.append(MediaStats(frames=total.frames + frames, audio_seconds=seconds))
            total = heard[-1] if segment.at is None else total
            yield segment

    found = list(backbone.encode(noted(), fps=source.options.fps))
    return [EncodedSegment(encoded=one, heard=each) for one, each in zip(found, heard, strict=True)]


def same(ours: Sequence[EncodedSegment], theirs: Sequence[EncodedSegment]) -> bool:
    """Whether segments are equal to the bit, all their fields included."""
    return len(ours) == len(theirs) and all(
        a.heard == b.heard
        and all(_equal(*(getattr(c.encoded, each.name) for c in (a, b))) for each in fields(a.encoded))
        for a, b in zip(ours, theirs, strict=True)
    )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other


@pytest.fixture(scope="module")
def decoded() -> Iterator[list[Tracks]]:
    """The tracks of each file that is read; to save time each is decoded once."""
    found, iterate, known = list[Tracks](), FileSource.__iter__, dict[tuple[object, ...], list[Segment]]()

    def read(self: FileSource) -> Iterator[Segment]:
        found.append(self.options.tracks)
        geometry = f"{self.geometry} {self.geometry.windowed}"
        key = (self.path, self.audio_path, self.options, self.start, self.end, self.asks, geometry, self._state_now())
        known[key] = known.get(key) or list(iterate(self))
        return iter(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSource, "__iter__", read)
        yield found


@pytest.mark.parametrize("family", [*FAMILIES, PROJECTED])
def test_whatever_was_read_first_segments_are_those_that_are_encoded(family, load, media, decoded, tmp_path) -> None:
    backbone: Backbone = load(family)
    for files, span in CASES:
        sample, expected, shared = sample_of(media, files, span), dict[Tracks, list[EncodedSegment]](), True
        for tracks in ("both", "video", "audio"):
            source = Feeder(backbone, options_of(tracks)).source(sample)
            expected[tracks], shared = encoded(backbone, source), separable(source)
        segment = backbone.geometry.segment(1.0)[0]
        assert shared == (span != "asked as a segment begins" or 8 % segment != 0)
        for number, (order, once) in enumerate(ORDERS):
            decoded.clear()  # entries of other spans and files are in the folder
            cache = EncoderCache(tmp_path / f"{number}", "x", before=backbone.unprojected)
            held = len(list(cache.folder.glob("*")))
            for tracks in order:
                feeder = Feeder(backbone, options_of(tracks), cache)
                assert same(list(feeder.read(sample)), expected[tracks]), (files, span, order, tracks)
                assert feeder.undecoded(sample) is None
            assert decoded == list(once if shared else dict.fromkeys(order)), (files, span, order)
            assert cache.counts["hits"] + cache.counts["misses"] == 4
            assert cache.counts["misses"] == len(list(cache.folder.iterdir())) - held == (2 if shared else 4)


CONFIGURED: dict[tuple[str, str], tuple[str, Any]] = {  # of a family and its encoder: a key without weights
    ("qwen2_5_omni", "vision_config"): ("hidden_act", "relu"),
    ("qwen2_5_omni", "audio_config"): ("encoder_attention_heads", 4),
    ("video_salmonn2_plus", "audio_config"): ("second_stride", 2.0),
    ("qwen3_omni", "vision_config"): ("hidden_act", "relu"),
}


@pytest.mark.parametrize(("family", "encoder"), CONFIGURED)
def test_the_configuration_of_an_encoder_is_in_the_key(family, encoder, load, media, tmp_path) -> None:
    name, value = CONFIGURED[family, encoder]
    path, given = write(tmp_path / "model", family), load(family)
    assert fingerprint(load_backbone(ModelOptions(path=str(path)), "cpu")) == fingerprint(given)  # not of its folder
    table = json.loads((path / "config.json").read_text())
    table.get("thinker_config", table)[encoder][name] = value
    (path / "config.json").write_text(json.dumps(table))
    other = load_backbone(ModelOptions(path=str(path)), "cpu")
    sample = sample_of(media, "one file", "a part")
    ours, theirs = (encoded(each, Feeder(each, options_of("both")).source(sample)) for each in (given, other))
    assert not same(ours, theirs)
    assert fingerprint(given) != fingerprint(other)


@pytest.mark.parametrize("when", ["before the key", "after the key", "read ahead"])
def test_what_was_read_of_a_file_that_changed_is_not_stored(when, load, tmp_path, monkeypatch, capsys) -> None:
    """Its entry would be found by a later stream of either content."""
    backbone, path = load("qwen2_5_omni"), tmp_path / "a.wav"
    contents = []
    for seed in range(2):
        write_wav(tmp_path / "b.wav", np.random.default_rng(seed).standard_normal(32000).astype(np.float32))
        contents.append((tmp_path / "b.wav").read_bytes())
    sample = Sample(id="a", video=None, audio=path, messages=())
    put(path, contents[0])
    expected = [encoded(backbone, Feeder(backbone, options_of("audio")).source(sample))]
    cache, decoded = EncoderCache(tmp_path / "cache", "x"), None
    feeder = Feeder(backbone, options_of("audio"), cache)
    if when == "read ahead":
        decoded = ahead(feeder.undecoded(sample))
        put(path, contents[1])
    elif when == "before the key":
        paths = cache.paths
        monkeypatch.setattr(cache, "paths", lambda source: put(path, contents[1]) or paths(source))
    else:
        encode = backbone.encode
        monkeypatch.setattr(backbone, "encode", lambda *a, **b: put(path, contents[1]) or encode(*a, **b))
    read = list(feeder.read(sample, decoded))
    assert cache.counts["not_stored"] == 1
    assert f"cache: {path} changed while it was read; going on" in capsys.readouterr().err
    assert list(cache.folder.glob("*")) == []
    monkeypatch.undo()
    expected.append(encoded(backbone, Feeder(backbone, options_of("audio")).source(sample)))
    assert not same(*expected)
    assert same(read, expected[when != "read ahead"])
    for content, wanted in zip(reversed(contents), reversed(expected), strict=True):
        put(path, content)
        assert all(same(list(feeder.read(sample)), wanted) for _ in range(2))


def put(path: Path, content: bytes) -> None:
    """Replace a file by another one of the same size and time."""
    path.with_suffix(".new").write_bytes(content)
    os.utime(path.with_suffix(".new"), (0, 0))
    path.with_suffix(".new").replace(path)


def ahead(source: FileSource | None) -> DecodedFile:
    """A file that another process has decoded."""
    assert source is not None
    messages = iter([*(("segment", _pack(segment)) for segment in source), ("end", None)])
    decoder = object.__new__(_Decoder)
    decoder.receive = messages.__next__
    return DecodedFile(decoder, source)


@pytest.mark.parametrize("lost", ["audio", "video"])
def test_a_damaged_track_is_the_same_error_and_costs_streams_without_it_nothing(
    lost, load, media, tmp_path, monkeypatch
) -> None:
    backbone, sample = load("qwen2_5_omni"), sample_of(media, "one file", "whole")
    whole: Tracks = "video" if lost == "audio" else "audio"

    def damaged(path: Path, **_: object) -> Iterator[Any]:
        yield from ()
        raise MediaError(path, "truncated", f"its {lost} is cut; copy it again")

    monkeypatch.setattr(sources, "read_audio_blocks" if lost == "audio" else "read_frames", damaged)
    monkeypatch.setattr(FileSource, "__iter__", Source.__iter__)
    cache = EncoderCache(tmp_path, "x")
    kept = list(Feeder(backbone, options_of(whole)).read(sample))
    for _ in range(2):  # without and with an entry of the other track
        with pytest.raises(MediaError, match=rf"/both\.mp4: its {lost} is cut; copy it again"):
            list(Feeder(backbone, options_of("both"), cache).read(sample))
        assert same(list(Feeder(backbone, options_of(whole), cache).read(sample)), kept)
    assert len(list(tmp_path.iterdir())) == 1
