"""Stream a file or a pipe and answer questions about it from a memory of fixed size.

omnimem ask --model DIR [--adapter DIR] --video FILE|- [--at SECONDS]... "QUESTION" ["QUESTION" ...]

Settings of the memory are read from omnimem.json of the adapter or the model (written by `omnimem export`); --slots,
--policy and --selection-from replace them. Without any of these the whole stream is kept.
"""

import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final, get_args

import torch
from torch import Tensor

from omnimem.backbones import ModelOptions, load_backbone
from omnimem.budget import SharedBudget
from omnimem.checksums import is_sealed
from omnimem.cli.parser import Parser
from omnimem.cli.tuned_model import BaseModel, load_tuned
from omnimem.config import ConfigError
from omnimem.config.check import alternatives, choices_of
from omnimem.config.exported import FILE, Exported, policies_of
from omnimem.config.policy import policy_options
from omnimem.data import Message, Sample
from omnimem.media import FileSource, FrameList, LiveSource, MediaError, Source, TracksOption, read_live
from omnimem.policies import PerturbationOptions, PolicyOptions
from omnimem.policies.base import Policy
from omnimem.rows import SLACK, tracks_of
from omnimem.streaming.attach import attach
from omnimem.streaming.feeder import Feeder, feed_until_due
from omnimem.streaming.options import StreamOptions
from omnimem.streaming.stream import Stream
from omnimem.tokens import EVICTABLE, Modality
from omnimem.tuning import AdapterError

UNKNOWN = "oracle"  # it must know what is asked
POLICIES = tuple(name for kind in alternatives(PolicyOptions) for name in choices_of(kind) if name != UNKNOWN)
PIPE, FULL = "-", 0


def main(arguments: Sequence[str]) -> None:
    """Read the stream, ask the questions, print answers and their cost."""
    # 1. load the model
    given = _parser().parse(arguments)
    if given.selection_from == "base" and given.adapter is None:
        raise ConfigError(["--selection-from base: there is no adapter; give --adapter DIR, or leave it out"])
    exported = recorded(given.model, given.adapter)
    backbone = load_backbone(model_of(given, exported))
    if given.adapter is not None:
        load_tuned(backbone.model, given.adapter)
        if exported is not None and not is_sealed(given.adapter):
            BaseModel.of(given.model).digest(exported.origin.base_sha256, given.adapter)
    # 2. stream the file and answer
    feeder = Feeder(backbone, stream_of(given, exported))
    tokens = given.max_new_tokens or (exported.max_new_tokens if exported else 64)
    with torch.no_grad(), attach(backbone.text_model) as attached:
        policy = policy_of(given, exported, attached.shape.layers)
        if given.slots is None and exported is None:
            where = given.adapter or given.model
            print(f"no {FILE} in {where}: everything is kept; --slots N keeps N tokens per layer", file=sys.stderr)
        stream = feeder.stream(attached, policy)
        asking = Asking(feeder=feeder, questions=given.questions, max_new_tokens=tokens)
        for reply in asking.replies(stream, source_of(video_of(given), feeder, given.at), given.at):
            print("\n".join(reply.lines(given.questions)), flush=True)


# --- settings


def recorded(model: str, adapter: Path | None) -> Exported | None:
    """The omnimem.json of the adapter, or else of the model; None if there is none."""
    if adapter is None and (Path(model) / "adapter_config.json").is_file():
        raise AdapterError(f"{model} is an adapter; give its base as --model, and this folder as --adapter")
    folder = Path(model) if adapter is None else adapter
    return Exported.read(folder) if (folder / FILE).is_file() else None


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
    own = exported.memory.slots_per_layer if exported else FULL
    slots: int = own if given.slots is None else given.slots
    options = exported.memory.policy if exported else PerturbationOptions()
    if given.policy not in (None, options.name):
        options = policy_options(given.policy)
    chosen = given.selection_from or (exported.memory.selection_from if exported else "tuned")
    if exported is not None and slots != FULL:
        memory = replace(exported.memory, policy=options, selection_from=chosen)
        return policies_of(memory, exported.budget)(slots)
    return replace(options.build(None if slots == FULL else SharedBudget().build(layers, slots)), selection_from=chosen)


def video_of(given: Namespace) -> str | FrameList:
    """The video, or with --frame-rate the frames of a folder; raises MediaError if there are none."""
    if given.frame_rate is None:
        return given.video
    try:
        return FrameList.of_folder(Path(given.video), given.frame_rate)
    except ValueError as error:
        raise MediaError(given.video, "missing", f"{error}; --frame-rate is for a folder of image files") from error


def source_of(video: str | FrameList, feeder: Feeder, times: Sequence[float]) -> Source:
    """The file, or the live stream on standard input, asked at these times; says so if it lacks a track.

    Raises MediaError if it is unusable, or a time is after the end of the file.
    """
    asked, geometry = feeder.options.tracks, feeder.backbone.geometry
    if video != PIPE:
        questions = tuple(Message(role="user", content="", at=time) for time in times)
        media = video if isinstance(video, FrameList) else Path(video)
        tracks = tracks_of(Sample(id=str(video), video=media, audio=None, messages=questions), asked)
        source = FileSource(video, options=feeder.options.source(tracks), geometry=geometry, asks=times)
    else:
        if sys.stdin is None:
            raise MediaError(PIPE, "missing", "standard input is closed; send a stream, or give a file as --video")
        pipe = open(sys.stdin.fileno(), "rb", closefd=False)  # noqa: SIM115 - open until the stream ends
        frames, audio = read_live(pipe, fps=feeder.options.fps, rate=geometry.mel.rate, tracks=asked)
        tracks = "both" if frames and audio else "video" if frames else "audio"
        source = LiveSource(frames, audio, options=feeder.options.source(tracks), geometry=geometry, asks=times)
    if asked == "both" and tracks != "both":
        print(f"{video} has no {'audio' if tracks == 'video' else 'video'} track: {tracks} only", file=sys.stderr)
    return source


# --- questions and replies


@final
@dataclass(frozen=True, kw_only=True)
class Reply:
    """Answers at one time and their cost."""

    at: float | None  # the requested time
    seen: float  # seconds of the stream read so far
    answers: list[str]
    cost: list[str]  # lines about tokens, memory and seconds

    def lines(self, questions: Sequence[str]) -> Iterator[str]:
        """The printed lines: the answer without its question if there is one question, at the end."""
        if len(questions) == 1 and self.at is None:
            yield self.answers[0]
        else:
            when = "" if self.at is None else f"at {self.at:g} s: "
            yield from (f"{when}{q} -> {a}" for q, a in zip(questions, self.answers, strict=True))
        yield from (f"  {line}" for line in self.cost)


@final
@dataclass(frozen=True, kw_only=True)
class Asking:
    """Asks the questions at the given times, or at the end of the stream."""

    feeder: Feeder
    questions: Sequence[str]
    max_new_tokens: int

    def replies(self, stream: Stream, source: Source, times: Sequence[float]) -> Iterator[Reply]:
        """A reply for each time, as soon as all before it was read, else at the end; the stream is read up to the last.

        Questions are read on a fork, so that the memory of the stream is unchanged.
        """
        started = time.perf_counter()
        for due in feed_until_due(stream, self.feeder.watch(source, cuts=times), sorted(set(times)) or [None]):
            for at in due.moments:
                if at is not None and at > due.seconds + SLACK:  # of a live stream
                    what = (
                        f"the stream ended at {due.seconds:.1f} s, before --at {at:g}; leave it out to ask at the end"
                    )
                    raise MediaError(source.path if isinstance(source, FileSource) else PIPE, "too_short", what)
                yield self._reply(due.stream.fork(), at, due.seconds, started)

    def _reply(self, stream: Stream, at: float | None, seen: float, started: float) -> Reply:
        # 1. answer, and record the time of the first logits
        asked, first = time.perf_counter(), []

        def head(hidden: Tensor) -> Tensor:
            logits = self.feeder.backbone.head(hidden)
            if not first:
                logits.flatten()[0].item()  # waits for the GPU
                first.append(time.perf_counter() - asked)
            return logits

        answers = self.feeder.answers(stream, self.questions, max_new_tokens=self.max_new_tokens, head=head)
        total = time.perf_counter() - started
        # 2. cost, of the memory that the answers were read from
        memory, counts, layers = stream.memory, stream.memory.counts(), len(stream.memory.layers)
        arrived = dict(zip(Modality, stream.usage.tokens_in, strict=True))
        kept = {kind: round(sum(layer[kind] for layer in counts) / layers, 1) for kind in EVICTABLE}
        tokens = " + ".join(f"{arrived[kind]} {kind.name.lower()}" for kind in EVICTABLE)
        held = " + ".join(f"{kept[kind]:g} {kind.name.lower()}" for kind in EVICTABLE)
        cost = [
            f"tokens in {seen:.4g} s: {tokens}; kept in each layer: {held}",
            f"memory: {memory.entries:,} entries in {layers} layers, {memory.bytes:,} bytes",
            f"seconds: {asked - started:.2f} reading, {first[0]:.3f} to the first token, {total:.3f} in all",
        ]
        if stream.selector is not None:
            chosen = stream.selector.memory
            line = f"chosen by the model without its adapter: {chosen.entries:,} entries, {chosen.bytes:,} bytes more"
            cost.insert(2, line)
        return Reply(at=at, seen=seen, answers=answers, cost=cost)


# --- command line


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--model", required=True, metavar="DIR|ID", help="a checkpoint: merged, or the adapter's base")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="a tuned adapter")
    parser.add_argument("--video", required=True, metavar="FILE|-", help="a file, or - for a growing stream on stdin")
    parser.add_argument("--at", type=_time, action="append", default=[], metavar="SECONDS", help="repeatable (end)")
    parser.add_argument("questions", nargs="+", metavar="QUESTION")
    parser.add_argument("--slots", type=_slots, metavar="N|full", help="audio and visual tokens kept in each layer")
    parser.add_argument(
        "--policy", choices=POLICIES, metavar="NAME", help="selects the tokens to keep: `omnimem list policies`"
    )
    choice = "the model that chooses them: as it answers, or without its adapter"
    parser.add_argument("--selection-from", choices=("tuned", "base"), help=choice)
    parser.add_argument("--tracks", choices=get_args(TracksOption), help="tracks of the stream to read")
    parser.add_argument("--fps", type=float, help="frames per second that are read")
    parser.add_argument("--frame-rate", type=_rate, metavar="FPS", help="--video is a folder of images at this rate")
    parser.add_argument("--max-pixels", type=_count, metavar="N", help="of each frame")
    parser.add_argument("--chunk-tokens", type=_count, metavar="N", help="at most so many tokens per forward pass")
    parser.add_argument("--max-new-tokens", type=_count, metavar="N", help="length of an answer")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights")
    return parser


def _rate(text: str) -> float:
    if not (found := _time(text)):
        raise ArgumentTypeError(f"{text!r} is not a number of frames per second above 0")
    return found


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _slots(text: str) -> int:
    return FULL if text == "full" else _count(text)


def _time(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ArgumentTypeError(f"{text!r} is not a time in seconds from the start of the stream")
    return seconds
