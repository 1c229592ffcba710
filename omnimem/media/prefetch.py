"""Decoding ahead: files are read in processes of their own, a bounded number of segments before they are needed.

A file that cannot be read raises its MediaError here as it would have raised there. A process that ends in the middle
of a file (killed, out of memory, a fault in a codec) raises DecoderLost, which names the file; nobody waits for it.
"""

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, TypeVar, final

import torch

from omnimem.media.container import MediaError
from omnimem.media.source import FileSource, Segment

AHEAD = 32  # segments that wait in each process: a minute at one frame a second, some 30 MB of 420 x 420 frames
PATIENCE = 10.0  # seconds that an ended process may take to be gone

Job = TypeVar("Job")


@final
class DecoderLost(RuntimeError):
    """A decoding process ended before its file did."""


@final
class Decoders:
    """`workers` processes that read files one after the other; with none, files are read where they are needed."""

    def __init__(self, workers: int, ahead: int = AHEAD) -> None:
        self._workers, self._ahead = workers, ahead
        self._stack = ExitStack()
        self._decoders: list[_Decoder] = []

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(self, *_: object) -> None:
        self._decoders = []
        self._stack.close()

    @property
    def processes(self) -> list[int]:
        """Ids of the processes that have been started."""
        return [decoder.process.pid for decoder in self._decoders]

    def read(self, jobs: Iterable[tuple[Job, FileSource | None]]) -> Iterator[tuple[Job, Iterable[Segment] | None]]:
        """Each job with the segments of its file, in order; None stays None.

        The next files are begun while one is consumed, so jobs are taken `workers` ahead. Segments left unread are
        dropped when the next job is asked for. Iterating them raises MediaError as FileSource does, and DecoderLost.
        """
        if not self._workers:
            yield from jobs
            return
        rest = iter(jobs)
        waiting: deque[tuple[Job, _Reading | None]] = deque()
        files = 0
        while True:
            for job, source in islice(rest, 1 + self._workers - len(waiting)):
                waiting.append((job, None if source is None else self._decoder(files).begin(source)))
                files += source is not None
            if not waiting:
                return
            job, reading = waiting.popleft()
            yield job, reading
            if reading is not None:
                deque(reading.rest(), maxlen=0)

    def _decoder(self, number: int) -> "_Decoder":
        """The process that reads file `number`; started when it is needed for the first time."""
        if number < self._workers:
            decoder = _Decoder(self._ahead)
            self._stack.callback(decoder.close)
            self._decoders.append(decoder)
        return self._decoders[number % self._workers]


@final
class _Decoder:
    """One process and the way to it."""

    def __init__(self, ahead: int) -> None:
        self.connection, theirs = Pipe()
        serve = "from omnimem.media.prefetch import serve; serve()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", serve, str(theirs.fileno()), str(ahead)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # an interrupt at the keyboard is the reader's business; it ends when we are gone
        )
        theirs.close()

    def begin(self, source: FileSource) -> "_Reading":
        """Have it read a file when it is done with those before."""
        with suppress(BrokenPipeError, ConnectionResetError):  # the file that it was lost with will say so
            self.connection.send_bytes(pickle.dumps(source))
        return _Reading(self, source)

    def receive(self, source: FileSource) -> tuple[str, Any]:
        """Its next message about a file."""
        try:
            return pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionResetError) as error:
            raise self.lost(source) from error

    def lost(self, source: FileSource) -> DecoderLost:
        """What happened to it."""
        code = self.process.wait(PATIENCE)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return DecoderLost(
            f"{source.path}: the process that decoded it {how}; with too little memory lower evaluate.decoders, "
            "else the file may have brought it down: convert it, or take it out of the benchmark"
        )

    def close(self) -> None:
        """End it."""
        self.connection.close()
        self.process.kill()
        self.process.wait()


@final
class _Reading:
    """The segments of one file as they come from its process."""

    def __init__(self, decoder: _Decoder, source: FileSource) -> None:
        self._decoder, self._source, self._over = decoder, source, False

    def __iter__(self) -> Iterator[Segment]:
        for kind, content in self.rest():
            if kind == "segment":
                yield _opened(content)
            elif kind == "failed":
                path, reason, message = content
                raise MediaError(path, reason, message)

    def rest(self) -> Iterator[tuple[str, Any]]:
        """Messages up to the last one about this file."""
        while not self._over:
            kind, content = self._decoder.receive(self._source)
            self._over = kind != "segment"
            yield kind, content


def serve() -> None:
    """What a decoding process does: read the files it is given, hand over their segments, end when nobody listens."""
    connection, ahead = Connection(int(sys.argv[1])), int(sys.argv[2])
    torch.set_num_threads(1)
    outbox: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=ahead)
    threading.Thread(target=_hand_over, args=(connection, outbox), daemon=True).start()
    while True:
        try:
            source: FileSource = pickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            return
        try:
            for segment in source:
                outbox.put(("segment", _packed(segment)))
            outbox.put(("end", None))
        except MediaError as error:
            said = str(error).removeprefix(f"{error.path}: ")
            outbox.put(("failed", (str(error.path), error.reason, said)))


def _hand_over(connection: Connection, outbox: "queue.Queue[tuple[str, Any]]") -> None:
    try:
        while True:
            connection.send_bytes(pickle.dumps(outbox.get(), protocol=5))
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the main thread may be in the middle of a file that nobody waits for


def _packed(segment: Segment) -> tuple[Any, ...]:
    """Arrays instead of tensors: pickled tensors would travel through shared memory, which containers keep small."""
    arrays = [None if part is None else part.contiguous().numpy() for part in (segment.frames, segment.mel)]
    return segment.start, segment.seconds, *arrays


def _opened(content: tuple[Any, ...]) -> Segment:
    start, seconds, *arrays = content
    frames, mel = (None if array is None else torch.from_numpy(array) for array in arrays)
    return Segment(start=start, seconds=seconds, frames=frames, mel=mel)
