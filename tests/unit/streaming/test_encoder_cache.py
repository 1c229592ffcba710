"""A damaged cache file is never read and never ends a run: its sample is encoded again."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from omnimem.backbones import Backbone, Encoded
from omnimem.checksums import share
from omnimem.streaming.encoder_cache import EncodedSegment, EncoderCache, MediaStats, fingerprint

CPU = torch.device("cpu")


def segment(number: int) -> EncodedSegment:
    encoded = Encoded(
        visual=torch.randn(1, 4, 8, dtype=torch.bfloat16),
        audio=None if number else torch.randn(1, 2, 8),
        grid=(1, 2, 2),
        start=2.0 * number,
        seconds=2.0,
        seconds_per_grid=2.0,
    )
    return EncodedSegment(encoded=encoded, heard=MediaStats(frames=2, audio_seconds=2.0))


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
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_is_named_counted_and_made_again(what, tmp_path, capsys) -> None:
    cache, path = EncoderCache(tmp_path, "encoders"), tmp_path / "x.safetensors"
    segments = [segment(number) for number in range(3)]
    assert cache.load(path, CPU) is None
    cache.store(path, segments)
    DAMAGE[what](path)
    assert cache.load(path, CPU) is None
    assert cache.damaged == [path]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cache: {path} is damaged (")
    cache.store(path, segments)
    read = cache.load(path, CPU)
    assert read is not None
    for found, wanted in zip(read, segments, strict=True):
        assert found.heard == wanted.heard
        assert torch.equal(found.encoded.visual, wanted.encoded.visual)
        assert (found.encoded.audio is None) == (wanted.encoded.audio is None)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


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
    class Weights(Backbone):
        geometry = None  # type: ignore[assignment]

        def __init__(self, layout: torch.memory_format) -> None:
            self.layout = layout

        def encoder_weights(self) -> Iterator[torch.Tensor]:
            yield torch.tensor(3.0)
            for tensor in (torch.arange(24.0).view(2, 3, 2, 2), torch.arange(6.0).view(2, 3, 1, 1)):
                yield tensor.to(memory_format=self.layout)

    Weights.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
    plain, strided = (Weights(layout) for layout in (torch.contiguous_format, torch.channels_last))
    assert fingerprint(plain) == fingerprint(strided)
