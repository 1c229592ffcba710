"""One stream of the page: read in a thread, with its timeline, small pictures and answers."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from typing import Any, Literal, final

import torch
from jaxtyping import UInt8
from torch import Tensor

from omnimem.cli.asking import Conversation, Loaded, Mark, Read, Reply, arrivals, held
from omnimem.errors import UserError, first_line
from omnimem.inspection.snapshot import jpeg
from omnimem.media import MediaError, Segment, Source, resize
from omnimem.tokens import EVICTABLE, Chunk
from omnimem.ui.timeline import Timeline

SMALL, LARGE = 96, 448  # pixels of the longer side of a picture
PICTURES = 240  # small ones; every second is dropped where there would be twice as many
REPLIES = 200  # the newest ones are shown
WAITING = 8  # questions without an answer
BUFFERED = 64_000_000  # bytes of a camera that the model has not read
Phase = Literal["opening", "reading", "complete", "failed"]


@final
class Busy(UserError):
    """What was asked for cannot be done now."""


@final
class Feed(BufferedIOBase):
    """A file of what a camera sends, which grows until `end`; `read` waits for the next bytes."""

    def __init__(self) -> None:
        self._parts: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._size, self._ended = 0, False

    def readable(self) -> bool:
        """It is read from the front to the end."""
        return True

    def put(self, data: bytes) -> None:
        """Append. Raises Busy when BUFFERED bytes wait to be read."""
        with self._changed:
            if self._ended:
                raise Busy("the camera has ended; start it again")
            if self._size + len(data) > BUFFERED:
                raise Busy("the model reads more slowly than the camera records; lower --fps or --max-pixels")
            self._parts.append(data)
            self._size += len(data)
            self._changed.notify_all()

    def end(self) -> None:
        """Nothing follows."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def read(self, size: int | None = -1, /) -> bytes:
        """At most `size` bytes, as soon as there are any; empty at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._parts or self._ended)
            if not self._parts:
                return b""
            part = self._parts.popleft()
            if size is not None and 0 <= size < len(part):
                part, rest = part[:size], part[size:]
                self._parts.appendleft(rest)
            self._size -= len(part)
            return part


@final
@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the page asks to read."""

    title: str
    kind: Literal["file", "upload", "camera"]
    model: Loaded
    open: Callable[[], Source]
    settings: str  # of the memory, as shown
    seconds: float | None = None  # length of the stream, if known
    paced: bool = False  # as fast as it plays
    feed: Feed | None = None  # of a camera


@final
class Session:
    """Reads a stream in a thread of its own; the state is read by any thread."""

    def __init__(self, choice: Choice, number: int = 1) -> None:
        self.choice, self.number = choice, number
        self._lock, self.version = threading.Lock(), 0
        self._phase: Phase = "opening"
        self._error: str | None = None
        self._ended = threading.Event()  # no further part is wanted
        self._stream = choice.model.stream()
        self._conversation = Conversation(choice.model.asking, self._stream, self._parts)
        self._timeline, self._shown = Timeline(), dict[str, Any]()
        self._asked, self._replies = deque[str](), deque[dict[str, Any]](maxlen=REPLIES)
        self._pictures, self._spacing = dict[int, bytes](), 0  # by milliseconds; between two of them
        self.now = b""  # the latest frame
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def finish(self) -> None:
        """The stream ends here; questions about it go on."""
        self._ended.set()
        if self.choice.feed is not None:
            self.choice.feed.end()
        else:
            self._conversation.finish()

    def stop(self) -> None:
        """Read and answer nothing more; returns when the model is free."""
        self.finish()
        self._conversation.stop()
        self._thread.join()

    @property
    def reading(self) -> bool:
        """Whether the stream goes on."""
        return self._phase in ("opening", "reading")

    def ask(self, text: str) -> None:
        """Ask about what was read so far. Raises Busy if it cannot be answered."""
        with self._lock:
            if self._phase == "failed":
                raise Busy("the stream has failed; start one")
            if len(self._asked) >= WAITING:
                raise Busy(f"{WAITING} questions wait for their answers; ask again after them")
            self._asked.append(text)
            self.version += 1
        self._conversation.ask(text)

    def picture(self, time: int) -> bytes | None:
        """The small picture at a time in milliseconds."""
        return self._pictures.get(time)

    def state(self) -> dict[str, Any]:
        """Everything that the page shows."""
        with self._lock:
            choice = self.choice
            return {
                "version": self.version,
                "title": choice.title,
                "kind": choice.kind,
                "settings": choice.settings,
                "length": choice.seconds,
                "phase": self._phase,
                "error": self._error,
                "seconds": self._conversation.seconds,
                "pictures": sorted(self._pictures),
                "replies": list(self._replies),
                "waiting": list(self._asked),
                **self._shown,
            }

    # ------------------------------------------------------------------------------------------------- in the thread

    def _run(self) -> None:
        try:
            with torch.no_grad():
                for event in self._conversation.events():
                    if isinstance(event, Read):
                        self._read(event)
                    elif isinstance(event, Reply):
                        self._answered(event)
                    elif event is Mark.ENDED:
                        self._set(phase="complete")
        except Exception as error:  # noqa: BLE001 - shown on the page, which goes on
            self._set(phase="failed", error=said(error, self.choice.title))

    def _parts(self) -> Iterator[Chunk]:
        """The parts of the stream, with `paced` none before its time; a stream that breaks off ends there."""
        started, feeder = time.monotonic(), self.choice.model.feeder
        try:
            for part in feeder.watch(self.choice.open(), split=True, seen=self._see):
                while self.choice.paced and (early := part.seconds - (time.monotonic() - started)) > 0:
                    if self._ended.wait(early):
                        return
                yield part
        except MediaError as error:
            if not self._conversation.seconds:
                raise
            self._set(error=None if self._ended.is_set() else said(error, self.choice.title))

    def _see(self, segment: Segment) -> None:
        if segment.frames is None:
            return
        small, self.now, at = _picture(segment.frames[0], SMALL), _picture(segment.frames[-1], LARGE), segment.start
        with self._lock:
            if not self._pictures or 1000 * at >= max(self._pictures) + self._spacing:
                self._pictures[round(1000 * at)] = small
            if len(self._pictures) >= 2 * PICTURES:
                self._pictures = dict(list(self._pictures.items())[::2])
                first, second, *_ = self._pictures
                self._spacing = second - first
            self.version += 1

    def _read(self, chunk: Read) -> None:
        stream, memory = self._stream, self._stream.memory
        self._timeline.add(chunk.parts, memory)
        arrived, kept = arrivals(stream), held(stream)
        names = {kind: kind.name.lower() for kind in EVICTABLE}
        shown = {
            "bins": self._timeline.shown(),
            "arrived": {names[kind]: arrived[kind] for kind in EVICTABLE},
            "kept": {names[kind]: kept[kind] for kind in EVICTABLE},
            "layers": len(memory.layers),
            "entries": memory.entries,
            "bytes": memory.bytes,
        }
        with self._lock:
            self._shown = shown
            self._phase = "reading" if self._phase == "opening" else self._phase
            self.version += 1

    def _answered(self, reply: Reply) -> None:
        with self._lock:
            self._asked.popleft()
            answer = {"question": reply.questions[0], "answer": reply.answers[0], "at": reply.seen}
            self._replies.append({**answer, "seconds": reply.seconds, "cost": reply.cost})
            self.version += 1

    def _set(self, *, phase: Phase | None = None, error: str | None = None) -> None:
        with self._lock:
            self._phase, self._error = phase or self._phase, error or self._error
            self.version += 1


def said(error: Exception, title: str) -> str:
    """The first line of an error, with the title of the stream in place of its path."""
    if isinstance(error, MediaError):
        return f"{title}: {str(error).removeprefix(f'{error.path}: ')}".splitlines()[0]
    return str(error).splitlines()[0] if isinstance(error, UserError) and str(error) else first_line(error)


def _picture(frame: UInt8[Tensor, "3 height width"], side: int) -> bytes:
    height, width = frame.shape[1:]
    scale = min(1.0, side / max(height, width))
    return jpeg(resize(frame[None], max(1, round(scale * height)), max(1, round(scale * width)))[0])
