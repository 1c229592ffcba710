"""The positions that a model was trained on, and how far the streams of a run reach beyond them."""

import os
import sys
from typing import final


@final
class TrainedRange:
    """Says once per run, on the first rank, that a stream with `positions: original` passes the trained positions."""

    def __init__(self, trained: int) -> None:
        self.trained = trained
        self.reached = 0  # the highest position beyond the trained ones; 0: none

    def note(self, position: int) -> None:
        """Note the last position of a chunk."""
        if position < self.trained:
            return
        if not self.reached and os.environ.get("RANK", "0") == "0":
            print(f"note: {beyond(position, self.trained)}; see stream.positions", file=sys.stderr, flush=True)
        self.reached = max(self.reached, position)


def beyond(position: int, trained: int) -> str:
    """The line about a stream that passes the trained positions."""
    return f"positions reach {position:,}, beyond the {trained:,} that the model was trained on"
