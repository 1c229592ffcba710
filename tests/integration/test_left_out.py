"""What one arm cannot answer is left out of it alone: out of memory, positions that cannot be compacted."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.evaluations import Given
from support.thinkers import write_folder

from omnimem.backbones import Backbone, ModelOptions, load_backbone
from omnimem.budget import SplitBudget
from omnimem.comparison import compare
from omnimem.data import Item, Message, Sample
from omnimem.errors import lacks_memory
from omnimem.evaluation import Arm, EvaluateOptions, Evaluation, answering
from omnimem.policies import PerturbationOptions
from omnimem.policies.base import Policy
from omnimem.recall.renderer import write_mp4
from omnimem.recall.worlds import draw_world
from omnimem.run import write_json
from omnimem.streaming.attach import StreamedAttention, attach
from omnimem.streaming.feeder import Feeder
from omnimem.streaming.options import StreamOptions
from omnimem.streaming.stream import PositionsError, Stream

SECONDS = (4, 12, 4)
MEMORY = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
    "host": MemoryError(),
    "cuda": RuntimeError("CUDA error: out of memory"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "system": OSError(12, "Cannot allocate memory"),
}


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


def sample(video: Path) -> Sample:
    """Two questions, at 3 s and at the end."""
    turns = [
        (Message(role="user", content="what ?", at=at), Message(role="assistant", content="x")) for at in (3.0, None)
    ]
    items = tuple(Item(id=f"{video.stem}/{number}") for number in range(2))
    messages = tuple(message for turn in turns for message in turn)
    return Sample(id=video.stem, video=video, audio=None, messages=messages, items=items)


def evaluation(backbone: Backbone, attached: StreamedAttention, **options: Any) -> Evaluation:
    feeder = Feeder(backbone, StreamOptions(chunk_tokens=40, max_pixels=12544, **options))
    settings = EvaluateOptions(max_new_tokens=3, decoders=0, max_failures=0.0)
    return Evaluation(attached=attached, feeder=feeder, options=settings)


def policy_of(attached: StreamedAttention, slots: int | None) -> Policy:
    budget = None if slots is None else SplitBudget().build(attached.shape.layers, slots)
    return PerturbationOptions().build(budget)


def lines_of(folder: Path) -> dict[str, Any]:
    return {line["id"]: line for line in map(json.loads, (folder / "given.jsonl").read_text().splitlines())}


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Streams that keep everything fail with an error from 6 s on."""

    def install(error: BaseException) -> None:
        feed = Stream.feed

        def limited(self: Stream, chunk: Any) -> None:
            if self.policy.budget is None and chunk.seconds > 6:
                raise error
            feed(self, chunk)

        monkeypatch.setattr(Stream, "feed", limited)

    return install


@pytest.mark.parametrize("kind", MEMORY)
def test_an_arm_out_of_memory_loses_the_questions_it_cannot_answer(
    backbone, attached, videos, tmp_path, failing, kind
) -> None:
    failing(MEMORY[kind])
    judge, asked = evaluation(backbone, attached), Given([sample(video) for video in videos])
    arm = Arm(name="full_memory", policy=policy_of(attached, None))
    summary = judge.run(arm, asked, tmp_path)
    lines = lines_of(tmp_path)
    assert {key for key, line in lines.items() if line.get("failed")} == {"video1/1"}
    assert lines["video1/1"]["failed"] == "out_of_memory"
    assert (summary["n"], summary["failed"]) == (5, {})
    left = summary["left_out"]["out_of_memory"]
    assert (left["questions"], left["streams"]) == (1, 1)
    assert left["message"] in str(MEMORY[kind]) or left["message"] == "MemoryError"


@pytest.mark.parametrize(("size", "stage"), [(1, "encode"), (2, "encode"), (1, "probe"), (2, "probe")])
def test_memory_that_ends_before_the_stream_costs_that_stream(
    backbone, attached, videos, tmp_path, monkeypatch, size, stage
) -> None:
    judge, asked = evaluation(backbone, attached), Given([sample(video) for video in videos])
    judge = replace(judge, options=replace(judge.options, batch_size=size))
    kept = {"encode": Feeder.read, "probe": answering.tracks_of}[stage]

    def short(*given: Any) -> Any:
        if "video1" in str(given):
            raise MEMORY["gpu"]
        return kept(*given)

    monkeypatch.setattr(*((Feeder, "read") if stage == "encode" else (answering, "tracks_of")), short)
    summary = judge.run(Arm(name="tuned", policy=policy_of(attached, 12)), asked, tmp_path)
    assert (summary["n"], summary["failed"]) == (4, {})
    assert summary["left_out"]["out_of_memory"]["streams"] == 1


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("wrong"), OSError(2, "no such file")])
def test_any_other_error_still_ends_the_evaluation(backbone, attached, videos, tmp_path, failing, error) -> None:
    failing(error)
    assert not lacks_memory(error)
    arm = Arm(name="full_memory", policy=policy_of(attached, None))
    with pytest.raises(type(error)):
        evaluation(backbone, attached).run(arm, Given([sample(video) for video in videos]), tmp_path)


def test_left_out_questions_are_tried_again(backbone, attached, videos, tmp_path, failing, monkeypatch) -> None:
    judge, asked = evaluation(backbone, attached), Given([sample(video) for video in videos])
    arm = Arm(name="full_memory", policy=policy_of(attached, None))
    failing(MemoryError())
    assert judge.run(arm, asked, tmp_path)["n"] == 5
    monkeypatch.undo()
    summary = judge.run(arm, asked, tmp_path)
    assert (summary["n"], summary.get("left_out", {})) == (6, {})
    assert not any(line.get("failed") for line in lines_of(tmp_path).values())


def test_an_error_that_was_caused_by_exhausted_memory_counts_as_such() -> None:
    error = ValueError("the decoder failed")
    error.__cause__ = RuntimeError("no result")
    assert not lacks_memory(error)
    error.__cause__.__cause__ = MemoryError()
    assert lacks_memory(error)


@pytest.mark.parametrize("tracks", ["both", "video", "audio"])
def test_an_arm_that_cannot_compact_is_not_applicable_beyond_the_range(
    backbone, attached, videos, tmp_path, monkeypatch, tracks
) -> None:
    room = 4 if tracks == "video" else 10  # positions of the stream: more than 4 s have, fewer than 12 s
    opening = int(next(iter(backbone.chunks([], tracks=tracks, chunk_tokens=40))).positions.max()) + 1
    monkeypatch.setattr(type(backbone), "trained_positions", property(lambda self: 1024 + opening + room))
    judge = evaluation(backbone, attached, positions="compact")
    asked = Given([sample(video) for video in videos])
    whole = Arm(name="full_memory", policy=policy_of(attached, None), tracks=tracks)
    summary = judge.run(whole, asked, tmp_path / "whole")
    lines = lines_of(tmp_path / "whole")
    assert lines["video1/1"]["failed"] == "not_applicable"
    assert not any(lines[key].get("failed") for key in ("video0/1", "video2/1"))
    assert summary["left_out"]["not_applicable"]["streams"] == 1
    assert summary["n"] == len(lines) - summary["left_out"]["not_applicable"]["questions"]
    if tracks == "both":
        budgeted = judge.run(Arm(name="tuned", policy=policy_of(attached, 4)), asked, tmp_path / "tuned")
        assert (budgeted["n"], budgeted["left_out"]) == (6, {})


def test_a_budget_that_cannot_be_compacted_is_an_error(backbone, attached, videos, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(type(backbone), "trained_positions", property(lambda self: 1024 + 4))
    arm = Arm(name="tuned", policy=policy_of(attached, 12))
    with pytest.raises(PositionsError, match=r"lower stream\.chunk_tokens"):
        evaluation(backbone, attached, positions="compact").run(arm, Given([sample(videos[1])]), tmp_path)


def test_a_comparison_pairs_the_questions_that_both_arms_answered(
    backbone, attached, videos, tmp_path, failing
) -> None:
    failing(MEMORY["gpu"])
    judge, asked = evaluation(backbone, attached), Given([sample(video) for video in videos])
    for name, slots in (("full_memory", None), ("training_free", 12), ("tuned", 12)):
        entry = judge.run(Arm(name=name, policy=policy_of(attached, slots)), asked, tmp_path / "eval" / name)
        write_json(tmp_path / "eval" / name / "summary.json", {"arm": name, "benchmarks": {"given": entry}})
    compare([tmp_path], tmp_path / "compare")
    summary = json.loads((tmp_path / "compare/summary.json").read_text())
    group = summary["benchmarks"]["given"]
    assert group["left_out"] == {"full_memory": {"out_of_memory": 1}}
    assert {label: entry["n"] for label, entry in group["arms"].items()} == {
        "full_memory": 5,
        "training_free": 6,
        "tuned": 6,
    }
    assert {(pair["a"], pair["b"]): pair["n"] for pair in group["pairs"]} == {
        ("tuned", "training_free"): 6,
        ("tuned", "full_memory"): 5,
        ("training_free", "full_memory"): 5,
    }
    assert "leaves out 1 question (out of memory)" in (tmp_path / "compare/report.html").read_text()


def test_an_arm_that_answers_nothing_is_named_and_compared_with_none(
    backbone, attached, videos, tmp_path, failing
) -> None:
    failing(MEMORY["gpu"])
    judge = evaluation(backbone, attached)
    late = replace(sample(videos[1]), messages=sample(videos[1]).messages[2:], items=sample(videos[1]).items[1:])
    for name, slots in (("full_memory", None), ("training_free", 12), ("tuned", 12)):
        entry = judge.run(Arm(name=name, policy=policy_of(attached, slots)), Given([late]), tmp_path / "eval" / name)
        write_json(tmp_path / "eval" / name / "summary.json", {"arm": name, "benchmarks": {"given": entry}})
    compare([tmp_path], tmp_path / "compare")
    group = json.loads((tmp_path / "compare/summary.json").read_text())["benchmarks"]["given"]
    assert set(group["arms"]) == {"training_free", "tuned"}
    assert group["left_out"] == {"full_memory": {"out_of_memory": 1}}


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_beyond_the_trained_range_is_said_once_and_recorded(
    backbone, attached, videos, tmp_path, monkeypatch, capsys, positions
) -> None:
    monkeypatch.setattr(type(backbone), "trained_positions", property(lambda self: 1024 + 30))
    monkeypatch.setattr("omnimem.streaming.feeder.QUESTION_ROOM", 1024 if positions == "compact" else 0)
    if positions == "original":
        monkeypatch.setattr(type(backbone), "trained_positions", property(lambda self: 24))
    judge, asked = evaluation(backbone, attached, positions=positions), Given([sample(video) for video in videos])
    for name, tracks in (("tuned", "both"), ("other", "video"), ("third", "audio")):
        arm = Arm(name=name, policy=policy_of(attached, 4), tracks=tracks)
        summary = judge.run(arm, asked, tmp_path / name)
        counted = summary["beyond_trained"]
        assert (counted["questions"] > 0) is (positions == "original")
        assert (counted["reached"] >= 24) is (positions == "original")
    said = [line for line in capsys.readouterr().err.splitlines() if "that the model was trained on" in line]
    assert len(said) == (1 if positions == "original" else 0)


def test_what_another_process_read_beyond_the_trained_range_is_said_by_the_first(
    backbone, attached, videos, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(type(backbone), "trained_positions", property(lambda self: 24))
    asked, arm = Given([sample(video) for video in videos]), Arm(name="tuned", policy=policy_of(attached, 4))
    monkeypatch.setenv("RANK", "1")
    evaluation(backbone, attached).answer(arm, asked, tmp_path / "eval")
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    evaluation(backbone, attached).conclude(asked, tmp_path / "eval")
    assert capsys.readouterr().err.count("that the model was trained on") == 1
