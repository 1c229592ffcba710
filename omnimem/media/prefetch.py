"""Prefetching: separate processes decode files, a bounded number of bytes ahead.

Errors of a file and of the machine are raised again in the reading process. A decoding process that ends in the middle
of a file costs this file alone: DecoderLost if the system killed it, as it does when memory is exhausted, else
MediaError (a codec crashed). Another process decodes the files after it.
"""

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, TypeVar, final

import torch

from omnimem.errors import first_line, lacks_memory
from omnimem.media.container import MediaError
from omnimem.media.source import Decoded, FileSource, Segment

AHEAD_BYTES = 1 << 26  # of queued frames and mel per process: two minutes of 420 x 420 at one frame per second
PATIENCE = 10.0  # seconds to wait for the exit code of a lost process

Job = TypeVar("Job")


@final
class DecoderLost(MemoryError):
    """A decoding process was killed before the end of its file."""


@final
class Decoders:
    """A pool of `workers` decoding processes; with 0 workers, files are decoded in the reading process.

    A process is at most `ahead` bytes of resized frames and mel ahead of what was read, or one segment if that is
    larger, and holds at most two segments more: one that it sends, and one that it makes. The number of files that have
    begun does not matter.
    """

    def __init__(self, workers: int, ahead: int = AHEAD_BYTES) -> None:
        self.workers, self._ahead, self._begun = workers, ahead, 0
        self._stack = ExitStack()
        self.decoders: list[_Decoder] = []

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(self, *_: object) -> None:
        self.decoders = []
        self._stack.close()

    def read(self, jobs: Iterable[tuple[Job, FileSource | None]]) -> Iterator[tuple[Job, Decoded | None]]:
        """Yield each job with the segments of its file, in order; a source of None gives None.

        Decoding of the next files starts while one is consumed, so `workers` jobs are taken in advance. Unread segments
        are dropped when the next job is requested. Iterating segments raises what FileSource does, and DecoderLost.
        """
        if not self.workers:
            yield from jobs
            return
        rest = iter(jobs)
        waiting: deque[tuple[Job, DecodedFile | None]] = deque()
        while True:
            # 1. start the next files
            for job, source in islice(rest, 1 + self.workers - len(waiting)):
                waiting.append((job, None if source is None else self.begin(source)))
            if not waiting:
                return
            # 2. yield the first one, then drop what was not read
            job, segments = waiting.popleft()
            yield job, segments
            if segments is not None:
                segments.drop()

    def begin(self, source: FileSource) -> "DecodedFile":
        """The segments of a file, decoded by the next process; files must be read or dropped in the order of begin."""
        if self._begun < self.workers:
            decoder = _Decoder(self._ahead)
            self._stack.callback(decoder.close)
            self.decoders.append(decoder)
        self._begun += 1
        return self.decoders[(self._begun - 1) % self.workers].begin(source)


@final
class _Decoder:
    """A decoding process, the connection to it, and the files that it has not finished."""

    def __init__(self, ahead: int) -> None:
        self._ahead, self._queued = ahead, deque[FileSource]()
        self._start()

    def _start(self) -> None:
        self.connection, theirs = Pipe()
        serve = "from omnimem.media.prefetch import serve; serve()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", serve, str(theirs.fileno()), str(self._ahead)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # ignores keyboard interrupts; ends when the connection closes
        )
        theirs.close()

    def begin(self, source: FileSource) -> "DecodedFile":
        """Queue a file."""
        self._queued.append(source)
        self._send(source)
        return DecodedFile(self, source)

    def _send(self, source: FileSource) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # reading the file reports the lost process
            self.connection.send_bytes(pickle.dumps(source))

    def receive(self) -> tuple[str, Any]:
        """The next message about the first queued file; when the process has ended, another one takes the next files.

        Raises DecoderLost and MediaError of a lost process.
        """
        try:
            kind, content = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError) as error:  # OSError: in the middle of a message
            source, code = self._queued.popleft(), self.process.wait(PATIENCE)
            self.connection.close()
            self._start()
            for later in self._queued:
                self._send(later)
            raise _lost(source, code) from error
        if kind != "segment":
            self._queued.popleft()
        return kind, content

    def close(self) -> None:
        """Stop the process."""
        self.connection.close()
        self.process.kill()
        self.process.wait()


@final
class DecodedFile:
    """The segments of one file, received from its process; they can be iterated once."""

    def __init__(self, decoder: _Decoder, source: FileSource) -> None:
        self._decoder, self._source, self._over, self.options = decoder, source, False, source.options

    def __iter__(self) -> Iterator[Segment]:
        for kind, content in self._messages():
            if kind == "segment":
                yield _unpack(content)
            elif kind == "failed":
                path, reason, message = content
                raise MediaError(path, reason, message)
            elif kind == "machine":
                number, message = content
                raise MemoryError(message) if number is None else OSError(number, message, str(self._source.path))

    @property
    def unchanged(self) -> bool:
        """As `FileSource.unchanged`."""
        return self._source.unchanged

    def drop(self) -> None:
        """Skip what was not read."""
        with suppress(DecoderLost, MediaError):  # of a process that ended after what was read
            deque(self._messages(), maxlen=0)

    def _messages(self) -> Iterator[tuple[str, Any]]:
        """The remaining messages about this file."""
        while not self._over:
            self._over = True  # unless another segment comes
            kind, content = self._decoder.receive()
            self._over = kind != "segment"
            yield kind, content


def _lost(source: FileSource, code: int) -> DecoderLost | MediaError:
    """The error for a process that has ended in the middle of a file, by its exit code or signal."""
    if code == -signal.SIGKILL:
        cure = "if memory was short, lower evaluate.decoders (train.dataloader_num_workers) or stream.max_pixels"
        return DecoderLost(f"{source.path}: the process that decoded it was killed by SIGKILL; {cure}")
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    cure = "the file may have crashed the decoder: convert it, or remove it"
    return MediaError(source.path, "unreadable", f"the process that decoded it {how}; {cure}")


def serve() -> None:
    """Main loop of a decoding process: decode queued files and send their segments until the connection closes."""
    # 1. a thread sends the segments
    connection, ahead = Connection(int(sys.argv[1])), int(sys.argv[2])
    torch.set_num_threads(1)
    outbox = _Outbox(ahead)
    threading.Thread(target=_send, args=(connection, outbox), daemon=True).start()
    # 2. decode one file after the other
    while True:
        try:
            source: FileSource = pickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            return
        try:
            for segment in source:
                outbox.put(("segment", _pack(segment)), _size(segment))
            outbox.put(("end", None))
        except MediaError as error:
            message = str(error).removeprefix(f"{error.path}: ")
            outbox.put(("failed", (str(error.path), error.reason, message)))
        except (MemoryError, OSError, RuntimeError) as error:
            if lacks_memory(error):
                outbox.put(("machine", (None, first_line(error))))
            elif isinstance(error, OSError):
                outbox.put(("machine", (error.errno, error.strerror)))
            else:
                raise


@final
class _Outbox:
    """A queue whose content is at most `limit` bytes, or one item."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held, self._changed = limit, 0, threading.Condition()
        self._items: deque[tuple[tuple[str, Any], int]] = deque()

    def put(self, item: tuple[str, Any], size: int = 0) -> None:
        """Add an item, as soon as there is room for its bytes."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + size <= self._limit)
            self._items.append((item, size))
            self._held += size
            self._changed.notify_all()

    def get(self) -> tuple[str, Any]:
        """Remove the first item, as soon as there is one."""
        with self._changed:
            self._changed.wait_for(lambda: self._items)
            item, size = self._items.popleft()
            self._held -= size
            self._changed.notify_all()
            return item


def _size(segment: Segment) -> int:
    return sum(part.numel() * part.element_size() for part in (segment.frames, segment.mel) if part is not None)


def _send(connection: Connection, outbox: _Outbox) -> None:
    try:
        while True:
            connection.send_bytes(pickle.dumps(outbox.get(), protocol=5))
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the main thread may still be decoding a file that is not needed any more


def _pack(segment: Segment) -> tuple[Any, ...]:
    """Arrays instead of tensors: pickled tensors would use shared memory, which is small in containers."""
    arrays = [None if part is None else part.contiguous().numpy() for part in (segment.frames, segment.mel)]
    return replace(segment, frames=None, mel=None), *arrays


def _unpack(content: tuple[Any, ...]) -> Segment:
    segment, *arrays = content
    frames, mel = (None if array is None else torch.from_numpy(array) for array in arrays)
    return replace(segment, frames=frames, mel=mel)
