"""A question at any time sees what a file that is cut there holds; its rest never enters the memory of the stream."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.gradients import gradient
from support.thinkers import write_folder
from torch import Tensor

from omnimem.backbones import Backbone, ModelOptions, Turn, load_backbone
from omnimem.budget import SplitBudget
from omnimem.data import Message, Sample
from omnimem.media import Decoded, FileSource, LiveSource, Segment, SourceOptions, read_audio, read_frames
from omnimem.media.prefetch import Decoders
from omnimem.policies import PerturbationOptions
from omnimem.policies.base import Policy
from omnimem.recall.renderer import write_mp4
from omnimem.recall.worlds import draw_world
from omnimem.streaming.attach import StreamedAttention, attach
from omnimem.streaming.encoder_cache import MediaStats
from omnimem.streaming.feeder import EncodedSample, Feeder, feed_until_due
from omnimem.streaming.options import StreamOptions
from omnimem.streaming.stream import Stream
from omnimem.tuning import FullGradient, HorizonGradient, streamed_loss

SECONDS, GRID = 8, 2.0
# fractions of a grid, of 2 s and of the 1 s of a frame, before the first grid and after it; 8.5 s is after the end
WITHIN = (0.3, 1.0, 1.7, 1.999, 2.5, 3.0, 3.37, 5.0, 6.25, 7.9)
AT_GRIDS = (2.0, 4.0)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videos") / "video.mp4"
    write_mp4(draw_world(3, SECONDS), path)
    return path


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_backbone(ModelOptions(path=str(write_folder(tmp_path_factory.mktemp("model"), rates="tiny"))))


@pytest.fixture
def attached(backbone: Backbone) -> Iterator[StreamedAttention]:
    with attach(backbone.text_model) as attached, torch.no_grad():
        yield attached


def feeder_of(backbone: Backbone, cache: Path | None = None, chunk_tokens: int = 200, **options: Any) -> Feeder:
    return Feeder(backbone, StreamOptions(chunk_tokens=chunk_tokens, max_pixels=12544, **options), cache)


def sample_of(video: Path, times: Sequence[float | None]) -> Sample:
    turns = [(Message(role="user", content="what ?", at=at), Message(role="assistant", content="red")) for at in times]
    return Sample(id="v", video=video, audio=None, messages=tuple(one for turn in turns for one in turn))


def policy_of(attached: StreamedAttention, slots: int | None) -> Policy:
    budget = None if slots is None else SplitBudget().build(attached.shape.layers, slots)
    return PerturbationOptions().build(budget)


def logits_of(feeder: Feeder, stream: Stream) -> Tensor:
    prompt = feeder.prompt([[Turn(text="what ?")]], feeder.options.tracks)
    return feeder.backbone.head(stream.ask(prompt).hidden)


def streamed(feeder: Feeder, attached: StreamedAttention, policy: Policy, sample: Sample) -> dict[float | None, Tensor]:
    """Logits by time of one stream with all questions of a sample."""
    stream, found = feeder.stream(attached, policy), {}
    for due in feed_until_due(stream, feeder.chunks([feeder.open(sample)], rests=True), sample.moments):
        found |= dict.fromkeys(due.moments, logits_of(feeder, due.stream))
    return found


def cut_off(
    feeder: Feeder, attached: StreamedAttention, policy: Policy, video: Path, at: float, cuts: Sequence[float]
) -> Tensor:
    """Logits at the end of a stream of the file cut at a time; chunks end where those of the whole stream do."""
    backbone, stream = feeder.backbone, feeder.stream(attached, policy)
    options, geometry = feeder.options.source(), backbone.geometry
    source = FileSource(video, options=options, geometry=geometry, end=at, causal=True)
    encoded = backbone.encode(source, fps=options.fps)
    begun = int(at / GRID) * GRID
    for chunk in backbone.chunks(encoded, tracks=options.tracks, chunk_tokens=200, cuts=[*cuts, begun]):
        stream.feed(chunk)
    return logits_of(feeder, stream)


@pytest.mark.parametrize("slots", [None, 12])
@pytest.mark.parametrize(
    ("tracks", "fps"), [("both", 1.0), ("both", 0.5), ("both", 2.0), ("video", 1.0), ("audio", 1.0)]
)
def test_a_question_sees_what_the_file_cut_at_its_time_holds(backbone, attached, video, tracks, fps, slots) -> None:
    feeder, policy = feeder_of(backbone, tracks=tracks, fps=fps), policy_of(attached, slots)
    found = streamed(feeder, attached, policy, sample_of(video, [*WITHIN, *AT_GRIDS, None]))
    for at in (*WITHIN, *AT_GRIDS):
        expected = cut_off(feeder, attached, policy, video, at, [*WITHIN, *AT_GRIDS])
        torch.testing.assert_close(found[at], expected, atol=1e-5, rtol=0, msg=lambda text, at=at: f"at {at}: {text}")


@pytest.mark.parametrize("slots", [None, 12])
def test_a_rest_never_enters_the_memory_of_the_stream(backbone, attached, video, slots) -> None:
    feeder, policy = feeder_of(backbone), policy_of(attached, slots)
    opened = feeder.open(sample_of(video, [*WITHIN, None]))
    plain, asked = feeder.stream(attached, policy), feeder.stream(attached, policy)
    for chunk in feeder.chunks([opened]):
        plain.feed(chunk)
    times: list[float | None] = []
    for due in feed_until_due(asked, feeder.chunks([opened], rests=True), opened.sample.moments):
        times += due.moments
        assert (due.stream is asked) is (due.moments[0] is None)
        assert due.seconds == (SECONDS if due.moments[0] is None else pytest.approx(due.moments[0], abs=0.05))
    assert times == [*WITHIN, None]
    assert asked.usage == plain.usage
    for a, b in zip(asked.memory.tensors(), plain.memory.tensors(), strict=True):
        assert torch.equal(a, b)


def test_a_fork_attends_to_memory_and_rest_then_holds_the_budget(backbone, attached, video) -> None:
    feeder, slots = feeder_of(backbone), 12
    total = slots * attached.shape.layers
    opened = feeder.open(sample_of(video, [3.0, 5.0, 7.9]))
    stream = feeder.stream(attached, policy_of(attached, slots))
    for due in feed_until_due(stream, feeder.chunks([opened], rests=True), opened.sample.moments):
        (rest,) = [each for each in opened.segments if each.at == due.moments[0]]
        assert due.stream.memory.entries == total
        assert due.stream.usage.peak_entries >= total + rest.count * attached.shape.layers
        assert sum(due.stream.usage.tokens_in[1:]) == sum(stream.usage.tokens_in[1:]) + rest.count


def test_a_question_before_the_first_frame_that_ends_sees_it(backbone, attached, video) -> None:
    feeder = feeder_of(backbone)
    (due,) = feed_until_due(
        feeder.stream(attached, policy_of(attached, None)),
        feeder.chunks([feeder.open(sample_of(video, [1.0]))], rests=True),
        [1.0],
    )
    assert due.stream.usage.tokens_in[1:] == (1, 16)


@pytest.mark.parametrize("kind", ["cache", "prefetch", "live", "blocks"])
def test_rests_are_the_same_however_the_stream_is_read(backbone, attached, video, tmp_path, kind) -> None:
    feeder, sample = feeder_of(backbone, tmp_path), sample_of(video, [*WITHIN, None])
    expected = [part.encoded for part in feeder.read(sample)]
    if kind == "cache":
        found = [part.encoded for part in feeder.read(sample)]
    else:
        decoded = _decoded(feeder, sample, kind)
        found = [part.encoded for part in feeder_of(backbone).read(sample, decoded)]
    assert [each.layout for each in found] == [each.layout for each in expected]
    assert [each.at for each in expected if each.at is not None] == list(WITHIN)
    for a, b in zip(found, expected, strict=True):
        for x, y in ((a.visual, b.visual), (a.audio, b.audio)):
            assert (x is None) is (y is None)
            assert x is None or y is None or torch.equal(x, y)


@dataclass
class Listed:
    """Segments that were read."""

    options: SourceOptions
    segments: list[Segment]
    unchanged: bool = True

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.segments)


def _decoded(feeder: Feeder, sample: Sample, kind: str) -> Decoded:
    source, path = feeder.source(sample), sample.video
    assert path is not None
    if kind == "prefetch":
        with Decoders(1) as decoders:
            every = [segment for _, segments in decoders.read([(None, source)]) for segment in segments or ()]
            return Listed(source.options, every)
    frames = list(read_frames(path, fps=1.0))
    audio = read_audio(path, rate=feeder.backbone.geometry.mel.rate)
    blocks = iter(audio.split(1000 if kind == "live" else 10**6))
    options, geometry = feeder.options.source(), feeder.backbone.geometry
    return LiveSource(iter(frames), blocks, options=options, geometry=geometry, asks=source.asks)


@pytest.mark.parametrize("carry", [FullGradient(), FullGradient(recompute=False), HorizonGradient(chunks=2)], ids=str)
@pytest.mark.parametrize("at", [1.0, 3.37])
def test_the_loss_of_an_answer_is_that_of_the_file_cut_there(backbone, video, at, carry) -> None:
    """The gradient passes through the rest too; every segment is a chunk of its own."""
    feeder = feeder_of(backbone, chunk_tokens=20)
    with attach(deepcopy(backbone.text_model)) as attached:
        policy = policy_of(attached, 12)
        for parameter in attached.text_model.parameters():
            parameter.requires_grad_(True)

        def loss_and_gradient(time: float | None, end: float | None) -> tuple[Tensor, Tensor]:
            sample = replace(sample_of(video, [time]), end=end)
            source = feeder.source(sample)
            source.causal = True
            segments = [part.encoded for part in feeder.read(sample, source)]
            opened = EncodedSample(sample=sample, segments=segments, tracks="both", heard=MediaStats())
            loss = streamed_loss(attached, feeder, [opened], policy, softness=None, carry=carry).loss
            return loss.detach(), gradient(loss, attached.text_model)

        midway, slope = loss_and_gradient(at, None)
        assert slope.abs().sum() > 0
        cut, expected = loss_and_gradient(None, at)
        torch.testing.assert_close(midway, cut, atol=1e-5, rtol=0)
        torch.testing.assert_close(slope, expected, atol=1e-4, rtol=1e-3)
