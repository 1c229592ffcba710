"""Segments of a sample as they are read, with frame counts and audio seconds over time."""

import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import final

from omnimem.backbones import Encoded
from omnimem.data import Sample
from omnimem.streaming.encoder_cache import EncodedSegment, MediaStats
from omnimem.streaming.feeder import EncodedSample, layout
from omnimem.tokens import Tracks

EPSILON = 1e-6  # seconds: rounding of segment ends


@final
class StreamReader:
    """The segments of a sample, once each, with counters."""

    def __init__(self, sample: Sample, tracks: Tracks | None, parts: Iterable[EncodedSegment]) -> None:
        self.sample, self._parts = sample, parts
        self.tracks: Tracks | None = tracks
        self._ends: list[float] = []
        self._heard: list[MediaStats] = []
        self._rests: dict[float | None, MediaStats] = {}  # up to the time of a question within a segment
        self.arrived: list[tuple[int, int]] = []  # audio and visual tokens of each segment so far
        self.gathering = 0.0  # seconds that `gather` took

    @property
    def segments(self) -> Iterator[Encoded]:
        """The segments; each is counted when it is read."""
        for part in self._parts:
            encoded = part.encoded
            if encoded.at is not None:
                self._rests[encoded.at] = part.heard
                yield encoded
                continue
            self._ends.append(encoded.start + encoded.seconds)
            self._heard.append(part.heard)
            if encoded.count:
                audio, visual = (0 if part is None else part.shape[1] for part in (encoded.audio, encoded.visual))
                self.arrived.append((audio, visual))
            yield encoded

    def gather(self) -> tuple[object, ...]:
        """Read all segments in advance; the layout that samples of a batch must share. Raises MediaError."""
        began = time.perf_counter()
        self._parts = list(self._parts)
        self.gathering = time.perf_counter() - began
        return layout(self.sample, self.tracks, (part.encoded for part in self._parts))

    def whole(self) -> EncodedSample:
        """The sample with all its segments, which can still be read."""
        self.gather()
        parts = list(self._parts)
        heard = parts[-1].heard if parts else MediaStats()
        return EncodedSample(
            sample=self.sample, segments=[part.encoded for part in parts], tracks=self.tracks, heard=heard
        )

    def heard(self, until: float, at: float | None = None) -> MediaStats:
        """Frames and audio seconds up to a time of the stream, or in the rest of a question at `at`."""
        if at in self._rests:
            return self._rests[at]
        count = bisect_right(self._ends, until + EPSILON)
        return self._heard[count - 1] if count else MediaStats()

    @property
    def seconds_per_segment(self) -> float:
        """Length of the first segment, in seconds."""
        return self._ends[0]
