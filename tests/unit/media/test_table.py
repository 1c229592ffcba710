"""Seconds and frames of the recorded files equal those that ffmpeg reads; docs/media.md lists them."""

from pathlib import Path

import av
import numpy as np
import pytest
from support.paths import ROOT

from benchmarks.media_table import BEGIN, END, FILES, File, by_omnimem, differences, recorded, unpack
from omnimem.media import read_frames

RECORDED = recorded()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("media")
    unpack(place)
    return place


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_has_the_seconds_and_frames_that_ffmpeg_reads_or_is_refused(folder, file: File) -> None:
    ours = by_omnimem(folder / file.name)
    found = list(differences(RECORDED[file.name], ours))
    if file.reason:  # ffmpeg reads what is left of it
        assert found == ["refused by one"] * bool(found)
        assert ours.refused in ("error: truncated", "error: unreadable")
    else:
        assert found == []


@pytest.mark.parametrize("empty", [range(20, 30), range(40, 50)], ids=["within", "at the end"])
def test_an_empty_packet_repeats_the_frame_before(tmp_path, empty) -> None:
    with av.open(str(tmp_path / "a.nut"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(50):
            grey = np.full((48, 64, 3), 5 * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24").reformat(format="yuv420p")
            frame.pts = number
            for packet in stream.encode(frame):
                if number in empty:
                    blank = av.Packet(0)
                    blank.stream, blank.time_base = packet.stream, packet.time_base
                    blank.pts, blank.dts, blank.duration, packet = packet.pts, packet.dts, packet.duration, blank
                container.mux(packet)
    shown = [int(frame.float().mean()) for _, frame in read_frames(tmp_path / "a.nut", fps=10.0)]
    assert len(shown) == 50
    assert {shown[number] for number in empty} == {shown[empty.start - 1]}
    assert len(set(shown)) > 30


def test_the_page_lists_what_is_recorded() -> None:
    lines = (ROOT / "docs" / "media.md").read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in lines if line.count("|") > 4][2:]
    assert rows == [[file.name, *RECORDED[file.name].cells()] for file in FILES]
    assert RECORDED.keys() == {file.name for file in FILES}
