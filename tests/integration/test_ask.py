"""ask.py: the answer, what it took, and the memory it was read from; files and pipes; forks at any time."""

import io
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import pytest
import torch
from support.finished_run import write_run
from support.thinkers import write_folder
from torch import Tensor

from omnimem.backbones import ModelOptions, load_backbone
from omnimem.budget import Budget
from omnimem.cli import asking
from omnimem.cli.asking import Asking, Conversation, Mark, Question, Reply
from omnimem.cli.parser import run_command
from omnimem.commands import ask, export
from omnimem.config import ConfigError
from omnimem.config.exported import not_tuned_at
from omnimem.media import LiveSource, MediaError
from omnimem.policies import PerturbationOptions
from omnimem.recall.renderer import write_mp4
from omnimem.recall.worlds import draw_world
from omnimem.streaming.attach import attach
from omnimem.streaming.feeder import Feeder
from omnimem.streaming.options import StreamOptions
from omnimem.tokens import Modality
from omnimem.tuning import AdapterError

QUESTION = "what colour was the star ?"
SECONDS = 16


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("base") / "thinker", rates="tiny")


@pytest.fixture(scope="module")
def video(base: Path) -> Path:
    path = base.parent / "video.mp4"
    write_mp4(draw_world(3, SECONDS), path)
    return path


@pytest.fixture(scope="module")
def exports(base: Path) -> Path:
    """The folder of a merged and an adapter export of one run."""
    run = write_run(base.parent / "runs" / "x", base)
    for kind in ("merged", "adapter"):
        export.main(["--run", str(run.path), "--format", kind, "--out", str(base.parent / kind)])
    return base.parent


def said(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> list[str]:
    capsys.readouterr()
    ask.main([str(argument) for argument in arguments])
    return capsys.readouterr().out.removesuffix("\n").split("\n")  # answers of random weights hold odd characters


def untimed(lines: list[str]) -> list[str]:
    return [line for line in lines if not line.startswith("  seconds:")]


def test_the_answer_comes_first_then_what_it_took(base, video, capsys) -> None:
    flags = ["--slots", "12", "--chunk-tokens", "36", "--max-new-tokens", "5"]
    lines = said(capsys, "--model", base, "--video", video, *flags, QUESTION)
    backbone = load_backbone(ModelOptions(path=str(base)))
    feeder = Feeder(backbone, StreamOptions(chunk_tokens=36))
    with torch.no_grad(), attach(backbone.text_model) as attached:
        stream = feeder.stream(attached, PerturbationOptions().build(Budget.shared(2, 12)))
        for chunk in feeder.watch(video):
            stream.feed(chunk)
        answer = feeder.answers(stream, [QUESTION], max_new_tokens=5)[0]
    audio, visual = (
        round(sum(row[kind] for row in stream.memory.counts()) / 2, 1) for kind in (Modality.AUDIO, Modality.VISUAL)
    )
    assert audio + visual == 12
    assert lines[:-1] == [
        *answer.split("\n"),
        f"  tokens in 16 s: 16 audio + 128 visual; kept in each layer: {audio:g} audio + {visual:g} visual",
        f"  memory: 24 entries in 2 layers, {stream.memory.bytes:,} bytes",
    ]
    reading, first, total = (float(number) for number in re.findall(r"\d+\.\d+", lines[-1]))
    assert re.fullmatch(r"  seconds: \S+ reading, \S+ to the first token, \S+ in all", lines[-1])
    assert 0 < first < total
    assert 0 < reading < total


def test_base_and_adapter_answer_as_the_merged_folder_does(base, exports, video, capsys) -> None:
    merged = said(capsys, "--model", exports / "merged", "--video", video, QUESTION)
    adapted = said(capsys, "--model", base, "--adapter", exports / "adapter", "--video", video, QUESTION)
    untuned = said(capsys, "--model", base, "--video", video, "--slots", "12", "--max-new-tokens", "5", QUESTION)
    assert untimed(merged) == untimed(adapted)
    assert merged[0] != untuned[0], "the adapter changes nothing, so nothing was shown"


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (["--slots", "24"], "8 audio + 16 visual"),
        (["--slots", "full"], "16 audio + 128 visual"),
        (["--policy", "recency"], "4 audio + 8 visual"),
        (["--tracks", "video"], "0 audio + 12 visual"),
    ],
)
def test_flags_replace_what_was_exported(exports, video, capsys, flags, kept) -> None:
    lines = said(capsys, "--model", exports / "merged", "--video", video, *flags, QUESTION)
    assert any(line.endswith(f"kept in each layer: {kept}") for line in lines), lines


def test_the_untuned_model_chooses_when_asked_to_and_its_memory_is_counted(base, exports, video, capsys) -> None:
    adapter = ("--model", base, "--adapter", exports / "adapter", "--video", video)
    tuned, chosen = (said(capsys, *adapter, "--selection-from", name, QUESTION) for name in ("tuned", "base"))
    assert untimed(tuned) == untimed(said(capsys, *adapter, QUESTION))
    line = next(line for line in chosen if line.startswith("  chosen by the model without its adapter: 24 entries, "))
    entries = [line for line in chosen if line.startswith("  memory: 24 entries")]
    assert len(entries) == 1
    assert not any(line.startswith("  chosen by") for line in tuned)
    assert int(re.findall(r"([\d,]+) bytes", line)[0].replace(",", "")) > 0


def test_without_settings_everything_is_kept_and_that_is_said(base, video, capsys) -> None:
    capsys.readouterr()
    ask.main(["--model", str(base), "--video", str(video), QUESTION])
    out, err = capsys.readouterr()
    assert "kept in each layer: 16 audio + 128 visual" in out
    assert f"no omnimem.json in {base}: everything is kept; --slots N keeps N tokens per layer" in err


def test_each_question_at_each_time_sees_what_was_over_by_then(exports, video, capsys) -> None:
    times = ["--at", "9.9", "--at", "4", "--at", "16"]
    lines = said(capsys, "--model", exports / "merged", "--video", video, *times, QUESTION, "what word ?")
    assert [line.partition(" -> ")[0] for line in lines if " -> " in line] == [
        f"at {at} s: {question}" for at in ("4", "9.9", "16") for question in (QUESTION, "what word ?")
    ]
    arrived = [line.partition(";")[0] for line in lines if line.startswith("  tokens in")]
    assert arrived == [
        "  tokens in 4 s: 4 audio + 32 visual",
        "  tokens in 9.9 s: 10 audio + 80 visual",
        "  tokens in 16 s: 16 audio + 128 visual",
    ]


def test_questions_have_times_of_their_own_and_the_stream_is_read_once(exports, video, capsys) -> None:
    """Each answer is that of a command which asks this question alone at this time."""
    command = ["--model", exports / "merged", "--video", video]
    asked = ["--ask", f"9.9: {QUESTION}", "--ask", "0:04: what word ?", "--at", "4", "--at", "16", "which one ?"]
    lines = untimed(said(capsys, *command, *asked))
    assert [line.partition(" -> ")[0] for line in lines if " -> " in line] == [
        "at 4 s: which one ?",
        "at 4 s: what word ?",
        f"at 9.9 s: {QUESTION}",
        "at 16 s: which one ?",
    ]
    for at, question in (("9.9", QUESTION), ("16", "which one ?")):
        alone = untimed(said(capsys, *command, "--at", at, question))
        assert alone == lines[lines.index(alone[0]) :][: len(alone)]
    end = untimed(said(capsys, *command, "--ask", "4: what word ?", QUESTION))
    assert [line.partition(" -> ")[0] for line in end if " -> " in line] == ["at 4 s: what word ?", QUESTION]


def test_typed_questions_are_answered_a_line_each(exports, video, capsys, monkeypatch) -> None:
    command = ["--model", exports / "merged", "--video", video]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"what word ?\n\n  {QUESTION}\n"))
    lines = said(capsys, *command, "--prompt")
    asked = [re.fullmatch("at (.*) s: (.*) -> .*", line) for line in lines if " -> " in line]
    assert [found[2] for found in asked if found] == ["what word ?", QUESTION]


def test_questions_about_a_pipe_are_typed_on_the_terminal(exports, video, tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "terminal").write_text(f"{QUESTION}\n")
    command = ["--model", exports / "merged", "--video", "-", "--prompt"]
    for terminal, refused in ((tmp_path / "terminal", False), (tmp_path / "missing", True)):
        monkeypatch.setattr(ask, "TERMINAL", str(terminal))
        with remuxed(video, tmp_path / "live.mkv").open("rb") as pipe:
            monkeypatch.setattr(sys, "stdin", pipe)
            if refused:
                with pytest.raises(ConfigError, match="no terminal to type questions on"):
                    said(capsys, *command)
            else:
                assert QUESTION in said(capsys, *command)[0]


@torch.no_grad()
def test_a_typed_question_is_answered_while_the_stream_stands_still(base) -> None:
    """It sees all segments so far, as the same question at this time, and the memory goes on as without it."""
    feeder = Feeder(load_backbone(ModelOptions(path=str(base))), StreamOptions(tracks="video", chunk_tokens=36))
    asking, answered = Asking(feeder=feeder, max_new_tokens=3), threading.Event()

    def camera(stands_still: Callable[[], object]) -> LiveSource:
        def frames() -> Iterator[tuple[float, Tensor]]:
            for second in range(16):
                if second == 11:
                    stands_still()
                yield float(second), torch.full((3, 112, 112), 16 * second, dtype=torch.uint8)

        return LiveSource(frames(), None, options=feeder.options.source(), geometry=feeder.backbone.geometry)

    with attach(feeder.backbone.text_model) as attached:
        streams = [feeder.stream(attached, PerturbationOptions().build(Budget.shared(2, 12))) for _ in range(3)]

        def type_and_wait() -> None:
            talk.ask(QUESTION)
            assert answered.wait(60), "the question waited for the stream"

        talk = Conversation(asking, streams[0], lambda: feeder.watch(camera(type_and_wait), split=True))
        talk.ask("what word ?")
        replies = []
        for event in talk.events():
            if isinstance(event, Reply):
                replies.append(event)
                answered.set() if event.questions == [QUESTION] else None
            if event is Mark.ENDED:
                talk.ask(QUESTION)
                talk.close()
        asked = [Question(text=QUESTION, at=at) for at in (10.0, 16.0)]
        expected = list(asking.replies(streams[1], camera(int), asked))
        for chunk in feeder.watch(camera(int)):
            streams[2].feed(chunk)
    assert [reply.seen for reply in replies] == [2, 10, 16]
    assert [reply.answers for reply in replies[1:]] == [reply.answers for reply in expected]
    ours, theirs = (stream.memory.tensors() for stream in (streams[0], streams[2]))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_a_question_on_the_way_leaves_the_memory_as_it_was(exports, video, capsys) -> None:
    command = ["--model", exports / "merged", "--chunk-tokens", "18", "--video", video]
    often = said(capsys, *command, "--at", "4", "--at", "6", "--at", "16", QUESTION)
    once = said(capsys, *command, "--at", "16", QUESTION)
    assert untimed(often)[-3:] == untimed(once)


@torch.no_grad()
def test_a_question_about_a_live_stream_is_answered_before_it_goes_on(base) -> None:
    shown: list[float] = []

    def camera() -> Iterator[tuple[float, Tensor]]:
        for second in range(60):
            shown.append(float(second))
            yield float(second), torch.full((3, 112, 112), second, dtype=torch.uint8)

    feeder = Feeder(load_backbone(ModelOptions(path=str(base))), StreamOptions(tracks="video"))
    plan, questions = Asking(feeder=feeder, max_new_tokens=2), [Question(text=QUESTION, at=at) for at in (8.0, 20.0)]
    source = LiveSource(camera(), None, options=feeder.options.source(), geometry=feeder.backbone.geometry)
    with attach(feeder.backbone.text_model) as attached:
        stream = feeder.stream(attached, PerturbationOptions().build(None))
        replies = plan.replies(stream, source, questions)
        assert next(replies).seen == 8.0
        assert shown[-1] <= 8 + 2 * 2, "waited for more of the stream than the segment after the question"
        assert next(replies).seen == 20.0
        assert list(replies) == []
        assert shown[-1] <= 24, "read on after the last question"


def remuxed(video: Path, path: Path) -> Path:
    """The same packets in a container that can be read while it grows."""
    with av.open(str(video)) as source, av.open(str(path), "w") as target:
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream_index]
                target.mux(packet)
    return path


def test_a_pipe_is_read_as_a_live_stream(exports, video, tmp_path, capsys, monkeypatch) -> None:
    command = ["--model", exports / "merged", "--tracks", "video", QUESTION, "--video"]
    expected = said(capsys, *command, video)
    with remuxed(video, tmp_path / "live.mkv").open("rb") as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        assert untimed(said(capsys, *command, "-")) == untimed(expected)
        assert not pipe.closed


def test_a_closed_standard_input_is_an_error(exports, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(MediaError, match="standard input is closed"):
        ask.main(["--model", str(exports / "merged"), QUESTION, "--video", "-"])


@pytest.mark.slow
def test_a_pipe_that_cannot_be_read_from_front_to_end_says_what_can(exports, video) -> None:
    command = [sys.executable, "train/ask.py", "--model", str(exports / "merged"), "--video", "-", QUESTION]
    with subprocess.Popen(["cat", str(video)], stdout=subprocess.PIPE) as source:
        done = subprocess.run(command, stdin=source.stdout, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("-: ")
    assert "matroska" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("place", "flags", "named"),
    [
        ("adapter", (), ()),
        ("adapter", ("--slots", "full", "--max-new-tokens", "1"), ()),
        ("adapter", ("--slots", "5"), ("memory.slots_per_layer",)),
        ("adapter", ("--fps", "2", "--policy", "recency"), ("memory.policy.name", "stream.fps")),
        ("runs/x/adapter", ("--slots", "5"), ("memory.slots_per_layer",)),
        ("runs/x/checkpoint-4", ("--slots", "5"), ("memory.slots_per_layer",)),
        ("elsewhere", (), ("has no omnimem.json, and no config.yaml of a run beside it",)),
    ],
)
def test_settings_at_which_the_adapter_was_not_tuned_are_said(exports, place, flags, named, monkeypatch) -> None:
    if place == "elsewhere" and not (exports / place).exists():
        (exports / place).mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (exports / place / name).write_bytes((exports / "adapter" / name).read_bytes())
    monkeypatch.chdir(exports / place)
    for adapter in (str(exports / place), "."):
        model = str(exports / "thinker")
        given = ask._parser().parse(["--model", model, "--adapter", adapter, "--video", "v.mp4", *flags, "?"])
        exported, _ = asking.recorded(model, given.adapter)
        memory = asking.memory_of(given, exported)
        lines = not_tuned_at(
            memory if memory.slots_per_layer else None, asking.stream_of(given, exported), given.adapter
        )
        assert all(any(name in line for line in lines) for name in named), lines
        assert len(lines) >= len(named) if place != "adapter" else bool(lines) == bool(named)


@pytest.mark.parametrize("name", ["adapter", "checkpoint-4"])
def test_an_adapter_within_its_run_is_asked_with_the_memory_of_the_run(name, exports, base, video, capsys) -> None:
    folder = exports / "runs" / "x"
    assert not (folder / name / "omnimem.json").exists()
    capsys.readouterr()
    ask.main(["--model", str(base), "--adapter", str(folder / name), "--video", str(video), QUESTION])
    out, err = capsys.readouterr()
    assert "kept in each layer: 4 audio + 8 visual" in out
    assert f"no omnimem.json in {folder / name}: memory and stream are those of its run ({folder}/config.yaml)" in err
    assert "everything is kept" not in err


@pytest.mark.parametrize("pipe", [False, True])
@pytest.mark.parametrize("asked", [["--ask", "50: ?"], ["--at", "50", "?"], ["--ask", "5: ?", "--ask", "0:50: ?"]])
def test_a_late_time_is_refused_in_words_of_the_command(pipe, asked, exports, video, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", remuxed(video, tmp_path / "live.mkv").open("rb"))
    words = "give a time within its 16.0 seconds, or leave the time out to ask at the end"
    with sys.stdin, pytest.raises(MediaError, match=rf"at 50 s, after the end of the stream \(16.0 s\); {words}"):
        ask.main(["--model", str(exports / "merged"), "--video", "-" if pipe else str(video), *asked])


def test_an_adapter_for_another_base_is_refused_even_if_its_shapes_fit(exports, video, tmp_path) -> None:
    alike = write_folder(tmp_path / "alike", rates="tiny", seed=5)
    with pytest.raises(AdapterError, match=r"made for another base than .*alike \(digest"):
        ask.main(["--model", str(alike), "--adapter", str(exports / "adapter"), "--video", str(video), QUESTION])


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--model", "m", "--video", "v.mp4"], "required: QUESTION, --ask or --prompt"),
        (["--model", "m", "--video", "v.mp4", "--ask", "0:00: What?"], "nothing is seen at 0 s"),
        (["--model", "m", "--video", "v.mp4", "--ask", "5 What?"], "'5 What?' is not SECONDS: QUESTION"),
        (["--model", "m", "--video", "v.mp4", "--prompt", "?"], "--prompt: questions are typed; leave out QUESTION"),
        (["--model", "m", "--video", "v.mp4", "--at", "5", "--ask", "6: ?"], "--at: is the time of a QUESTION"),
        (["--model", "m", "--video", "v.mp4", "--at", "-1", "?"], "'-1' is not a time in seconds"),
        (["--model", "m", "--video", "v.mp4", "--at", "0", "?"], "'0' is not a time in seconds after the start"),
        (["--model", "m", "--video", "v.mp4", "--at", "nan", "?"], "'nan' is not a time in seconds"),
        (["--model", "m", "--video", "v.mp4", "--slots", "many", "?"], "'many' is not a whole number above 0"),
        (["--model", "/no/such", "--video", "v.mp4", "?"], "v.mp4: is not a file"),  # before weights are loaded
        (["--model", "/no/such", "--video", "-", "?"], "model.path: /no/such cannot be loaded"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_2(arguments, what, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ask.py", *arguments])
    with pytest.raises(SystemExit) as leaving:
        run_command(ask.main)
    err = capsys.readouterr().err
    assert leaving.value.code == 2
    assert what in err
    assert err.count("\n") == 1
