"""How a stream is cut into chunks and read."""

from dataclasses import dataclass
from typing import Literal, final

from omnimem.media import SourceOptions, TracksOption
from omnimem.tokens import Tracks

MOST_TOKENS = 1 << 30  # of one forward pass


@final
@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """How a stream is cut and read."""

    fps: float = 1.0  # frames per second of the stream
    max_pixels: int = 176_400  # per frame: 420 x 420, as in the release
    min_pixels: int = 3_136  # per frame; smaller frames are enlarged
    chunk_tokens: int = 16_384  # an upper limit: a chunk ends at the last grid that fits
    # where chunks end: grid, or tokens: after exactly chunk_tokens, also within a frame (release)
    cut: Literal["grid", "tokens"] = "grid"
    positions: Literal["original", "compact"] = "original"  # compact: kept tokens move up at the model's trained range
    tracks: TracksOption = "both"  # both: those that a file has; require_both: a file without one is refused
    # at most this many timestamps in a stream, of models that write them (`total_timestamps` of the release, 256 in the
    # paper): each then stands before ceil(grids / timestamps) frame grids; None: before every grid
    timestamps: int | None = None

    def __post_init__(self) -> None:
        if self.timestamps is not None and self.timestamps < 1:
            raise ValueError(f"timestamps = {self.timestamps} must be at least 1, or null for one per frame grid")
        if not 0 < self.chunk_tokens <= MOST_TOKENS:
            limits = f"1..{MOST_TOKENS:,}; 16384 is the release's setting"
            raise ValueError(f"chunk_tokens = {self.chunk_tokens} must be in {limits}")
        self.source()

    def source(self, tracks: Tracks | None = None) -> SourceOptions:
        """The part of these options that decoding needs, for the tracks that a file has (default: both, if asked)."""
        asked: Tracks = "both" if self.tracks == "require_both" else self.tracks
        return SourceOptions(
            fps=self.fps, max_pixels=self.max_pixels, min_pixels=self.min_pixels, tracks=tracks or asked
        )
