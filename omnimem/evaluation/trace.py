"""Kept tokens of one stream after each chunk, by layer, segment and modality."""

from typing import Any, final

import torch
from jaxtyping import Int
from torch import Tensor

from omnimem.evaluation.stream_reader import StreamReader
from omnimem.streaming.stream import Stream
from omnimem.tokens import EVICTABLE, Chunk, Modality

MOST = 192  # rows (chunks) and bins (segments); above it, every second row is dropped and pairs of bins are joined


@final
class Trace:
    """Counts after each chunk, in a table of bounded size for streams of any length."""

    def __init__(self, reader: StreamReader) -> None:
        self._reader = reader
        self._chunks, self._every = 0, 1  # chunks so far; chunks per row
        self._joined = 1  # segments per bin
        self._rows: list[tuple[float, dict[int, Int[Tensor, "layers bins"]]]] = []
        self._fed, self._text = 0, torch.zeros(0, dtype=torch.long)  # tokens so far; arrival numbers of text

    def arrive(self, chunk: Chunk) -> None:
        """Number the text of a chunk of the stream, whether it is kept or not."""
        text = (chunk.modality[0] == Modality.TEXT).nonzero()[:, 0].cpu()
        self._text = torch.cat([self._text, text + self._fed])
        self._fed += chunk.count

    def note(self, stream: Stream, seconds: float) -> None:
        """Count the kept tokens of every segment after a chunk that ended at `seconds`."""
        self._chunks += 1
        if self._chunks % self._every:
            return
        counted = self._counted(stream)  # may join the bins of earlier rows
        self._rows.append((seconds, counted))
        if len(self._rows) >= MOST:
            self._rows, self._every = self._rows[1::2], 2 * self._every

    def _counted(self, stream: Stream) -> dict[int, Int[Tensor, "layers bins"]]:
        while len(self._reader.arrived) > MOST * self._joined:
            self._joined *= 2
            self._rows = [(end, {kind: _joined(table) for kind, table in row.items()}) for end, row in self._rows]
        edges = self._edges()
        found: dict[int, Int[Tensor, "layers bins"]] = {}
        for kind in EVICTABLE:
            layers = []
            for layer in stream.memory.layers:
                order, kinds = layer.order[0].cpu(), layer.modality[0].cpu()
                mine = order[kinds == kind]
                mine = mine - torch.searchsorted(self._text, mine)  # text is in no segment
                bins = torch.bucketize(mine, edges, right=True) - 1
                held = torch.bincount(bins, minlength=len(edges) - 1)[: len(edges) - 1]
                layers.append((held / layer.heads).round())  # an entry of a single head counts as 1 / heads
            found[kind] = torch.stack(layers).to(torch.int32)
        return found

    def _edges(self) -> Int[Tensor, " edges"]:
        """Number of the first audio or visual token of each bin."""
        counts = torch.tensor([sum(each) for each in self._reader.arrived])
        starts = torch.cat([torch.tensor([0]), counts.cumsum(0)])
        return torch.cat([starts[: -1 : self._joined], starts[-1:]])

    def json(self, stream: Stream, seconds: float) -> dict[str, Any]:
        """The table of `eval/<arm>/trace.json` after the last chunk, which ended at `seconds`."""
        # 1. the last row
        if not self._rows or self._rows[-1][0] < seconds:
            counted = self._counted(stream)
            self._rows.append((seconds, counted))
        # 2. table
        rows = self._rows
        bins = -(-len(self._reader.arrived) // self._joined)
        return {
            "video": self._reader.sample.id,
            "seconds": seconds,
            "bin_seconds": self._reader.seconds_per_segment * self._joined,
            "chunk_ends": [end for end, _ in rows],
            "arrived": {
                kind.name.lower(): self._summed([arrived[place] for arrived in self._reader.arrived])
                for place, kind in enumerate(EVICTABLE)
            },
            "kept": {kind.name.lower(): [_widened(row[kind], bins).tolist() for _, row in rows] for kind in EVICTABLE},
        }

    def _summed(self, counts: list[int]) -> list[int]:
        return [sum(counts[first : first + self._joined]) for first in range(0, len(counts), self._joined)]


def _joined(table: Int[Tensor, "layers bins"]) -> Int[Tensor, "layers half"]:
    """Pairs of neighbouring bins joined."""
    return _widened(table, table.shape[1] + table.shape[1] % 2).unflatten(1, (-1, 2)).sum(2).to(torch.int32)


def _widened(table: Int[Tensor, "layers bins"], bins: int) -> Int[Tensor, "layers {bins}"]:
    """With empty bins for segments that had not arrived."""
    return torch.nn.functional.pad(table, (0, bins - table.shape[1]))
