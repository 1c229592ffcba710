"""Decoding ahead gives what decoding here gives; bad files and lost processes are named."""

import os
import signal
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.media_files import write_wav

from omnimem.media import FileSource, Geometry, LogMel, MediaError, Segment, SourceOptions
from omnimem.media.prefetch import DecoderLost, Decoders, _Outbox
from omnimem.recall.renderer import write_mp4
from omnimem.recall.worlds import draw_world

GEOMETRY = Geometry(
    patch=14,
    merge=2,
    temporal_patch=2,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    mel=LogMel(mels=64, hop=4000, n_fft=4096),
    segment_seconds=2.0,
)
SECONDS = (8, 12, 6, 10)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("films")
    paths = [folder / f"{number}.mp4" for number in range(len(SECONDS))]
    for number, (path, seconds) in enumerate(zip(paths, SECONDS, strict=True)):
        write_mp4(draw_world(number, seconds), path)
    return paths


def jobs_of(files: list[Path]) -> list[tuple[int, FileSource | None]]:
    return [(number, source(path)) for number, path in enumerate(files)]


def source(path: Path, *, geometry: Geometry = GEOMETRY, **settings: Any) -> FileSource:
    return FileSource(path, options=SourceOptions(max_pixels=12544), geometry=geometry, **settings)


def same(ours: list[Segment], theirs: list[Segment]) -> bool:
    """Whether two lists of segments are equal to the bit."""
    return len(ours) == len(theirs) and all(
        replace(a, frames=None, mel=None) == replace(b, frames=None, mel=None)
        and all((x is y is None) or torch.equal(x, y) for x, y in ((a.frames, b.frames), (a.mel, b.mel)))
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize(("workers", "windowed"), [(0, False), (2, False), (2, True)])
def test_segments_come_in_order_and_equal_those_decoded_here(files, workers, windowed) -> None:
    settings = {"geometry": replace(GEOMETRY, windowed=windowed), "asks": [1.0, 3.3]}
    jobs: list[tuple[int, FileSource | None]] = [(n, source(path, **settings)) for n, path in enumerate(files)]
    jobs.insert(2, (99, None))
    with Decoders(workers, ahead=100_000) as decoders:
        seen = [(job, None if segments is None else list(segments)) for job, segments in decoders.read(jobs)]
    assert [job for job, _ in seen] == [0, 1, 99, 2, 3]
    assert seen[2][1] is None
    assert all(same(segments, list(source(files[job], **settings))) for job, segments in seen if segments is not None)


@pytest.mark.parametrize(("sizes", "limit", "most"), [((4, 4, 4, 4, 0), 9, 8), ((20, 1, 20), 9, 20), ((0, 0), 1, 0)])
def test_a_process_is_a_bounded_number_of_bytes_ahead(sizes, limit, most) -> None:
    """Its last message waits until the reader takes something."""
    outbox, held = _Outbox(limit), []
    writer = threading.Thread(target=lambda: [outbox.put((f"{size}", None), size) for size in sizes], daemon=True)
    writer.start()
    for size in sizes:
        until = time.monotonic() + 0.05
        while writer.is_alive() and time.monotonic() < until:
            time.sleep(0.005)
        held.append(outbox._held)
        assert outbox.get() == (f"{size}", None)
    assert max(held) == most


def test_a_bad_file_is_its_own_error_and_the_next_one_is_read(files, tmp_path) -> None:
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(files[1].read_bytes()[:-2000])
    gone = tmp_path / "gone.mp4"
    jobs: list[tuple[str, FileSource | None]] = [(path.name, source(path)) for path in (cut, gone, files[0])]
    reasons, read = {}, {}
    with Decoders(1) as decoders:
        for name, segments in decoders.read(jobs):
            try:
                read[name] = list(segments or ())
            except MediaError as error:
                reasons[name] = (error.reason, str(error))
    assert same(read["0.mp4"], list(source(files[0])))
    assert {name: reason for name, (reason, _) in reasons.items()} == {"cut.mp4": "truncated", "gone.mp4": "missing"}
    assert reasons["gone.mp4"][1] == f"{gone}: is not a file; check the path"


def test_segments_left_unread_do_not_reach_the_next_file(files) -> None:
    with Decoders(1, ahead=1) as decoders:
        first = [next(iter(segments or ())) for _, segments in decoders.read(jobs_of(files))]
    assert same(first, [next(iter(source(path))) for path in files])


def ahead_of(decoders: Decoders, files: list[Path]) -> Iterator[tuple[int, list[Segment]]]:
    for number, segments in decoders.read(jobs_of(files)):
        yield number, list(segments or ())


@pytest.mark.parametrize(
    ("number", "error", "what"),
    [
        (signal.SIGKILL, DecoderLost, "killed by SIGKILL; if memory"),
        (signal.SIGSEGV, MediaError, "killed by SIGSEGV; the file"),
    ],
)
def test_a_process_that_ends_costs_the_file_that_it_decoded(files, number, error, what) -> None:
    lost, read = {}, {}
    with Decoders(1, ahead=1) as decoders:
        for job, segments in decoders.read(jobs_of(files)):
            try:
                read[job] = list(segments or ())
            except (DecoderLost, MediaError) as raised:
                lost[job] = raised
            if job == 0:
                os.kill(decoders.decoders[0].process.pid, number)  # it waits with the first segments of the second file
    assert list(lost) == [1]
    assert isinstance(lost[1], error)
    assert f"1.mp4: the process that decoded it was {what}" in str(lost[1])
    assert all(same(segments, list(source(files[job]))) for job, segments in read.items())


def test_a_process_that_ends_within_a_message_costs_its_file(files) -> None:
    lost = {}
    with Decoders(1, ahead=1) as decoders:
        for job, segments in decoders.read(jobs_of(files)):
            decoder = decoders.decoders[0]
            if job == 1:
                decoder.process.kill()
                decoder.connection.close()
                decoder.connection, theirs = Pipe()
                os.write(theirs.fileno(), struct.pack("!i", 100) + b"ten bytes.")  # of a message of 100
                theirs.close()
            try:
                list(segments or ())
            except DecoderLost as error:
                lost[job] = str(error)
    assert list(lost) == [1]
    assert "killed by SIGKILL" in lost[1]


def test_a_process_that_ends_after_what_was_read_is_no_error(files) -> None:
    read = []
    with Decoders(1, ahead=1) as decoders:
        for _, segments in decoders.read(jobs_of(files)):
            read.append(next(iter(segments or ())))
            os.kill(decoders.decoders[0].process.pid, signal.SIGKILL)
            decoders.decoders[0].process.wait()
    assert same(read, [next(iter(source(path))) for path in files])


def test_a_process_ends_when_its_reader_is_gone(files) -> None:
    with Decoders(2, ahead=1) as decoders:
        reading = ahead_of(decoders, files)
        next(reading)
        processes = [decoder.process.pid for decoder in decoders.decoders]
        for decoder in decoders.decoders:  # as if this process had been killed
            decoder.connection.close()
        for _ in range(100):
            if not any(_runs(process) for process in processes):
                return
            time.sleep(0.1)
        pytest.fail("decoding processes outlive their reader")


def _runs(process: int) -> bool:
    """Whether a child has not ended yet (an ended one that nobody waited for is a zombie)."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_what_is_heard_later_changes_no_causal_segment(tmp_path) -> None:
    """A bang near the end: without it the segments before are the same to the bit, but as parts of a whole clip not."""
    quiet, loud = tmp_path / "quiet.wav", tmp_path / "loud.wav"
    hum = 1e-3 * np.random.default_rng(0).standard_normal(16000 * 12).astype(np.float32)
    write_wav(quiet, hum)
    hum[16000 * 10 :] = 0.9 * np.sign(np.sin(np.arange(32000)))
    write_wav(loud, hum)
    options = SourceOptions(tracks="audio")
    for causal in (True, False):
        a, b = (list(FileSource(p, options=options, geometry=GEOMETRY, causal=causal)) for p in (quiet, loud))
        equal = [torch.equal(torch.as_tensor(x.mel), torch.as_tensor(y.mel)) for x, y in zip(a, b, strict=True)]
        assert equal[:4] == [causal] * 4
        assert not equal[-1]
