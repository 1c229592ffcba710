"""Samples opened from segments that were decoded ahead are those that `Feeder.open` gives."""

import os
import signal
from collections.abc import Callable

import pytest
import torch
from support.thinkers import write_folder

from omnimem.backbones import Backbone, ModelOptions, load_backbone
from omnimem.data import Message, Sample
from omnimem.media import MediaError
from omnimem.media.prefetch import DecoderLost
from omnimem.recall.renderer import write_mp4
from omnimem.recall.worlds import draw_world
from omnimem.streaming.ahead import ReadAhead
from omnimem.streaming.feeder import EncodedSample, Feeder
from omnimem.streaming.options import StreamOptions

Samples = list[Sample]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_backbone(ModelOptions(path=str(write_folder(tmp_path_factory.mktemp("model"), rates="tiny"))))


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """Three videos, asked within a grid and after the end; a missing one; text alone."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(3):
        write_mp4(draw_world(number, 6), folder / f"{number}.mp4")
    turns = tuple(Message(role="user", content="what ?", at=at) for at in (3.37, None))
    found = [Sample(id=f"{n}", video=folder / f"{n}.mp4", audio=None, messages=turns) for n in range(4)]
    return [*found, Sample(id="text", video=None, audio=None, messages=turns[1:])]


@pytest.fixture
def feeder(backbone: Backbone) -> Feeder:
    return Feeder(backbone, StreamOptions(max_pixels=12544))


def same(ours: EncodedSample, theirs: EncodedSample) -> bool:
    pairs = list(zip(ours.segments, theirs.segments, strict=True))
    tensors = [(getattr(a, name), getattr(b, name)) for a, b in pairs for name in ("visual", "audio")]
    equal = all((a is b is None) or torch.equal(a, b) for a, b in tensors)
    return equal and ours.layout == theirs.layout and ours.heard == theirs.heard


ORDERS: dict[str, tuple[list[int], list[int]]] = {  # announced, opened
    "in order": ([0, 1, 2], [0, 1, 2]),
    "a sample twice": ([0, 1, 0, 2], [0, 1, 0, 2]),
    "text between": ([0, 4, 1], [0, 1]),
    "skipped": ([0, 1, 2, 0], [2, 0]),
    "nothing announced": ([], [1]),
    "not announced": ([0, 1], [2, 0, 2]),
    "one left over": ([2], [1, 2]),
}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_is_the_same_however_it_was_announced(workers, samples, feeder) -> None:
    expected = [feeder.open(sample) for sample in samples[:3]]
    with ReadAhead(feeder, workers) as ahead:
        for announced, opened in ORDERS.values():
            ahead.expect(samples[number] for number in announced)
            for number in opened:
                assert same(ahead.open(samples[number]), expected[number])
        assert len(ahead._decoders.decoders) == workers


def test_a_file_that_cannot_be_read_is_named_and_the_next_one_is_read(samples, feeder) -> None:
    with ReadAhead(feeder, 1) as ahead:
        ahead.expect(samples)
        ahead.open(samples[0])
        with pytest.raises(MediaError, match=r"3\.mp4"):
            ahead.open(samples[3])
        ahead.expect([samples[1]])
        assert same(ahead.open(samples[1]), feeder.open(samples[1]))


def test_a_process_that_is_killed_costs_the_sample_that_it_decoded(samples, feeder) -> None:
    with ReadAhead(feeder, 1) as ahead:
        ahead.expect(samples[:2])
        os.kill(ahead._decoders.decoders[0].process.pid, signal.SIGKILL)
        with pytest.raises(DecoderLost, match=r"train\.dataloader_num_workers"):
            ahead.open(samples[0])
        assert same(ahead.open(samples[1]), feeder.open(samples[1]))


def test_what_the_cache_holds_is_not_decoded(samples, backbone, tmp_path) -> None:
    feeder: Callable[[], Feeder] = lambda: Feeder(backbone, StreamOptions(max_pixels=12544), tmp_path)  # noqa: E731
    feeder().open(samples[0])
    with ReadAhead(feeder(), 1) as ahead:
        ahead.expect(samples[:1])
        assert same(ahead.open(samples[0]), feeder().open(samples[0]))
        assert not ahead._decoders.decoders
