"""A sample on its way into a stream: its segments as they come, and what of it was seen and heard by when."""

import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import final

from omnimem.backbones import Encoded
from omnimem.backbones.base import Tracks
from omnimem.data import Sample
from omnimem.streaming.encoder_cache import EncodedSegment, MediaStats
from omnimem.streaming.feeder import EncodedSample, layout

NEVER = 1e-6  # seconds by which ends of segments may differ that are the same


@final
class StreamReader:
    """Segments that pass once; a chunk that waits for its last segment has not been seen yet."""

    def __init__(self, sample: Sample, tracks: Tracks | None, parts: Iterable[EncodedSegment]) -> None:
        self.sample, self._parts = sample, parts
        self.tracks: Tracks | None = tracks
        self._ends: list[float] = []
        self._heard: list[MediaStats] = []
        self.arrived: list[tuple[int, int]] = []  # audio and visual tokens of each segment that has come
        self.gathering = 0.0  # seconds that it took to hold all segments

    @property
    def segments(self) -> Iterator[Encoded]:
        """The segments, noted as they pass."""
        for part in self._parts:
            encoded = part.encoded
            self._ends.append(encoded.start + encoded.seconds)
            self._heard.append(part.heard)
            self.arrived.append(
                (
                    0 if encoded.audio is None else encoded.audio.shape[1],
                    0 if encoded.visual is None else encoded.visual.shape[1],
                )
            )
            yield encoded

    def gather(self) -> tuple[object, ...]:
        """Hold all segments; what samples must share to pass together. Raises MediaError when they cannot be read."""
        began = time.perf_counter()
        self._parts = list(self._parts)
        self.gathering = time.perf_counter() - began
        return layout(self.sample, self.tracks, (part.encoded for part in self._parts))

    def whole(self) -> EncodedSample:
        """The sample with all its segments, which still are to pass."""
        self.gather()
        parts = list(self._parts)
        heard = parts[-1].heard if parts else MediaStats()
        return EncodedSample(
            sample=self.sample, segments=[part.encoded for part in parts], tracks=self.tracks, heard=heard
        )

    def heard(self, until: float) -> MediaStats:
        """What was seen and heard up to a time of the stream."""
        count = bisect_right(self._ends, until + NEVER)
        return self._heard[count - 1] if count else MediaStats()

    @property
    def seconds_per_segment(self) -> float:
        """Length of the first segment, in seconds."""
        return self._ends[0]
