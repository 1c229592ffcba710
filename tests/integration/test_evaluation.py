"""Evaluation: each stream once, the same lines whoever answers, bad files and late questions named, nothing mixed."""

import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from support.evaluations import Given, Line, dying
from support.thinkers import write_folder
from support.tiny_run import silence

from omnimem.backbones import Backbone, ModelOptions, Turn, load_backbone
from omnimem.backbones.qwen2_5_omni import Qwen25Omni
from omnimem.budget import SplitBudget
from omnimem.data import Item, Message, Sample, TooManyFailures
from omnimem.evaluation import Arm, EvaluateOptions, Evaluation, EvaluationError, Shard, answering, results
from omnimem.evaluation.results import MEASURED
from omnimem.media import FileSource, TracksOption, read_audio, read_frames
from omnimem.policies import PerturbationOptions
from omnimem.recall.renderer import write_mp4
from omnimem.recall.worlds import draw_world
from omnimem.streaming.attach import StreamedAttention, attach
from omnimem.streaming.feeder import Feeder, feed_until_due
from omnimem.streaming.options import StreamOptions

SECONDS = (8, 8, 12, 8, 8)
QUESTIONS = ("what was seen ?", "what was heard ?", "which colour ?")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("videos")
    paths = [folder / f"video{number}.mp4" for number in range(len(SECONDS))]
    for number, (path, seconds) in enumerate(zip(paths, SECONDS, strict=True)):
        write_mp4(draw_world(number, seconds), path)
    return paths


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_backbone(ModelOptions(path=str(write_folder(tmp_path_factory.mktemp("model"), rates="tiny"))))


@pytest.fixture
def attached(backbone: Backbone) -> Iterator[StreamedAttention]:
    with attach(backbone.text_model) as attached:
        yield attached


def sample(video: Path, times: Sequence[float | None] = (None,) * len(QUESTIONS), *, name: str = "") -> Sample:
    """A video with a question at each time."""
    name = name or video.stem
    asked = [Message(role="user", content=QUESTIONS[n % len(QUESTIONS)], at=at) for n, at in enumerate(times)]
    items = tuple(Item(id=f"{name}/{n}", categories={"topic": ("one", "two")[: n + 1]}) for n in range(len(times)))
    messages = tuple(m for question in asked for m in (question, Message(role="assistant", content="x")))
    return Sample(id=name, video=video, audio=None, messages=messages, items=items, cluster="day")


def evaluation(
    backbone: Backbone, attached: StreamedAttention, cache: Path | None = None, **options: Any
) -> Evaluation:
    feeder = Feeder(backbone, StreamOptions(chunk_tokens=40, max_pixels=12544), cache)
    chosen = EvaluateOptions(**{"max_new_tokens": 3, "decoders": 0, **options})
    return Evaluation(attached=attached, feeder=feeder, options=chosen)


def arm_of(attached: StreamedAttention, slots: int | None = 12, **settings: Any) -> Arm:
    budget = None if slots is None else SplitBudget().build(attached.shape.layers, slots)
    return Arm(name="arm", policy=PerturbationOptions().build(budget), **settings)


def lines_of(folder: Path) -> list[Line]:
    """The results, without measurements that differ between runs."""
    lines = [json.loads(line) for line in (folder / "given.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def kept_of(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary without its times."""
    return {key: value for key, value in summary.items() if key != "cost"}


def test_a_stream_is_read_once_for_all_its_questions(backbone, attached, videos, tmp_path, monkeypatch) -> None:
    read: list[str] = []
    begin = FileSource.__init__

    def counted(self: FileSource, *positional: Any, **named: Any) -> None:
        begin(self, *positional, **named)
        read_frames = self._read_frames
        self._read_frames = lambda: (read.append(self.path.stem), read_frames())[1]

    monkeypatch.setattr(FileSource, "__init__", counted)
    asked = [sample(videos[0], (2.0, 5.0, None, None)), sample(videos[1])]
    summary = evaluation(backbone, attached).run(arm_of(attached), Given(asked), tmp_path)
    assert read == ["video0", "video1"]
    assert summary["n"] == 7


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_results_are_the_same_in_1_2_or_3_shards(backbone, attached, videos, tmp_path, size) -> None:
    asked = Given([sample(video) for video in videos])
    judge = evaluation(backbone, attached, batch_size=size)
    whole = judge.run(arm_of(attached), asked, tmp_path / "1")
    for count in (2, 3):
        folder = tmp_path / str(count)
        items = {judge.answer(arm_of(attached), asked, folder, shard=Shard(index=i, count=count)) for i in range(count)}
        assert items == {-(-len(videos) // size)}
        assert not (folder / "given.jsonl").exists()
        assert judge.missing(asked, folder) == 0
        assert kept_of(judge.conclude(asked, folder)) == kept_of(whole)
        assert lines_of(folder) == lines_of(tmp_path / "1")
        assert [path.name for path in folder.glob("parts/*")] == []


@pytest.mark.slow
def test_decoding_ahead_and_the_cache_change_nothing(backbone, attached, videos, tmp_path) -> None:
    asked = Given([sample(video, (3.0, None)) for video in videos[:3]])
    for name, judge in {
        "here": evaluation(backbone, attached),
        "ahead": evaluation(backbone, attached, decoders=1),
        "into": evaluation(backbone, attached, tmp_path / "cache"),
        "from": evaluation(backbone, attached, tmp_path / "cache"),
    }.items():
        judge.run(arm_of(attached), asked, tmp_path / name)
        assert lines_of(tmp_path / name) == lines_of(tmp_path / "here"), name
    assert len(list((tmp_path / "cache").iterdir())) == 2 * 3  # an entry per track


def test_a_stream_is_encoded_once_for_all_arms(backbone, attached, videos, tmp_path, monkeypatch) -> None:
    silence(videos[0], tmp_path / "silent.mp4")
    asked = Given([sample(videos[1], (3.0, None)), sample(tmp_path / "silent.mp4", (None,))])
    arms: tuple[TracksOption, ...] = ("both", "video", "audio")
    for tracks in arms:
        evaluation(backbone, attached).run(arm_of(attached, None, tracks=tracks), asked, tmp_path / tracks)
    for order in (arms, arms[::-1]):
        place = tmp_path / order[0]
        judge = evaluation(backbone, attached, place / "cache")
        with monkeypatch.context() as patch:
            for tracks in order:
                arm = arm_of(attached, None, tracks=tracks)
                judge.run(arm, asked, place / tracks)
                assert lines_of(place / tracks) == lines_of(tmp_path / tracks)
                if len(list((place / "cache").iterdir())) == 3:  # nothing is decoded and no encoder runs any more
                    patch.setattr(Qwen25Omni, "encode", None)
                    patch.setattr(FileSource, "__iter__", None)
        counts = judge.feeder.cache.counts if judge.feeder.cache else {}
        assert (counts["hits"], counts["misses"]) == (3, 3)


class Killed(BaseException):
    """The end of a process, which no code may catch."""


@pytest.mark.parametrize("trial", range(4))
def test_an_interrupted_evaluation_answers_each_question_once(
    backbone, attached, videos, tmp_path, monkeypatch, trial
) -> None:
    drawn = random.Random(trial)
    asked = Given([sample(video) for video in videos[:3]])
    judge, at = evaluation(backbone, attached, batch_size=drawn.choice((1, 2))), drawn.randrange(9)
    whole = kept_of(judge.run(arm_of(attached), asked, tmp_path / "whole"))

    def end() -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(results, "append_line", dying(at, torn=drawn.random() < 0.5, end=end))
        with pytest.raises(Killed):
            judge.answer(arm_of(attached), asked, tmp_path / "cut")
    written = (tmp_path / "cut" / "given.jsonl").read_text()
    assert written.count("\n") == at
    judge.answer(arm_of(attached), asked, tmp_path / "cut")
    ids = [json.loads(line)["id"] for line in (tmp_path / "cut" / "given.jsonl").read_text().splitlines()]
    assert len(ids) == len(set(ids)) == 9
    assert kept_of(judge.conclude(asked, tmp_path / "cut")) == whole
    assert lines_of(tmp_path / "cut") == lines_of(tmp_path / "whole")


@pytest.fixture
def damaged(videos: list[Path], tmp_path: Path) -> list[Path]:
    """Four videos: the second one breaks off, the fourth is gone."""
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(videos[1].read_bytes()[:-1500])
    return [videos[0], cut, videos[2], tmp_path / "gone.mp4"]


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"decoders": 1}])
def test_a_bad_file_fails_its_questions_with_the_reason(backbone, attached, damaged, tmp_path, options) -> None:
    judge = evaluation(backbone, attached, max_failures=0.5, **options)
    summary = judge.run(arm_of(attached), Given([sample(video) for video in damaged]), tmp_path)
    lines = lines_of(tmp_path)
    assert [line["id"] for line in lines] == [f"{f.stem}/{n}" for f in damaged for n in range(3)]
    failed = {line["stream"]: (line["failed"], line["message"]) for line in lines if line.get("failed")}
    assert {stream: reason for stream, (reason, _) in failed.items()} == {"cut": "truncated", "gone": "missing"}
    assert failed["gone"][1] == f"{damaged[3]}: is not a file; check the path"
    assert summary["failed"] == {"truncated": 3, "missing": 3}
    answered = [line for line in lines if not line.get("failed")]
    right = sum(line["correct"] for line in answered)
    assert summary["strict"] == right / 12
    assert summary["official"] == right / sum(line["counted"] for line in answered)
    assert summary["no_answer"] >= 0.5


def test_a_truncated_file_fails_the_questions_before_its_end_too(backbone, attached, videos, tmp_path) -> None:
    whole = videos[2].read_bytes()
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(whole)
    with broken.open("r+b") as file:  # the container is whole, its frames are not
        file.seek(whole.index(b"mdat") + 4 + 2 * len(whole) // 5)
        file.write(os.urandom(len(whole) // 2))
    asked = Given([sample(broken, (2.0, None))])
    for size in (1, 2):
        judge = evaluation(backbone, attached, max_failures=1.0, batch_size=size)
        summary = judge.run(arm_of(attached), asked, tmp_path / str(size))
        assert sum(summary["failed"].values()) == 2


def test_too_many_bad_files_stop_the_evaluation_in_any_number_of_shards(backbone, attached, damaged, tmp_path) -> None:
    asked = Given([sample(video) for video in damaged])
    judge = evaluation(backbone, attached, max_failures=0.25)
    what = "2 of 4 samples failed, more than max_failures = 0.25; .* or raise evaluate.max_failures"
    with pytest.raises(TooManyFailures, match=what):
        judge.run(arm_of(attached), asked, tmp_path / "alone")
    for index in range(4):  # a shard of its own for each file: none of them sees too many
        judge.answer(arm_of(attached), asked, tmp_path / "shards", shard=Shard(index=index, count=4))
    with pytest.raises(TooManyFailures, match=what):
        judge.conclude(asked, tmp_path / "shards")


def test_a_restored_file_is_read_again(backbone, attached, videos, tmp_path) -> None:
    video = tmp_path / "video.mp4"
    asked = Given([sample(videos[0]), sample(video)])
    judge = evaluation(backbone, attached, max_failures=0.5)
    assert judge.run(arm_of(attached), asked, tmp_path / "out")["failed"] == {"missing": 3}
    video.write_bytes(videos[1].read_bytes())
    assert judge.run(arm_of(attached), asked, tmp_path / "out")["failed"] == {}
    assert not any(line.get("failed") for line in lines_of(tmp_path / "out"))


def test_a_question_during_the_stream_sees_nothing_after_it(backbone, attached, tmp_path) -> None:
    """Two videos that are the same for eight seconds and then are not: all that is known at 5 s is the same."""
    judge, times = evaluation(backbone, attached), (3.0, 5.0, None)
    for name, later in (("one", 21), ("two", 22)):
        write_joined(tmp_path / f"{name}.mp4", first=3, later=later)
        asked = Given([sample(tmp_path / f"{name}.mp4", times, name="video")])
        judge.run(arm_of(attached), asked, tmp_path / name)
    one, two = lines_of(tmp_path / "one"), lines_of(tmp_path / "two")
    assert one[:2] == two[:2]
    assert [line["stream_seconds"] for line in one] == [3.0, 5.0, 16.0]
    assert [line["frames"] for line in one] == [3, 5, 16]
    states = [logits_at(backbone, attached, tmp_path / f"{name}.mp4", times) for name in ("one", "two")]
    assert torch.equal(states[0][0], states[1][0])
    assert torch.equal(states[0][1], states[1][1])
    assert not torch.equal(states[0][2], states[1][2]), "the videos end alike, so the test shows nothing"


def write_joined(path: Path, *, first: int, later: int) -> None:
    """Eight seconds of one world, then eight louder ones of another."""
    parts = []
    for number, seed in enumerate((first, later)):
        part = path.with_suffix(f".{number}.mp4")
        write_mp4(draw_world(seed, 8), part)
        frames = [frame for _, frame in read_frames(part, fps=8.0)]
        parts.append((frames, read_audio(part) * (0.2 if number == 0 else 1.0)))
    with av.open(str(path), "w") as file:
        images, sounds = file.add_stream("mpeg4", rate=8), file.add_stream("aac", rate=16000, layout="mono")
        images.width = images.height = parts[0][0][0].shape[1]
        images.pix_fmt, images.gop_size = "yuv420p", 1
        for frame in (frame for frames, _ in parts for frame in frames):
            image = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
            file.mux(images.encode(image))
        file.mux(images.encode(None))
        sound = torch.cat([heard[: 8 * 16000] for _, heard in parts])
        for samples in sound.split(1024):
            block = av.AudioFrame.from_ndarray(samples[None].numpy(), format="fltp", layout="mono")
            block.sample_rate = 16000
            file.mux(sounds.encode(block))
        file.mux(sounds.encode(None))


def logits_at(
    backbone: Backbone, attached: StreamedAttention, video: Path, times: Sequence[float | None]
) -> list[torch.Tensor]:
    """Logits at each time."""
    judge, asked = evaluation(backbone, attached), sample(video, times)
    feeder = judge.feeder
    found: list[torch.Tensor] = []
    with torch.no_grad():
        stream = feeder.stream(attached, arm_of(attached).policy)
        for due in feed_until_due(stream, feeder.chunks([feeder.open(asked)], rests=True), asked.moments):
            prompt = feeder.prompt([[Turn(text="what ?")]], "both")
            found.append(backbone.head(due.stream.ask(prompt).hidden))
    return found


def test_a_question_after_the_end_is_refused_or_a_published_defect(backbone, attached, videos, tmp_path) -> None:
    own = sample(videos[0], (4.0, 8.0, 8.9, 5000.0))
    refused = evaluation(backbone, attached, max_failures=1.0).run(arm_of(attached), Given([own]), tmp_path / "own")
    assert refused["failed"] == {"too_short": 4}
    asked = Given([replace(own, published=True)])
    summary = evaluation(backbone, attached).run(arm_of(attached), asked, tmp_path)
    lines = lines_of(tmp_path)
    assert [line["stream_seconds"] for line in lines] == [4.0, 8.0, 8.0, 8.0]
    assert summary["defects"] == [
        {"rule": "known", "where": "somewhere", "what": "handled"},
        {
            "rule": "time_stamp",
            "where": "video0/3",
            "what": "asked at 5000 s of a stream that ends at 8.0 s; asked at its end",
        },
    ]
    blind = evaluation(backbone, attached).run(arm_of(attached, tracks=None), asked, tmp_path / "blind")
    assert len(blind["defects"]) == 1


def test_a_line_holds_question_input_memory_and_cost(backbone, attached, videos, tmp_path) -> None:
    asked = Given([sample(videos[2], (5.0, None))])
    summary = evaluation(backbone, attached).run(arm_of(attached), asked, tmp_path)
    early, late = (json.loads(line) for line in (tmp_path / "given.jsonl").read_text().splitlines())
    assert (early["video"], early["stream"], early["at"]) == ("day", "video2", 5.0)
    assert early["categories"] == {"topic": ["one"]}
    assert early["tokens_in"] == {"audio": 5, "visual": 48}
    assert late["tokens_in"] == {"audio": 12, "visual": 96}
    assert (early["frames"], early["audio_seconds"]) == (5, 5.0)
    assert sum(late["kept"].values()) == late["entries"] == 12
    assert late["peak_entries"] > 12
    assert 0 < early["seconds"]["reading"] < late["seconds"]["reading"]
    assert 0 < late["seconds"]["first_token"] <= late["seconds"]["answer"]
    cost = summary["cost"]
    assert (cost["streams"], cost["stream_seconds"]) == (1, 12.0)
    assert cost["reading_per_second"] == pytest.approx(late["seconds"]["reading"] / 12, abs=1e-6)
    assert cost["peak_memory"] is None or cost["peak_memory"] > 50e6


@pytest.mark.parametrize("at", ["end", "during"])
def test_many_questions_at_one_time_take_several_passes(backbone, attached, videos, tmp_path, monkeypatch, at) -> None:
    times = [None if at == "end" else 4.0] * 5
    size = 2 if at == "end" else 1
    asked = Given([sample(videos[0], times), sample(videos[1], times[:1])][:size])
    evaluation(backbone, attached, batch_size=size).run(arm_of(attached), asked, tmp_path / "one")
    monkeypatch.setattr(answering, "TOGETHER", 2)
    evaluation(backbone, attached, batch_size=size).run(arm_of(attached), asked, tmp_path / "three")
    assert lines_of(tmp_path / "one") == lines_of(tmp_path / "three")


def test_a_trace_counts_the_tokens_in_every_layer(backbone, attached, videos, tmp_path) -> None:
    evaluation(backbone, attached).run(arm_of(attached), Given([sample(videos[2])]), tmp_path)
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert trace["chunk_ends"] == [4.0, 8.0, 12.0]
    assert trace["arrived"] == {"audio": [2] * 6, "visual": [16] * 6}
    line = lines_of(tmp_path)[0]
    for kind in ("audio", "visual"):
        held = [sum(layer) for layer in trace["kept"][kind][-1]]
        assert sum(held) / len(held) == line["kept"][kind]
        assert [sum(layer[2:]) for layer in trace["kept"][kind][0]] == [0, 0]  # nothing of what is still to come


@pytest.mark.parametrize("text", ["4/4", "a/2", "1", "-1/2", "1/0"])
def test_a_shard_that_does_not_exist_is_named(text) -> None:
    with pytest.raises(EvaluationError, match=r"shard"):
        Shard.parse(text)


def test_a_silent_video_costs_no_questions_and_is_counted(backbone, attached, videos, tmp_path) -> None:
    silent = tmp_path / "silent.mp4"
    silence(videos[1], silent)
    asked = Given([sample(videos[0]), sample(silent)])
    for tracks, read in (("both", "video"), ("audio", "none"), ("video", "video")):
        folder = tmp_path / tracks
        summary = evaluation(backbone, attached, batch_size=2).run(arm_of(attached, tracks=tracks), asked, folder)
        assert summary["failed"] == {}
        assert [line["tracks"] for line in lines_of(folder)] == [tracks] * 3 + [read] * 3
        assert sum(summary["input"]["tracks"].values()) == 2
        fed = {kind for kind, count in lines_of(folder)[0]["tokens_in"].items() if count}
        assert fed == {"both": {"audio", "visual"}, "audio": {"audio"}, "video": {"visual"}}[tracks]
    quiet = [line for line in lines_of(tmp_path / "both") if line["stream"] == "silent"]
    assert all(line["kept"] == {"audio": 0.0, "visual": 12.0} for line in quiet), "the whole budget is lent"
    strict = evaluation(backbone, attached, max_failures=1.0)
    strict = replace(strict, feeder=Feeder(backbone, replace(strict.feeder.options, tracks="require_both")))
    refused = strict.run(arm_of(attached, tracks="require_both"), asked, tmp_path / "strict")
    assert refused["failed"] == {"no_audio": 3}
