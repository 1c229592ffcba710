"""Reading ahead: other processes decode the streams that come next while the model works on one (training)."""

from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import final

from omnimem.data import Sample
from omnimem.media import MediaError
from omnimem.media.prefetch import DecodedFile, Decoders
from omnimem.streaming.feeder import EncodedSample, Feeder


@final
class ReadAhead:
    """Opens samples as `Feeder.open` does, from segments that `workers` processes decode ahead.

    Every process is at most AHEAD_BYTES ahead (`Decoders`), however many samples are announced. With 0 workers, and for
    samples that were not announced or are in the cache, nothing is decoded ahead.
    """

    def __init__(self, feeder: Feeder, workers: int) -> None:
        self.feeder, self._decoders = feeder, Decoders(workers)
        self._coming: deque[tuple[Sample, DecodedFile | None]] = deque()

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *_: object) -> None:
        self._coming.clear()
        self._decoders.__exit__()

    def expect(self, samples: Iterable[Sample]) -> None:
        """Announce samples that will be opened, in this order."""
        if self._decoders.workers:
            self._coming.extend((sample, self._begun(sample)) for sample in samples)

    def _begun(self, sample: Sample) -> DecodedFile | None:
        with suppress(MediaError):  # raised again when it is opened
            if sample.has_stream and (source := self.feeder.undecoded(sample)) is not None:
                return self._decoders.begin(source)
        return None

    def open(self, sample: Sample) -> EncodedSample:
        """The sample, encoded. Raises as `Feeder.open`, and DecoderLost if its process was killed."""
        # 1. its segments; samples announced before it are not opened any more
        decoded: DecodedFile | None = None
        if any(coming is sample for coming, _ in self._coming):
            coming = None
            while coming is not sample:
                coming, decoded = self._coming.popleft()
                if decoded is not None and coming is not sample:
                    decoded.drop()
        # 2. open it, and drop what was not read
        try:
            return self.feeder.open(sample, decoded)
        finally:
            if decoded is not None:
                decoded.drop()
