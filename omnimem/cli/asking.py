"""Asking about a stream: settings of a model and its memory from the command line, questions, answers and their cost.

`omnimem ask` and `omnimem demo-ui` share this.
"""

import re
import sys
import threading
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from io import BufferedIOBase, RawIOBase
from pathlib import Path
from queue import SimpleQueue
from typing import final, get_args

import torch
from torch import Tensor

from omnimem.backbones import ModelOptions, load_backbone
from omnimem.budget import SharedBudget
from omnimem.checksums import is_sealed
from omnimem.cli.parser import Parser, warn
from omnimem.cli.tuned_model import BaseModel, load_tuned, of_run
from omnimem.config import ConfigError, MemoryOptions
from omnimem.config.check import alternatives, choices_of
from omnimem.config.exported import FILE, Exported, is_recorded, not_tuned_at, policies_of
from omnimem.config.policy import policy_options
from omnimem.data import Message, Sample
from omnimem.errors import counted
from omnimem.media import FileSource, FrameList, LiveSource, MediaError, Source, TracksOption, Video, probe, read_live
from omnimem.policies import PolicyOptions
from omnimem.policies.base import Policy
from omnimem.rows import SLACK, judge
from omnimem.streaming.attach import StreamedAttention, attach
from omnimem.streaming.feeder import Feeder, feed_until_due
from omnimem.streaming.options import StreamOptions
from omnimem.streaming.stream import Stream
from omnimem.tokens import EVICTABLE, Chunk, Modality, Tracks
from omnimem.tuning import AdapterError

UNKNOWN = "oracle"  # it must know what is asked
POLICIES = tuple(name for kind in alternatives(PolicyOptions) for name in choices_of(kind) if name != UNKNOWN)
PIPE, FULL = "-", 0
AHEAD = 8  # parts of chunks that are decoded and encoded in advance
TIMED = re.compile(r"(?:(?:(?P<hours>\d+):)?(?P<minutes>\d+):)?(?P<seconds>\d+(?:\.\d+)?):\s+(?P<text>\S.*)", re.DOTALL)


# --- settings


@final
@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model with the settings that its questions are asked with."""

    given: Namespace
    exported: Exported | None
    feeder: Feeder
    attached: StreamedAttention
    policy: Policy
    max_new_tokens: int

    def with_memory(self, slots: int | None, policy: str | None) -> "Loaded":
        """The same model with other slots (0: everything is kept) and another policy; None: as loaded."""
        given = Namespace(**vars(self.given))
        given.slots, given.policy = given.slots if slots is None else slots, policy or given.policy
        return replace(self, given=given, policy=policy_of(given, self.exported, self.attached.shape.layers))

    @property
    def slots(self) -> int | None:
        """Audio and visual tokens kept in each layer, mean over the layers; None: all."""
        budget = self.policy.budget
        return None if budget is None or budget.unlimited else round(budget.total / self.attached.shape.layers)

    @property
    def asking(self) -> "Asking":
        """Asks this model."""
        return Asking(feeder=self.feeder, max_new_tokens=self.max_new_tokens)

    def stream(self) -> Stream:
        """A new stream, of which nothing is read."""
        return self.feeder.stream(self.attached, self.policy)


@contextmanager
def loaded(given: Namespace) -> Iterator[Loaded]:
    """The model of the command line, attached, with its adapter; says so if everything will be kept."""
    if given.selection_from == "base" and given.adapter is None:
        raise ConfigError(["--selection-from base: there is no adapter; give --adapter DIR, or leave it out"])
    exported, notes = recorded(given.model, given.adapter)
    stream = stream_of(given, exported)
    check_used(given, exported)
    check_video(given)
    backbone = load_backbone(model_of(given, exported))
    if given.adapter is not None:
        load_tuned(backbone.model, given.adapter)
        if exported is not None and not is_sealed(given.adapter):
            BaseModel.of(given.model).digest(exported.origin.base_sha256 or None, given.adapter)
    warn(notes)
    feeder = Feeder(backbone, stream)
    tokens = given.max_new_tokens or (exported.max_new_tokens if exported else 64)
    with torch.no_grad(), attach(backbone.text_model) as attached:
        policy = policy_of(given, exported, attached.shape.layers)
        if given.slots is None and exported is None:
            where = given.adapter or given.model
            print(f"no {FILE} in {where}: everything is kept; --slots N keeps N tokens per layer", file=sys.stderr)
        if given.adapter is not None:
            memory = memory_of(given, exported)
            warn(not_tuned_at(memory if memory.slots_per_layer != FULL else None, feeder.options, given.adapter))
        yield Loaded(
            given=given, exported=exported, feeder=feeder, attached=attached, policy=policy, max_new_tokens=tokens
        )


def recorded(model: str, adapter: Path | None) -> tuple[Exported | None, list[str]]:
    """The omnimem.json of the adapter, or else of the model, or what the run of the adapter says; and what to note."""
    if adapter is None and (Path(model) / "adapter_config.json").is_file():
        raise AdapterError(f"{model} is an adapter; give its base as --model, and this folder as --adapter")
    folder = Path(model) if adapter is None else adapter
    if is_recorded(folder):
        return Exported.read(folder), []
    if adapter is None or (found := of_run(adapter, model)) is None:
        return None, []
    exported, file = found
    return exported, [f"no {FILE} in {adapter}: memory and stream are those of its run ({file})"]


def model_of(given: Namespace, exported: Exported | None) -> ModelOptions:
    """The weights to load; dtype by default: as exported, else bfloat16 on a GPU and float32 on a CPU."""
    native = "bfloat16" if torch.cuda.is_available() else "float32"
    options = exported.model if exported else ModelOptions(path=given.model, dtype=native)
    return replace(options, path=given.model, dtype=given.dtype or options.dtype)


def stream_of(given: Namespace, exported: Exported | None) -> StreamOptions:
    """The exported options of the stream, or the defaults, with those of the command line."""
    options = exported.stream if exported else StreamOptions()
    asked = {name: getattr(given, name) for name in ("fps", "max_pixels", "chunk_tokens", "tracks")}
    try:
        return replace(options, **{name: value for name, value in asked.items() if value is not None})
    except ValueError as error:
        raise ConfigError([f"command line: {error}"]) from error


def policy_of(given: Namespace, exported: Exported | None, layers: int) -> Policy:
    """The exported policy and number of slots, with those of the command line.

    Without an export the slots are one pool for audio and visual tokens, since nothing was calibrated.
    """
    memory = memory_of(given, exported)
    slots = memory.slots_per_layer
    if exported is not None and slots != FULL:
        tuned = replace(memory, slots_per_layer=exported.memory.slots_per_layer)
        return policies_of(tuned, exported.budget)(slots)
    budget = None if slots == FULL else SharedBudget().build(layers, slots)
    return replace(memory.policy.build(budget), selection_from=memory.selection_from)


def memory_of(given: Namespace, exported: Exported | None) -> MemoryOptions:
    """The exported settings of the memory, or one pool of the default policy, with those of the command line."""
    memory = exported.memory if exported else MemoryOptions(slots_per_layer=FULL, budget=SharedBudget())
    options = memory.policy if given.policy in (None, memory.policy.name) else policy_options(given.policy)
    slots: int = memory.slots_per_layer if given.slots is None else given.slots
    chosen = given.selection_from or memory.selection_from
    return replace(memory, policy=options, slots_per_layer=slots, selection_from=chosen)


def check_used(given: Namespace, exported: Exported | None) -> None:
    """Raises ConfigError for an option about what is kept where everything is; the page of demo-ui chooses slots."""
    if not hasattr(given, "video") or memory_of(given, exported).slots_per_layer != FULL:
        return
    unused = {"--policy": given.policy, "--selection-from": given.selection_from}
    what = [f"{name} {value}: everything is kept, so nothing is chosen" for name, value in unused.items() if value]
    if what:
        raise ConfigError([f"{each}; give --slots N, or leave it out" for each in what])


def video_of(given: Namespace) -> str | FrameList:
    """The video, or with --frame-rate the frames of a folder; raises MediaError if there are none."""
    if given.frame_rate is None:
        return given.video
    try:
        return FrameList.of_folder(Path(given.video), given.frame_rate)
    except ValueError as error:
        raise MediaError(given.video, "missing", f"{error}; --frame-rate is for a folder of image files") from error


def check_video(given: Namespace) -> None:
    """Raises MediaError for a file of the command line that cannot be read, before the weights are."""
    file = getattr(given, "video", None)  # the page of demo-ui chooses later
    if file not in (None, PIPE) and given.frame_rate is None:
        probe(Path(file))


def source_of(video: str | FrameList, feeder: Feeder, times: Sequence[float]) -> Source:
    """The file, or the live stream on standard input, asked at these times; says so if it lacks a track.

    Raises MediaError if it is unusable, or a time is after the end of the file.
    """
    asked, geometry = feeder.options.tracks, feeder.backbone.geometry
    if video != PIPE:
        questions = tuple(Message(role="user", content="", at=time) for time in times)
        media = video if isinstance(video, FrameList) else Path(video)
        judged = judge(Sample(id=str(video), video=media, audio=None, messages=questions), asked)
        for problem in judged.problems:
            raise late(video, times, judged.seconds) if problem.key == "messages" else problem.error
        tracks = judged.tracks
        source = FileSource(video, options=feeder.options.source(tracks), geometry=geometry, asks=times)
    else:
        if sys.stdin is None:
            raise MediaError(PIPE, "missing", "standard input is closed; send a stream, or give a file as --video")
        # unbuffered: what has arrived is decoded at once
        pipe = open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)  # noqa: SIM115 - open until the stream ends
        source, tracks = live_source(pipe, feeder, PIPE, times)
    if asked == "both" and tracks != "both":
        print(f"{video} has no {'audio' if tracks == 'video' else 'video'} track: {tracks} only", file=sys.stderr)
    return source


def late(video: Video | str, times: Sequence[float], seconds: float) -> MediaError:
    """The error that one of these times is after the end of the stream."""
    first = next((time for time in times if time > seconds + SLACK), max(times))
    what = f"a question is asked at {first:g} s, after the end of the stream ({seconds:.1f} s)"
    cure = f"give a time within its {seconds:.1f} seconds, or leave the time out to ask at the end"
    return MediaError(video, "too_short", f"{what}; {cure}")


def live_source(
    file: BufferedIOBase | RawIOBase, feeder: Feeder, name: str, times: Sequence[float] = ()
) -> tuple[LiveSource, Tracks]:
    """The live stream in a file that grows, and the tracks that it has; waits for its header. Raises MediaError."""
    options, geometry = feeder.options, feeder.backbone.geometry
    frames, audio = read_live(file, fps=options.fps, rate=geometry.mel.rate, tracks=options.tracks, name=name)
    tracks = "both" if frames and audio else "video" if frames else "audio"
    return LiveSource(frames, audio, options=options.source(tracks), geometry=geometry, asks=times), tracks


# --- questions and replies


@final
@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked, and when: after so many seconds of the stream; None: at its end."""

    text: str
    at: float | None = None

    @classmethod
    def timed(cls, text: str) -> "Question":
        """From `SECONDS: QUESTION`, also `M:SS: QUESTION` and `H:MM:SS: QUESTION`. Raises ArgumentTypeError."""
        found = TIMED.fullmatch(text.strip())
        if found is None:
            raise ArgumentTypeError(f"{text!r} is not SECONDS: QUESTION, such as '5: What was said?'")
        hours, minutes = (int(found[name] or 0) for name in ("hours", "minutes"))
        at = 3600 * hours + 60 * minutes + float(found["seconds"])
        if at == 0:
            raise ArgumentTypeError(f"{text!r}: nothing is seen at 0 s; give a time after the start of the stream")
        return cls(text=found["text"], at=at)


@final
@dataclass(frozen=True, kw_only=True)
class Reply:
    """Answers at one time and their cost."""

    at: float | None  # the requested time
    seen: float  # seconds of the stream read so far
    questions: Sequence[str]
    answers: list[str]
    cost: list[str]  # lines about tokens, memory and seconds
    seconds: float  # until the first token of the answers

    def lines(self, *, alone: bool = False) -> Iterator[str]:
        """The printed lines; `alone`: the answer without its question."""
        if alone:
            yield self.answers[0]
        else:
            when = "" if self.at is None else f"at {self.at:g} s: "
            yield from (f"{when}{q} -> {a}" for q, a in zip(self.questions, self.answers, strict=True))
        yield from (f"  {line}" for line in self.cost)


@final
@dataclass(frozen=True, kw_only=True)
class Asking:
    """Asks questions at their times, or at the end of the stream."""

    feeder: Feeder
    max_new_tokens: int

    def replies(self, stream: Stream, source: Source, questions: Sequence[Question]) -> Iterator[Reply]:
        """A reply for each time, as soon as all before it was read, else at the end; the stream is read up to the last.

        Questions are read on a fork, so that the memory of the stream is unchanged.
        """
        started = time.perf_counter()
        times = sorted({question.at for question in questions if question.at is not None})
        moments = [*times, *([None] if any(question.at is None for question in questions) else [])]
        for due in feed_until_due(stream, self.feeder.watch(source, cuts=times), moments):
            for at in due.moments:
                live = not isinstance(source, FileSource)  # a file has been judged before
                if live and at is not None and at > due.seconds + SLACK:
                    raise late(PIPE, [at], due.seconds)
                texts = [question.text for question in questions if question.at == at]
                yield self.reply(due.stream.fork(), texts, at, due.seconds, started)

    def reply(self, stream: Stream, texts: Sequence[str], at: float | None, seen: float, started: float) -> Reply:
        """Answers from the memory of a stream of which `seen` seconds are read, since the time `started`."""
        # 1. answer, and record the time of the first logits
        asked, first = time.perf_counter(), []

        def head(hidden: Tensor) -> Tensor:
            logits = self.feeder.backbone.head(hidden)
            if not first:
                logits.flatten()[0].item()  # waits for the GPU
                first.append(time.perf_counter() - asked)
            return logits

        answers = self.feeder.answers(stream, texts, max_new_tokens=self.max_new_tokens, head=head)
        total = time.perf_counter() - started
        # 2. cost, of the memory that the answers were read from
        memory, layers = stream.memory, len(stream.memory.layers)
        arrived, kept = arrivals(stream), held(stream)
        tokens = " + ".join(f"{arrived[kind]} {kind.name.lower()}" for kind in EVICTABLE)
        there = " + ".join(f"{kept[kind]:g} {kind.name.lower()}" for kind in EVICTABLE)
        cost = [
            f"tokens in {seen:.4g} s: {tokens}; kept in each layer: {there}",
            f"memory: {counted(memory.entries, 'entry')} in {counted(layers, 'layer')}, "
            f"{counted(memory.bytes, 'byte')}",
            f"seconds: {asked - started:.2f} reading, {first[0]:.3f} to the first token, {total:.3f} in all",
        ]
        if self.feeder.backbone.stamped:
            text = round(sum(layer[Modality.TEXT] for layer in memory.counts()) / layers, 1)
            cost.insert(1, f"text held in each layer, outside the slots: {counted(text, 'token')}")
        if stream.selector is not None:
            chosen = stream.selector.memory
            line = (
                f"chosen by the model without its adapter: {counted(chosen.entries, 'entry')}, "
                f"{counted(chosen.bytes, 'byte')} more"
            )
            cost.insert(-1, line)
        return Reply(at=at, seen=seen, questions=texts, answers=answers, cost=cost, seconds=first[0])


def arrivals(stream: Stream) -> dict[Modality, int]:
    """Tokens of each modality that the stream has read."""
    return dict(zip(Modality, stream.usage.tokens_in, strict=True))


def held(stream: Stream) -> dict[Modality, float]:
    """Audio and visual tokens that a layer holds, mean over the layers."""
    counts = stream.memory.counts()
    return {kind: round(sum(layer[kind] for layer in counts) / len(counts), 1) for kind in EVICTABLE}


# --- a stream that is read while questions arrive


@final
@dataclass(frozen=True)
class Read:
    """A chunk that the stream has read: its parts, in order."""

    parts: Sequence[Chunk]


@final
class Mark(Enum):
    """Events of a conversation without a content."""

    ENDED = "the stream has ended"
    CLOSED = "no question follows"


@final
class Conversation:
    """Reads a stream and answers each question from what was kept by then.

    Parts of the stream are decoded and encoded in a thread, so that no question waits for a stream that stands still.
    The stream reads them in the chunks of `Feeder.watch`; a question is read by a fork, to which the begun chunk was
    the last one, so it sees all parts that are complete and the memory goes on as without it. `ask`, `close`,
    `finish` and `stop` may be called by any thread.
    """

    def __init__(self, asking: Asking, stream: Stream, parts: Callable[[], Iterable[Chunk]]) -> None:
        """`parts` opens the stream (`Feeder.watch` with `split`); it is called in the thread."""
        self._asking, self._stream, self._parts = asking, stream, parts
        self._events: SimpleQueue[Chunk | Question | Mark | BaseException] = SimpleQueue()
        self._room, self._stopped, self._enough = threading.Semaphore(AHEAD), threading.Event(), threading.Event()
        self._begun: list[Chunk] = []  # parts of the next chunk
        self.seconds = 0.0  # of the stream that questions see

    def ask(self, text: str) -> None:
        """Ask as soon as the chunk that is being read is done."""
        self._events.put(Question(text=text))

    def close(self) -> None:
        """No further questions: end when the stream ends."""
        self._events.put(Mark.CLOSED)

    def finish(self) -> None:
        """The stream ends here; questions about it go on."""
        self._enough.set()

    def stop(self) -> None:
        """Read no further chunk, answer nothing more, and end."""
        self._stopped.set()
        self._room.release()
        self.close()

    def events(self) -> Iterator[Read | Reply | Mark]:
        """Each chunk after it was read, each reply, and both marks; ends after both.

        Raises what the stream raises, such as MediaError.
        """
        started, missing, waiting = time.perf_counter(), set(Mark), list[Question]()
        threading.Thread(target=self._produce, daemon=True).start()
        while missing:
            # 1. what comes next
            event = self._events.get()
            if self._stopped.is_set():
                return
            if isinstance(event, BaseException):
                raise event
            if isinstance(event, Question):
                waiting.append(event)
            elif isinstance(event, Chunk):
                yield from self._add(event)
                self._room.release()
            else:
                yield from self._read() if event is Mark.ENDED else ()
                missing.discard(event)
                yield event
            # 2. the questions; nothing can be asked about the opening alone
            while waiting and (self.seconds > 0 or Mark.ENDED not in missing):
                fork = self._stream.fork()
                if self._begun:
                    fork.feed(Chunk.joined(self._begun))
                yield self._asking.reply(fork, [waiting.pop(0).text], self.seconds, self.seconds, started)
                fork.forget()

    def _add(self, part: Chunk) -> Iterator[Read]:
        """Read the chunk that a part ends: the one before it, or with the opening itself."""
        if sum(each.count for each in self._begun) + part.count > self._asking.feeder.options.chunk_tokens:
            yield from self._read()
        self._begun.append(part)
        self.seconds = part.seconds
        if part.tracks is not None:
            yield from self._read()

    def _read(self) -> Iterator[Read]:
        if self._begun:
            parts, self._begun = self._begun, []
            self._stream.feed(Chunk.joined(parts))
            yield Read(parts)

    def _produce(self) -> None:
        try:
            with torch.no_grad():
                for part in self._parts():
                    self._room.acquire()
                    if self._stopped.is_set():
                        return
                    if self._enough.is_set():
                        break
                    self._events.put(part)
            self._events.put(Mark.ENDED)
        except BaseException as error:  # noqa: BLE001 - raised where the events are read
            self._events.put(error)


# --- command line


def add_model(parser: Parser) -> None:
    """The options of the model, its memory and its stream."""
    parser.add_argument("--model", required=True, metavar="DIR|ID", help="a checkpoint: merged, or the adapter's base")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="a tuned adapter")
    parser.add_argument("--slots", type=_slots, metavar="N|full", help="audio and visual tokens kept in each layer")
    parser.add_argument(
        "--policy", choices=POLICIES, metavar="NAME", help="selects the tokens to keep: `omnimem list policies`"
    )
    choice = "the model that chooses them: as it answers, or without its adapter"
    parser.add_argument("--selection-from", choices=("tuned", "base"), help=choice)
    parser.add_argument("--tracks", choices=get_args(TracksOption), help="tracks of the stream to read")
    parser.add_argument("--fps", type=float, help="frames per second that are read")
    parser.add_argument("--max-pixels", type=_count, metavar="N", help="of each frame")
    parser.add_argument("--chunk-tokens", type=_count, metavar="N", help="at most so many tokens per forward pass")
    parser.add_argument("--max-new-tokens", type=_count, metavar="N", help="length of an answer")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights")


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _slots(text: str) -> int:
    return FULL if text == "full" else _count(text)
