"""Read both tracks of a container that is still being written, such as a pipe from ffmpeg."""

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from io import BufferedIOBase, RawIOBase
from typing import Any, final

import torch
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import Float, UInt8
from torch import Tensor

from omnimem.media.container import MediaError, audio_stream, blaming, decodable, is_empty, open_input, video_stream
from omnimem.media.decode import contiguous, sample_by_time, timed_audio, timed_frames, upright
from omnimem.media.source import TracksOption

SEQUENTIAL = "mpegts, matroska, flv or fragmented mp4"


def read_live(
    file: BufferedIOBase | RawIOBase, *, fps: float, rate: int = 16000, tracks: TracksOption = "both", name: str = "-"
) -> tuple[Iterator[tuple[float, UInt8[Tensor, "3 _ _"]]] | None, Iterator[Float[Tensor, " _"]] | None]:
    """The (frames, audio) iterators of a `LiveSource`, read from a file object that need not be seekable.

    With `both`, a track that the stream lacks is None.
    Formats written sequentially can be read while they grow: mpegts, matroska, flv, fragmented mp4.
    Raises MediaError with path `name`: `unreadable`, `no_video`, `no_audio`, and `truncated` when decoding fails.
    """
    # 1. open the container
    with blaming(name, "cannot be read", f"send {SEQUENTIAL}"):
        container = open_input(file, protocols="none")
        # 2. choose the tracks
        video = decodable(video_stream(container)) if tracks != "audio" else None
        audio = decodable(audio_stream(container)) if tracks != "video" else None
    if video is None and (tracks in ("video", "require_both") or (tracks == "both" and audio is None)):
        raise MediaError(name, "no_video", "has no video track; use tracks: audio")
    if audio is None and tracks in ("audio", "require_both"):
        raise MediaError(name, "no_audio", "has no audio track; use tracks: video")
    # 3. decode both in one pass
    packets = _Packets(container, [stream for stream in (video, audio) if stream is not None])
    return (
        None if video is None else _video_frames(packets, container, video, fps, name),
        None if audio is None else _audio_blocks(packets, container, audio, rate, name),
    )


@final
class _Packets:
    """One pass over a container for two readers; frames that the other reader needs later are queued."""

    def __init__(self, container: InputContainer, streams: list[VideoStream | AudioStream]) -> None:
        self._packets = container.demux(streams)
        self._waiting: dict[int, deque[Any]] = {stream.index: deque() for stream in streams}

    def frames(self, stream: VideoStream | AudioStream) -> Iterator[Any]:
        """Decoded frames of one track, of PyAV's type for it."""
        waiting = self._waiting[stream.index]
        while waiting or self._pull():
            while waiting:
                yield waiting.popleft()

    def _pull(self) -> bool:
        """Read and decode one packet; False at the end."""
        packet = next(self._packets, None)
        if packet is not None and not is_empty(packet):
            self._waiting[packet.stream_index].extend(packet.decode())
        return packet is not None


def _blaming(name: str) -> AbstractContextManager[None]:
    return blaming(name, "decoding failed", f"send it again, as {SEQUENTIAL}", cut="truncated")


def _video_frames(
    packets: _Packets, container: InputContainer, stream: VideoStream, fps: float, name: str
) -> Iterator[tuple[float, UInt8[Tensor, "3 _ _"]]]:
    with _blaming(name):
        converter = VideoReformatter()
        for time, frame in sample_by_time(timed_frames(packets.frames(stream), container, stream), fps):
            yield time, upright(frame, converter)  # convert selected frames only


def _audio_blocks(
    packets: _Packets, container: InputContainer, stream: AudioStream, rate: int, name: str
) -> Iterator[Float[Tensor, " _"]]:
    with _blaming(name):
        for block in contiguous(timed_audio(packets.frames(stream), container), rate):
            yield torch.from_numpy(block)
