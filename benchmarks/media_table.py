"""Seconds and frames that omnimem reads of made files, beside ffmpeg's own; writes the table of docs/media.md.

    python -m benchmarks.media_table [--out docs/media.md] [--record]

The files and what ffmpeg reads of them are recorded in tests/recorded (media.tar.xz, media.json), so that neither this
nor tests/unit/media/test_table.py needs ffmpeg. `--record` makes them again with the command line of ffmpeg (5.1 or
later with libx264, libx265, libvpx, libopus, libvorbis, libtheora, libmp3lame). A row differs when seconds are more
than SECONDS apart, frames at FPS more than one, or when only one side refuses the file. Exit code 1 if a difference has
no reason.
"""

import argparse
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

import numpy as np

from benchmarks.tables import markdown
from omnimem.media import MediaError, probe, read_audio_blocks, read_frames

FPS, RATE = 4.0, 16000
SECONDS = 0.1  # the padding that audio codecs add, by which the origin may move
RECORDED = Path(__file__).resolve().parent.parent / "tests" / "recorded"
MADE, READ = RECORDED / "media.tar.xz", RECORDED / "media.json"  # the files, and what ffmpeg reads of them
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"

Change = Callable[[bytes], bytes]


@final
@dataclass(frozen=True, kw_only=True)
class File:
    """A file made by ffmpeg from these arguments, then changed; `reason`: why the two sides may differ."""

    name: str
    arguments: str  # V5: five seconds of video; A5: of audio; the output is added
    change: Change | None = None
    reason: str = ""


@final
@dataclass(frozen=True, kw_only=True)
class Found:
    """What one side reads of a file; None: the track is not there."""

    video: float | None = None  # seconds
    frames: int | None = None  # at FPS
    audio: float | None = None  # seconds
    refused: str = ""

    def cells(self) -> list[str]:
        """Three cells of the table."""
        if self.refused:
            return [self.refused, "", ""]
        seconds = ["-" if value is None else f"{value:.2f}" for value in (self.video, self.audio)]
        return [seconds[0], "-" if self.frames is None else str(self.frames), seconds[1]]


def cut(share: float) -> Change:
    """The first part of a file."""
    return lambda content: content[: int(share * len(content))]


X264 = "-c:v libx264 -preset ultrafast -pix_fmt yuv420p"
BOTH = f"V5 A5 {X264} -c:a aac"
FILES = (
    # containers and codecs
    File(name="mp4_h264_aac.mp4", arguments=BOTH),
    File(name="mp4_fragmented.mp4", arguments=f"{BOTH} -movflags frag_keyframe+empty_moov"),
    File(name="mov_prores_pcm.mov", arguments="V5 A5 -c:v prores_ks -c:a pcm_s16le"),
    File(
        name="mp4_hevc_ac3.mp4", arguments="V5 A5 -c:v libx265 -preset ultrafast -x265-params log-level=none -c:a ac3"
    ),
    File(name="mkv_h264_flac.mkv", arguments=f"V5 A5 {X264} -c:a flac"),
    File(name="mkv_ffv1_pcm.mkv", arguments="V5 A5 -c:v ffv1 -c:a pcm_s24le"),
    File(name="webm_vp9_opus.webm", arguments="V5 A5 -c:v libvpx-vp9 -deadline realtime -cpu-used 8 -c:a libopus"),
    File(name="webm_vp8_vorbis.webm", arguments="V5 A5 -c:v libvpx -deadline realtime -cpu-used 8 -c:a libvorbis"),
    File(name="avi_mpeg4_mp3.avi", arguments="V5 A5 -c:v mpeg4 -c:a libmp3lame"),
    File(name="avi_mjpeg_pcm.avi", arguments="V5 A5 -c:v mjpeg -pix_fmt yuvj420p -c:a pcm_s16le"),
    File(name="mpegts_h264_aac.ts", arguments=BOTH),
    File(name="mpegts_mpeg2_mp2.ts", arguments="V5 A5 -c:v mpeg2video -q:v 12 -c:a mp2"),
    File(name="mpeg_ps.mpg", arguments="V5 A5 -c:v mpeg2video -q:v 12 -c:a mp2 -f vob"),
    File(name="flv_h264_aac.flv", arguments=BOTH),
    File(name="asf_wmv2_wmav2.wmv", arguments="V5 A5 -c:v wmv2 -c:a wmav2"),
    File(name="ogg_theora_vorbis.ogv", arguments="V5 A5 -c:v libtheora -c:a libvorbis"),
    File(name="nut_mpeg4_pcm.nut", arguments="V5 A5 -c:v mpeg4 -c:a pcm_s16le"),
    File(name="gif.gif", arguments="V5"),
    # rates and sizes
    File(name="rate_23_976.mp4", arguments=f"V5 A5 -r 24000/1001 {X264} -c:a aac"),
    File(name="rate_59_94.mp4", arguments=f"V5 A5 -r 60000/1001 {X264} -c:a aac"),
    File(name="rate_1.mp4", arguments=f"V5 A5 -r 1 {X264} -c:a aac"),
    File(name="rate_1_of_5.mkv", arguments=f"V5 A5 -r 1/5 {X264} -c:a flac"),
    File(name="variable_rate.mp4", arguments=f"V5 A5 -vf select=not(mod(floor(n/10)\\,3)) -vsync vfr {X264} -c:a aac"),
    File(name="variable_rate.mkv", arguments=f"V5 A5 -vf select=not(mod(floor(n/10)\\,3)) -vsync vfr {X264} -c:a aac"),
    File(name="b_frames_open_gop.mp4", arguments=f"V5 A5 {X264} -preset medium -bf 3 -g 12 -flags -cgop -c:a aac"),
    File(name="odd_size.mkv", arguments="V5 A5 -vf scale=65:49 -c:v ffv1 -c:a flac"),
    File(name="interlaced.ts", arguments="V5 A5 -c:v mpeg2video -q:v 12 -flags +ilme+ildct -top 1 -c:a mp2"),
    File(name="rotated_90.mp4", arguments=f"{BOTH} -metadata:s:v rotate=90"),
    # clocks
    File(name="video_late_1_5.mkv", arguments=f"-itsoffset 1.5 V5 A5 {X264} -c:a flac"),
    File(name="audio_late_1_5.mkv", arguments=f"V5 -itsoffset 1.5 A5 {X264} -c:a flac"),
    File(name="audio_late_1_5.mp4", arguments=f"V5 -itsoffset 1.5 A5 {X264} -c:a aac"),
    File(name="audio_late_1_5.ts", arguments=f"V5 -itsoffset 1.5 A5 {X264} -c:a aac"),
    File(name="clock_from_1000.ts", arguments=f"{BOTH} -output_ts_offset 1000"),
    File(name="clock_from_1000.mkv", arguments=f"{BOTH} -output_ts_offset 1000"),
    File(name="clock_below_0.mkv", arguments=f"{BOTH} -output_ts_offset -2 -avoid_negative_ts disabled"),
    File(name="clock_below_0.ts", arguments=f"{BOTH} -output_ts_offset -4 -avoid_negative_ts disabled"),
    File(name="clock_below_0.mp4", arguments=f"{BOTH} -output_ts_offset -2 -avoid_negative_ts disabled"),
    File(
        name="clock_below_0.flv",
        arguments=f"{BOTH} -output_ts_offset -2 -avoid_negative_ts disabled",
        reason="its timestamps jump by 25 days",
    ),
    File(name="clock_below_0.mpg", arguments="V5 A5 -c:v mpeg2video -q:v 12 -c:a mp2 -f vob -output_ts_offset -2"),
    File(name="clock_wraps.ts", arguments=f"{BOTH} -output_ts_offset 95441.7 -muxdelay 0"),
    File(name="edit_list_starts_at_2.mp4", arguments=f"-ss 2 -copy MP4 {X264}"),
    # tracks
    File(name="audio_longer.mkv", arguments=f"V3 A5 {X264} -c:a flac"),
    File(name="video_longer.mkv", arguments=f"V5 A3 {X264} -c:a flac"),
    File(name="video_alone.mp4", arguments=f"V5 {X264}"),
    File(
        name="second_audio_is_default.mkv",
        arguments=f"V5 A3 A5 -map 0 -map 1 -map 2 -disposition:a:0 0 -disposition:a:1 default {X264} -c:a flac",
    ),
    File(
        name="second_audio_has_6_channels.mkv",
        arguments=f"V5 A3 A5 -map 0 -map 1 -map 2 -disposition:a 0 -ac:a:1 6 {X264} -c:a flac",
    ),
    File(
        name="second_video_is_larger.mkv",
        arguments=f"V3 V5 A5 -map 0 -map 1 -map 2 -disposition:v 0 -s:v:1 128x96 {X264} -c:a flac",
    ),
    File(name="still_and_audio.mp4", arguments=f"V0.04 A5 {X264} -c:a aac"),
    File(name="still_and_audio.mkv", arguments=f"V0.04 A5 {X264} -c:a flac"),
    # audio
    File(name="pcm_8000_hz.wav", arguments="A5 -ar 8000"),
    File(name="pcm_11025_hz_u8.wav", arguments="A5 -ar 11025 -c:a pcm_u8"),
    File(name="pcm_96000_hz_float.wav", arguments="A5 -ar 96000 -c:a pcm_f32le"),
    File(name="pcm_8_channels.wav", arguments="A5 -ac 8"),
    File(name="flac_44100_hz.flac", arguments="A5 -ar 44100"),
    File(name="mp3.mp3", arguments="A5"),
    File(name="mp3_without_header.mp3", arguments="A5 -write_xing 0"),
    File(name="adts.aac", arguments="A5"),
    File(name="m4a.m4a", arguments="A5 -c:a aac"),
    File(name="alac.m4a", arguments="A5 -c:a alac"),
    File(name="opus.ogg", arguments="A5 -c:a libopus"),
    File(name="vorbis.ogg", arguments="A5 -c:a libvorbis"),
    File(name="aiff.aiff", arguments="A5"),
    # truncations
    File(name="cut_half.mp4", arguments=BOTH, change=cut(0.5)),
    File(
        name="cut_half_index_first.mp4", arguments=f"{BOTH} -movflags +faststart", change=cut(0.5), reason="truncated"
    ),
    File(name="cut_half.mkv", arguments=f"V5 A5 {X264} -c:a flac", change=cut(0.5), reason="truncated"),
    File(name="cut_half.wav", arguments="A5", change=cut(0.5), reason="truncated"),
    File(name="cut_half.mp3", arguments="A5", change=cut(0.5), reason="truncated"),
    File(name="cut_half.flac", arguments="A5", change=cut(0.5), reason="truncated"),
    File(name="cut_half.ts", arguments=BOTH, change=cut(0.5), reason="truncated"),
)


# ------------------------------------------------------------------------------------------------------ made by ffmpeg


def make(file: File, folder: Path) -> Path:
    """The file, made by ffmpeg."""
    path, words = folder / file.name, []
    for word in file.arguments.split():
        if found := re.fullmatch(r"([VA])([\d.]+)", word):
            kind, seconds = found.groups()
            source = "testsrc2=size=64x48:rate=25" if kind == "V" else "sine=frequency=440:sample_rate=44100"
            words += ["-f", "lavfi", "-t", seconds, "-i", source]
        elif word == "MP4":
            words += ["-i", str(folder / FILES[0].name)]
        elif word != "-copy":
            words.append(word)
    _run(["ffmpeg", "-v", "error", "-y", *words, str(path)])
    if file.change is not None:
        path.write_bytes(file.change(path.read_bytes()))
    return path


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)


# ------------------------------------------------------------------------------------------------------- read by ffmpeg


def by_ffmpeg(path: Path) -> Found:
    """The track that ffmpeg chooses, decoded: times from the earliest start of all tracks, gaps filled by silence."""
    # 1. one command for both tracks: without one of them ffmpeg moves the origin of mpegts to the other
    listed = _ffprobe(path, "stream=codec_type:stream_disposition=attached_pic")
    outputs: list[str] = []
    if re.search(r"video,0", listed):
        outputs += ["-an", "-vf", "showinfo", "-fps_mode", "passthrough", "-f", "null", "-"]
    if "audio" in listed:
        outputs += ["-vn", "-ac", "1", "-af", f"aresample={RATE}:async=1:first_pts=0", "-f", "f32le", "-"]
    if not outputs:
        return Found(refused="cannot be read")
    run = subprocess.run(
        ["ffmpeg", "-nostats", "-i", str(path), *outputs], capture_output=True, stdin=subprocess.DEVNULL
    )
    shown, heard = run.stderr.decode(errors="replace"), run.stdout
    times = [float(time) for time in re.findall(r"n: *\d+ pts: *-?\d+ pts_time:(-?[\d.]+)", shown)]
    # 2. the end of the last frame
    if not times and not heard:
        return Found(refused="cannot be read")
    end = None
    if times:
        last = re.findall(r"duration_time:([\d.]+)", shown)
        step = float(last[-1]) if last else (times[-1] - times[0]) / max(1, len(times) - 1) or 1 / 25
        end = times[-1] + step
    return Found(
        video=end,
        frames=None if end is None else int(np.ceil(end * FPS - 1e-2)),
        audio=len(heard) / 4 / RATE if heard else None,
    )


def _ffprobe(path: Path, entries: str) -> str:
    command = ["ffprobe", "-v", "error", "-show_entries", entries, "-of", "csv=p=0", str(path)]
    return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL).stdout.decode(errors="replace")


# ------------------------------------------------------------------------------------------------------ read by omnimem


def by_omnimem(path: Path) -> Found:
    """What a stream reads of the file."""
    try:
        info = probe(path)
        frames = sum(1 for _ in read_frames(path, fps=100.0)) if info.has_video else None
        shown = sum(1 for _ in read_frames(path, fps=FPS)) if info.has_video else None
        heard = sum(len(block) for block in read_audio_blocks(path)) if info.has_audio else None
    except MediaError as error:
        return Found(refused=f"error: {error.reason}")
    return Found(
        video=None if frames is None else frames / 100, frames=shown, audio=None if heard is None else heard / RATE
    )


# ------------------------------------------------------------------------------------------------ recorded, and a table


def record() -> None:
    """Make the files, and write them and what ffmpeg reads of them to tests/recorded."""
    version = _run(["ffmpeg", "-version"]).stdout.decode().split()[2]
    with tempfile.TemporaryDirectory() as place:
        paths = [make(file, Path(place)) for file in FILES]
        with tarfile.open(MADE, "w:xz", preset=9) as archive:
            for path in paths:
                entry = tarfile.TarInfo(path.name)
                entry.size = path.stat().st_size
                with path.open("rb") as content:
                    archive.addfile(entry, content)
        rows = {path.name: asdict(by_ffmpeg(path)) for path in paths}
    READ.write_text(json.dumps({"ffmpeg": version, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def unpack(folder: Path) -> None:
    """Write the recorded files into a folder."""
    with tarfile.open(MADE) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # from 3.11.4 on


def recorded() -> Mapping[str, Found]:
    """What ffmpeg reads of the recorded files, by name."""
    return {name: Found(**row) for name, row in json.loads(READ.read_text(encoding="utf-8"))["rows"].items()}


def differences(theirs: Found, ours: Found) -> Iterator[str]:
    """In what two readings of a file differ."""
    if bool(theirs.refused) != bool(ours.refused):
        yield "refused by one"
        return
    for name, within in (("video", SECONDS), ("frames", 1), ("audio", SECONDS)):
        a, b = getattr(theirs, name), getattr(ours, name)
        if (a is None) != (b is None) or (a is not None and abs(a - b) > within):
            yield name


def table(folder: Path) -> tuple[str, int]:
    """The table of the files in a folder, and the number of differences without a reason."""
    rows, unexplained = [], 0
    for file in FILES:
        theirs, ours = recorded()[file.name], by_omnimem(folder / file.name)
        found = ", ".join(differences(theirs, ours))
        unexplained += bool(found) and not file.reason
        verdict = (f"{found} ({file.reason})" if file.reason else f"DIFFERS: {found}") if found else "equal"
        rows.append([file.name, *theirs.cells(), *ours.cells(), verdict])
    titles = ["file", "ffmpeg: video s", f"frames at {FPS:g}/s", "audio s", "omnimem: video s", "frames", "audio s", ""]
    return markdown(titles, rows), unexplained


def main() -> None:
    """Read the recorded files, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a page whose table is replaced (default: print it)")
    parser.add_argument("--record", action="store_true", help="make the files again, and read them with ffmpeg")
    given = parser.parse_args()
    if given.record:
        record()
    with tempfile.TemporaryDirectory() as place:
        unpack(Path(place))
        text, unexplained = table(Path(place))
    if given.out is None:
        print(text)
    else:
        page = given.out.read_text(encoding="utf-8")
        head, tail = page.partition(BEGIN)[0], page.partition(END)[2]
        given.out.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")
    sys.exit(1 if unexplained else 0)


if __name__ == "__main__":
    main()
