"""A cache file that is damaged, evicted or cannot be written never ends a run, and none is read for another key."""

import os
import subprocess
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import omnimem.streaming.encoder_cache as caching
from omnimem.backbones import Backbone, Encoded
from omnimem.backbones.projectors import Track
from omnimem.checksums import share
from omnimem.media import FileSource, Geometry, LogMel, SourceOptions
from omnimem.streaming.encoder_cache import RESERVE, EncoderCache, MediaStats, TrackSegment, fingerprint

CPU = torch.device("cpu")
GEOMETRY = Geometry(
    patch=14,
    merge=2,
    temporal_patch=2,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    mel=LogMel(mels=64, hop=4000, n_fft=4096),
    segment_seconds=2.0,
)


def segment(number: int) -> TrackSegment:
    encoded = Encoded(
        visual=torch.randn(1, 4, 8, dtype=torch.bfloat16) if number else None,
        audio=None,
        grid=(1, 2, 2),
        start=2.0 * number,
        seconds=2.0,
        seconds_per_grid=2.0,
    )
    return TrackSegment(track="visual", encoded=encoded, media=MediaStats(frames=2, audio_seconds=2.0))


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 9),
    "header cut": lambda path: os.truncate(path, 20),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "one bit": flipped,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "foreign": lambda path: save_file({"0.visual": torch.zeros(3)}, path),
    "of another key": lambda path: path.with_name("y.safetensors").replace(path),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_is_named_counted_and_made_again(what, tmp_path, capsys) -> None:
    cache, path = EncoderCache(tmp_path, "encoders"), tmp_path / "x.safetensors"
    segments = [segment(number) for number in range(3)]
    assert cache.load(path, CPU, "visual") is None
    cache.store(path, segments)
    cache.store(tmp_path / "y.safetensors", segments)
    DAMAGE[what](path)
    (tmp_path / "y.safetensors").unlink(missing_ok=True)
    assert cache.load(path, CPU, "visual") is None
    assert {name: number for name, number in cache.counts.items() if number} == {"misses": 1, "corrupt": 1}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cache: {path} is damaged (")
    cache.store(path, segments)
    read = cache.load(path, CPU, "visual")
    assert read is not None
    for found, wanted in zip(read, segments, strict=True):
        assert (found.track, found.media) == ("visual", wanted.media)
        pair = found.encoded.visual, wanted.encoded.visual
        assert pair[0] is pair[1] is None or torch.equal(*pair)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def stored(cache: EncoderCache, name: str) -> Path:
    path = cache.folder / f"{name}.safetensors"
    cache.store(path, [segment(1)])
    return path


def test_the_least_recently_used_entries_are_removed_beyond_the_limit(tmp_path) -> None:
    size = stored(EncoderCache(tmp_path, ""), "a0").stat().st_size
    cache = EncoderCache(tmp_path, "", limit=3 * size)
    paths = [stored(cache, name) for name in ("a0", "a1", "a2")]
    for time, path in enumerate(paths):
        os.utime(path, (time, time))
    assert cache.load(paths[0], CPU, "visual") is not None  # used after the others
    paths += [stored(cache, name) for name in ("a3", "a4")]
    assert [path.exists() for path in paths] == [True, False, False, True, True]
    assert cache.counts["evicted"] == 2
    small = EncoderCache(tmp_path, "", limit=10)
    assert not stored(small, "a5").exists()
    assert all(path.exists() for path in (paths[0], *paths[3:]))
    assert small.counts["not_stored"] == 1


def test_an_entry_is_read_to_its_end_while_another_process_removes_it(tmp_path) -> None:
    cache, path = EncoderCache(tmp_path, ""), tmp_path / "a0.safetensors"
    segments = [segment(number) for number in range(3)]
    cache.store(path, segments)
    reading = cache.load(path, CPU, "visual")
    assert reading is not None
    found = [next(reading)]
    path.unlink()
    found += reading
    pairs = list(zip(found, segments, strict=True))[1:]
    assert all(torch.equal(a.encoded.visual, b.encoded.visual) for a, b in pairs)


def fails(error: Exception) -> Callable[..., None]:
    def save(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise error

    return save


def denied(*_: object) -> None:
    raise PermissionError(13, "Permission denied")


Disk = namedtuple("Disk", "free")
UNWRITABLE: dict[str, tuple[str, object]] = {
    "full": ("save_file", fails(OSError(28, "No space left on device"))),
    "full, as safetensors says it": ("save_file", fails(SafetensorError("No space left on device (os error 28)"))),
    "read only": ("save_file", fails(PermissionError(13, "Permission denied"))),
    "nearly full": ("shutil", SimpleNamespace(disk_usage=lambda path: Disk(free=RESERVE))),
}


@pytest.mark.parametrize("what", UNWRITABLE)
def test_an_entry_that_cannot_be_written_is_counted_and_said_once(what, tmp_path, capsys, monkeypatch) -> None:
    cache = EncoderCache(tmp_path, "")
    old = stored(cache, "a0")
    name, replacement = UNWRITABLE[what]
    monkeypatch.setattr(caching, name, replacement)
    monkeypatch.setattr(os, "utime", denied)
    for number in range(3):
        assert not stored(cache, f"a{number + 1}").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cache: entries cannot be written to {tmp_path} (")
    assert cache.load(old, CPU, "visual") is not None
    assert (cache.counts["not_stored"], cache.counts["hits"]) == (3, 1)
    assert list(tmp_path.iterdir()) == [old]


def test_what_a_killed_process_left_is_removed_with_the_next_entry(tmp_path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    for name in (f".b0.safetensors.{ended.pid}.0", f".b1.safetensors.{ended.pid}.3"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / f".other.json.{ended.pid}.0").write_bytes(b"half")
    path = stored(EncoderCache(tmp_path, ""), "a0")
    assert {each.name for each in tmp_path.iterdir()} == {path.name, f".other.json.{ended.pid}.0"}


class Towers(Backbone):
    """A tower of one weight and a text model."""

    geometry = None  # type: ignore[assignment]
    device = CPU  # type: ignore[assignment]

    def __init__(self, *weights: torch.Tensor) -> None:
        self.model = torch.nn.ModuleDict({"tower": torch.nn.ParameterList(weights), "text": torch.nn.Linear(2, 2)})  # type: ignore[assignment]
        self.model.requires_grad_(False)

    def encoder_weights(self) -> Iterator[torch.Tensor]:
        yield from self.model["tower"].state_dict().values()  # type: ignore[index]


Towers.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]


def keys(folder: Path, *, weight: float = 1.0, device: str = "cpu", **settings: Any) -> dict[Track, Path]:
    """The entries of a video with audio in a file of its own; `video` and `audio` are the contents of the files."""
    for name in ("video", "audio"):
        content = settings.pop(name, b"a")
        (folder / name).write_bytes(content)
        os.utime(folder / name, ns=(len(content), content[0]))
    backbone = Towers(torch.full((2, 2), weight))
    backbone.device = torch.device(device)  # type: ignore[misc]
    cache = EncoderCache.of(backbone, folder)
    assert cache is not None
    given: dict[str, Any] = {"options": SourceOptions(), "geometry": GEOMETRY, **settings}
    return cache.paths(FileSource(folder / "video", folder / "audio", **given))


TRACK: tuple[Track, ...] = ("visual", "audio")
CHANGES: dict[str, tuple[dict[str, Any], tuple[Track, ...]]] = {  # settings, and the tracks that depend on them
    "video file": ({"video": b"b"}, ("visual",)),
    "audio file": ({"audio": b"b"}, ("audio",)),
    "weights": ({"weight": 2.0}, TRACK),
    "device": ({"device": "meta"}, TRACK),
    "start": ({"start": 1.0}, TRACK),
    "end": ({"end": 1.0}, TRACK),
    "times of questions": ({"asks": [1.5]}, TRACK),
    "a time as a segment begins": ({"asks": [2.0005]}, TRACK),
    "causal": ({"causal": True}, ("audio",)),
    "frame rate": ({"options": SourceOptions(fps=2.0)}, TRACK),
    "frame size": ({"options": SourceOptions(max_pixels=10000)}, ("visual",)),
    "smallest frame": ({"options": SourceOptions(min_pixels=10000)}, ("visual",)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_an_entry_depends_on_is_in_its_key(change, tmp_path) -> None:
    settings, tracks = CHANGES[change]
    before, after = keys(tmp_path), keys(tmp_path, **settings)
    assert before == keys(tmp_path)
    assert tuple(track for track in TRACK if before[track] != after[track]) == tracks
    assert len({*before.values(), *after.values()}) == 2 + len(tracks)


@pytest.mark.parametrize(("at", "shared"), [(1.5, True), (2.0, True), (2.0005, False), (2.1, True)])
@pytest.mark.parametrize("tracks", ["video", "audio"])
def test_tracks_have_the_same_entries_alone_unless_a_rest_has_one_of_them(tracks, at, shared, tmp_path) -> None:
    both, alone = keys(tmp_path, asks=[at]), keys(tmp_path, asks=[at], options=SourceOptions(tracks=tracks))
    assert len(alone) == 1
    assert (alone.items() <= both.items()) == shared


@pytest.mark.parametrize("package", ["torch", "transformers", "av"])
def test_another_version_of_what_computes_has_entries_of_its_own(package, tmp_path, monkeypatch) -> None:
    before = keys(tmp_path)
    known = caching.version
    monkeypatch.setattr(caching, "version", lambda name: "0" if name == package else known(name))
    assert not {*before.values()} & {*keys(tmp_path).values()}


@pytest.mark.parametrize("name", ["0", "lora_A", "modules_to_save"])
def test_trained_encoders_turn_the_cache_off_by_name(name, tmp_path, capsys) -> None:
    backbone = Towers(torch.ones(2, 2))
    assert EncoderCache.of(backbone, tmp_path) is not None
    backbone.model["tower"] = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2)})  # type: ignore[index]
    backbone.model.requires_grad_(name == "0")  # of an adapter in evaluation nothing is trained
    assert EncoderCache.of(backbone, tmp_path) is None
    assert f"tower.{name}.weight" in capsys.readouterr().err


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_weights_have_the_mode_of_other_files(umask, mode, tmp_path) -> None:
    before = os.umask(umask)
    try:
        (tmp_path / "inner").mkdir(mode=0o755)
        save_file({"a": torch.zeros(1)}, tmp_path / "inner" / "a.safetensors")
        (tmp_path / "inner" / "a.safetensors").chmod(0o600)
        share(tmp_path)
        cache = EncoderCache(tmp_path, "encoders")
        cache.store(tmp_path / "b.safetensors", [segment(0)])
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.safetensors")} == {mode}


def test_the_fingerprint_of_weights_does_not_depend_on_their_layout_in_memory() -> None:
    sizes = ((24.0, (2, 3, 2, 2)), (6.0, (2, 3, 1, 1)))
    plain, strided = (
        Towers(torch.tensor(3.0), *(torch.arange(count).view(size).to(memory_format=layout) for count, size in sizes))
        for layout in (torch.contiguous_format, torch.channels_last)
    )
    assert fingerprint(plain) == fingerprint(strided)
